"""The arguments of the loss operators: one order, for the schema, the fakes and the implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastkd.backend import RowSpec
from fastkd.divergences import TABLE
from fastkd.sources import Projection, Source, SparseKind, SparseTargets, Teacher

__all__ = ["SCHEMA", "Call", "call_for"]

#: What follows `Tensor student`: the other fields of `Call`, in their order.
SCHEMA = (
    "Tensor? student_weight, Tensor? student_bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? sparse_ids, Tensor? sparse_logprobs, Tensor? sparse_rest, Tensor? sparse_entropy, "
    "Tensor? labels, Tensor? soft_scale, Tensor? hard_scale, "
    "float[] student_head, float[] teacher_head, str sparse_kind, "
    "str divergence, float[] parameters, float temperature, float teacher_temperature, float soft_weight, "
    "float hard_weight, int vocab_size, ScalarType? autocast, int? memory_budget"
)

#: The tensors that only one of the two terms reads.
_SOFT = (
    *("teacher", "teacher_weight", "teacher_bias"),
    *("sparse_ids", "sparse_logprobs", "sparse_rest", "sparse_entropy", "soft_scale"),
)
_HARD = ("labels", "hard_scale")


class Call(NamedTuple):
    """The arguments of the loss operators, in the order of the schema.

    A source is logits, or hidden states with a weight; `*_head` then holds its softcap (0: none) and logit scale. A
    teacher may be the parts of `SparseTargets` instead.
    """

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    sparse_ids: Tensor | None
    sparse_logprobs: Tensor | None
    sparse_rest: Tensor | None
    sparse_entropy: Tensor | None
    labels: Tensor | None
    soft_scale: Tensor | None
    hard_scale: Tensor | None
    student_head: Sequence[float]
    teacher_head: Sequence[float]
    sparse_kind: str
    divergence: str
    parameters: Sequence[float]
    temperature: float
    teacher_temperature: float
    soft_weight: float
    hard_weight: float
    vocab_size: int
    autocast: torch.dtype | None
    memory_budget: int | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The arguments that are tensors, which come first."""
        return self[: self._fields.index("student_head")]  # type: ignore[return-value]

    @property
    def spec(self) -> RowSpec:
        return RowSpec(
            self.divergence,
            tuple(self.parameters),
            self.temperature,
            self.teacher_temperature,
            self.soft_weight,
            self.hard_weight,
            self.vocab_size,
        )

    @property
    def on_logits(self) -> bool:
        """Whether neither side is a projection."""
        return self.student_weight is None and self.teacher_weight is None

    def split(self) -> tuple[Call | None, Call]:
        """A term of weight 0 that could spoil the gradient of the other, or None, and the call without it.

        Cross-entropy beside a divergence with a softmax cannot: it is NaN where that is, and where a label is no token,
        which raises or, on a GPU, counts for nothing at weight 0.
        """
        if self.soft_scale is not None and self.soft_weight == 0:
            return self._without(_HARD), self._without(_SOFT)
        if self.hard_scale is not None and self.hard_weight == 0 and not TABLE[self.divergence].tempered:
            return self._without(_SOFT), self._without(_HARD)
        return None, self

    def _without(self, term: tuple[str, ...]) -> Call:
        absent: dict[str, Any] = dict.fromkeys(term)
        return self._replace(**absent)

    def student_source(self) -> Source:
        return _source(self.student, self.student_weight, self.student_bias, self.student_head)

    def teacher_source(self) -> Teacher | None:
        if self.sparse_ids is not None and self.sparse_logprobs is not None:
            kind = cast(SparseKind, self.sparse_kind)
            parts = self.sparse_ids, self.sparse_logprobs, kind, self.teacher_temperature
            return SparseTargets(*parts, self.sparse_rest, self.sparse_entropy)
        if self.teacher is None:
            return None
        return _source(self.teacher, self.teacher_weight, self.teacher_bias, self.teacher_head)


def _source(tensor: Tensor, weight: Tensor | None, bias: Tensor | None, head: Sequence[float]) -> Source:
    if weight is None:
        return tensor
    softcap, logit_scale = head
    return Projection(tensor, weight, bias, softcap or None, logit_scale)


def call_for(
    student: Source,
    teacher: Teacher | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    autocast: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Call:
    """The arguments for these sources; labels and scales are `[rows]`."""
    sparse = teacher if isinstance(teacher, SparseTargets) else None
    student_tensors, student_head = _arguments(student)
    teacher_tensors, teacher_head = _arguments(None if isinstance(teacher, SparseTargets) else teacher)
    assert student_tensors[0] is not None
    return Call(
        student_tensors[0],
        *student_tensors[1:],
        *teacher_tensors,
        None if sparse is None else sparse.ids,
        None if sparse is None else sparse.logprobs,
        None if sparse is None else sparse.rest,
        None if sparse is None else sparse.entropy,
        labels,
        soft_scale,
        hard_scale,
        student_head,
        teacher_head,
        "" if sparse is None else sparse.kind,
        spec.divergence,
        spec.parameters,
        spec.temperature,
        spec.teacher_temperature,
        spec.soft_weight,
        spec.hard_weight,
        spec.vocab_size,
        autocast,
        memory_budget,
    )


def _arguments(source: Source | None) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], list[float]]:
    """(tensor, weight, bias) and head numbers of a source."""
    if not isinstance(source, Projection):
        return (source, None, None), []
    return (source.hidden, source.weight, source.bias), [float(source.softcap or 0), float(source.logit_scale)]
