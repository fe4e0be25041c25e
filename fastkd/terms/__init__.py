"""Terms: the addends of a distillation's training loss, for `KDTrainer` and for loops of one's own."""

from fastkd.terms.logits import KDTerm, RouterTerm, asks_for_router_loss
from fastkd.terms.routed import RoutedLogits
from fastkd.terms.term import Batch, Course, Need, Outputs, Term, Terms, outputs_of

__all__ = [
    "Batch",
    "Course",
    "KDTerm",
    "Need",
    "Outputs",
    "RoutedLogits",
    "RouterTerm",
    "Term",
    "Terms",
    "asks_for_router_loss",
    "outputs_of",
]
