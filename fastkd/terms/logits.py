"""The terms every distillation has: the divergence with the cross-entropy, and a mixture of experts' own loss."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fastkd import arguments
from fastkd.losses import KDLoss, KDParts
from fastkd.terms.architecture import text_config
from fastkd.terms.routed import RoutedLogits, rows_of
from fastkd.terms.term import IGNORED, Batch, Course, Outputs, Term

__all__ = ["KDTerm", "RouterTerm", "asks_for_router_loss"]


class KDTerm(Term):
    """`KDLoss` as a term, of weight 1: its own two weights say how much its parts count.

    Args:
        kd: a copy is used, with `return_parts=True`, and `shift=True` but for a batch whose labels come shifted.
        temperature, soft_weight: how they change over the training, if they do. The hard weight changes too, so that
            the sum of both weights stays the same.

    Logs `soft` (T² included) and `hard`, unweighted. Raises ValueError for a loss that is no mean, one with another
    `ignore_index` than −100, and a course that starts or ends at no temperature, or at more than the sum of both
    weights.
    """

    def __init__(
        self, kd: KDLoss | None = None, *, temperature: Course | None = None, soft_weight: Course | None = None
    ) -> None:
        super().__init__("kd")
        kd = KDLoss() if kd is None else copy.deepcopy(kd)
        if kd.reduction != "mean":
            raise ValueError(f"a term needs a loss with reduction='mean', got {kd.reduction!r}")
        if kd.ignore_index != IGNORED:
            raise ValueError(
                f"a term's labels are {IGNORED} where nothing is learnt, got ignore_index={kd.ignore_index}"
            )
        kd.shift = kd.return_parts = True
        self.kd = kd
        self._courses = {"temperature": temperature, "soft_weight": soft_weight}
        self._total = kd.soft_weight + kd.hard_weight
        for which in ("start", "end"):
            if temperature is not None:
                arguments.temperature(f"the {which} of temperature", getattr(temperature, which))
            if soft_weight is not None:
                value = arguments.number(f"the {which} of soft_weight", getattr(soft_weight, which))
                if value > self._total * (1 + 1e-9):  # room for rounding of 0.7 + 0.3
                    raise ValueError(
                        f"the {which} of soft_weight is {value}, more than soft_weight + hard_weight = {self._total:g} "
                        "of the loss, whose sum stays the same"
                    )

    @property
    def needs_teacher(self) -> bool:
        """Where the divergence has a weight."""
        return bool(self.kd.soft_weight)

    def follow(self, progress: float) -> None:
        """Set temperature and weights."""
        for name, course in self._courses.items():
            if course is not None:
                setattr(self.kd, name, course.at(progress))
        if self._courses["soft_weight"] is not None:
            self.kd.hard_weight = max(self._total - self.kd.soft_weight, 0.0)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `soft` and `hard`."""
        if self.kd.shift == batch.shifted:
            self.kd.shift = not batch.shifted
        taught = teacher.logits if self.kd.soft_weight else None
        if isinstance(taught, RoutedLogits):
            return self._routed(student, taught, batch)
        # An override of the loss may mask other tokens than those that were counted.
        known = batch.live is not None and type(self.kd).forward is KDLoss.forward
        options: dict[str, Any] = {"live": batch.live} if known else {}
        parts = self.kd(student.projection, taught, batch.labels, num_items=batch.num_items, **options)
        assert isinstance(parts, KDParts)
        return parts._asdict()

    def _routed(self, student: Outputs, teacher: RoutedLogits, batch: Batch) -> dict[str, Tensor]:
        """The sums of what each teacher's rows give, all divided by the same number of tokens."""
        items = batch.num_items
        if items is None:
            if not self.kd.mask_soft:
                raise ValueError("routed teachers with mask_soft=False need num_items, the divisor of both parts")
            items = (batch.predicted != self.kd.ignore_index).sum().clamp(min=1)
        found: dict[str, Tensor] = {}
        for rows, logits in teacher.parts:
            parts = self.kd(rows_of(student.projection, rows), logits, batch.labels[rows], num_items=items)
            assert isinstance(parts, KDParts)
            found = {name: found[name] + value if found else value for name, value in parts._asdict().items()}
        return found


class RouterTerm(Term):
    """The load-balancing loss of a mixture of experts (Fedus et al. 2021), as the student computes it.

    Args:
        weight: the student's `router_aux_loss_coef` where it is None.
        student: its configuration.

    Raises ValueError for a student that does not ask for it with `output_router_logits`, or has no weight for it.
    """

    def __init__(self, student: nn.Module, weight: float | Course | None = None) -> None:
        config = text_config(student)
        if not asks_for_router_loss(student):
            raise ValueError("the student has no output_router_logits=True, so it computes no loss of its router")
        weight = getattr(config, "router_aux_loss_coef", None) if weight is None else weight
        if weight is None:
            raise ValueError(
                f"{type(student).__name__} has output_router_logits=True, but no router_aux_loss_coef to weigh the "
                "router's loss with: give RouterTerm a weight, or set output_router_logits=False"
            )
        super().__init__("router", weight)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over the step's batches, by their tokens."""
        found = student.fields.get("aux_loss")
        if not isinstance(found, Tensor):
            raise ValueError(f"{type(student.model).__name__} returns no aux_loss: take output_router_logits away")
        return batch.part(found)


def asks_for_router_loss(model: nn.Module) -> bool:
    """Whether a model's own loss has a term for its router."""
    return bool(getattr(text_config(model), "output_router_logits", False))
