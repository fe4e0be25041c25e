"""Terms: what KDTrainer's loss has beside the distillation loss. A term is one class.

    class ZLoss(Term):
        '''Keeps the normalisers of the student's rows near 1: mean of log²(Σ exp z).'''

        def forward(self, batch: Batch) -> Tensor:
            logits = batch.student.hidden @ batch.student.weight.T
            return batch.mean(logits.logsumexp(-1).square())

    trainer = KDTrainer(student, arguments, teacher=teacher, terms=[ZLoss("z_loss", weight=1e-4)], ...)

The trainer adds weight · value to the loss, logs the value under the term's name, trains the term's parameters with the
student's, and keeps them in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.sources import Teacher

__all__ = ["Batch", "Term", "Terms"]

_IGNORED = -100
#: What the trainer logs itself.
_TAKEN = (
    *("loss", "soft", "hard", "ratio", "temperature", "soft_weight", "tokens_per_second"),
    *("learning_rate", "grad_norm", "epoch", "step", "total_flos", "num_input_tokens_seen"),
)


@dataclass(frozen=True)
class Batch:
    """One batch, and what both models say of it."""

    #: Last hidden states `[batch, tokens, H]` and the output head. Gradients flow to both.
    student: fastkd.Projection
    #: A Projection of a live teacher; what a cache has kept of it; None where no soft loss is wanted.
    teacher: Teacher | None
    #: int64 `[batch, tokens]`; −100 is not to be learnt.
    labels: Tensor
    #: What else the models were given: `input_ids`, `attention_mask`, ...
    inputs: dict[str, Any]
    #: Predicted tokens of the whole optimizer step, of all devices and accumulated batches. None: those of this batch.
    num_items: Tensor | float | None

    def mean(self, values: Tensor) -> Tensor:
        """The batch's part of the step's mean over predicted tokens: a scalar.

        `values` `[batch, tokens]` are of the positions that predict: position t counts if the label at t + 1 does.
        The parts of all batches of an optimizer step add up to its mean, as the distillation loss' parts do.
        """
        counted = self.labels[:, 1:] != _IGNORED
        found = torch.where(counted, values[:, :-1], 0.0).sum()
        return found / (counted.sum().clamp(min=1) if self.num_items is None else self.num_items)


class Term(nn.Module):
    """An addend of the training loss: weight · `forward(batch)`. Subclass it and define `forward`.

    Args:
        name: what the value is logged as, of this term alone.
        weight: factor of the value in the loss, at least 0; at 0 the value is only logged. It may be changed between
            steps.

    Parameters and buffers of a term are its own: a module of the student may not be one of it.

    Raises ValueError for a name that the trainer logs itself, and for a weight that is negative or no number.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__()
        if not name or name in _TAKEN or name.startswith("eval_"):
            taken = ", ".join(_TAKEN)
            raise ValueError(f"a term cannot be named {name!r}: the trainer logs {taken} and eval_… itself")
        if not 0 <= weight < math.inf:
            raise ValueError(f"term {name!r} has weight {weight}; it must be a number of at least 0")
        self.name = name
        self.weight = weight

    def forward(self, batch: Batch) -> Tensor:
        """A scalar, differentiable in what the term is to change. `batch.mean` makes one of a value per token.

        It is this batch's part of the step's value: where gradients are accumulated, values of several batches are
        added. Raise ValueError where the batch has not what the term needs.
        """
        raise NotImplementedError


class Terms(nn.ModuleList):
    """The terms of one trainer. Calling it gives Σ weight · value of a batch, and sums up the values for the logs.

    Raises TypeError for what is no Term, ValueError for two of one name and for a term with a module of the student.
    """

    def __init__(self, terms: Sequence[Term], student: nn.Module | None = None) -> None:
        wrong = next((term for term in terms if not isinstance(term, Term)), None)
        if wrong is not None:
            raise TypeError(f"terms must be of fastkd.training.terms.Term, got {type(wrong).__name__}")
        names = [term.name for term in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two terms are named {', '.join(twice)}: what is logged would be of both")
        students = {id(weight) for weight in student.parameters()} if student is not None else set()
        for term in terms:
            if any(id(weight) in students for weight in term.parameters()):
                raise ValueError(f"term {term.name!r} holds parameters of the student, which would be trained twice")
        super().__init__(terms)
        self._terms = tuple(terms)
        self.calls = 0
        self._sums: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return [term.name for term in self._terms]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that require gradients."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    def forward(self, batch: Batch) -> Tensor:
        """Scalar. Raises TypeError or ValueError, by the term's name, for a value that is none or changes nothing."""
        self.calls += 1
        values = {term.name: _value(term, batch) for term in self._terms}
        sums = torch.stack([value.detach().float() for value in values.values()])
        self._sums = sums if self._sums is None else self._sums + sums
        parts = [term.weight * values[term.name] for term in self._terms if term.weight]
        return sum(parts, torch.zeros_like(sums[0]))

    def take_sums(self) -> dict[str, Tensor]:
        """Name → the values added up since the last time; nothing where there are none."""
        sums, self._sums = self._sums, None
        return {} if sums is None else {term.name: value for term, value in zip(self._terms, sums, strict=True)}

    def kept(self) -> dict[str, Any]:
        """Name → state of each term that has any, for a checkpoint."""
        return {term.name: state for term in self._terms if (state := term.state_dict())}

    def restore(self, kept: dict[str, Any], where: str) -> None:
        """What `kept` gave. Raises ValueError, which quotes `where`, for other terms."""
        ours = self.kept()
        if ours.keys() != kept.keys():
            raise ValueError(f"{where} has parameters of the terms {sorted(kept)}, but the trainer has {sorted(ours)}")
        for term in self._terms:
            if term.name in kept:
                term.load_state_dict(kept[term.name])


def _value(term: Term, batch: Batch) -> Tensor:
    value = term(batch)
    if not isinstance(value, Tensor) or value.dim() != 0:
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"term {term.name!r} must return a scalar tensor, got {shown}; batch.mean makes one")
    if term.weight and torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(
            f"term {term.name!r} has weight {term.weight}, but its value has no gradient, so it would change nothing: "
            "compute it from batch.student with differentiable operations, or give it weight 0 to log it"
        )
    return value
