"""Terms: the addends of a distillation's training loss, for `KDTrainer` and for loops of one's own."""

from fastkd.terms.attention import AttentionTerm
from fastkd.terms.hidden import HiddenStateTerm
from fastkd.terms.logits import KDTerm, RouterTerm, asks_for_router_loss
from fastkd.terms.memory import FeatureMemory, feature_memory
from fastkd.terms.multi_token import MultiTokenHeads, MultiTokenTerm
from fastkd.terms.named import TERMS, term_named, terms_named
from fastkd.terms.recording import Heads
from fastkd.terms.routed import RoutedLogits
from fastkd.terms.term import Batch, Course, Need, Needs, Outputs, Term, Terms, outputs_of

__all__ = [
    "TERMS",
    "AttentionTerm",
    "Batch",
    "Course",
    "FeatureMemory",
    "Heads",
    "HiddenStateTerm",
    "KDTerm",
    "MultiTokenHeads",
    "MultiTokenTerm",
    "Need",
    "Needs",
    "Outputs",
    "RoutedLogits",
    "RouterTerm",
    "Term",
    "Terms",
    "asks_for_router_loss",
    "feature_memory",
    "outputs_of",
    "term_named",
    "terms_named",
]
