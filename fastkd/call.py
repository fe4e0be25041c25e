"""The arguments of the loss operators: one order, for the schema, the fakes and the implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backend import RowSpec
from fastkd.sources import Projection, Source

__all__ = ["SCHEMA", "Call", "source_arguments"]

#: What follows `Tensor student`: the other fields of `Call`, in their order.
SCHEMA = (
    "Tensor? student_weight, Tensor? student_bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? labels, Tensor? soft_scale, Tensor? hard_scale, float[] student_head, float[] teacher_head, "
    "str divergence, float[] parameters, float temperature, float teacher_temperature, float soft_weight, "
    "float hard_weight, int vocab_size, ScalarType? autocast, int? memory_budget"
)


class Call(NamedTuple):
    """The arguments of the loss operators, in the order of the schema.

    A source is logits, or hidden states with a weight; `*_head` then holds its softcap (0: none) and logit scale.
    """

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    soft_scale: Tensor | None
    hard_scale: Tensor | None
    student_head: Sequence[float]
    teacher_head: Sequence[float]
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

    def student_source(self) -> Source:
        return _source(self.student, self.student_weight, self.student_bias, self.student_head)

    def teacher_source(self) -> Source | None:
        if self.teacher is None:
            return None
        return _source(self.teacher, self.teacher_weight, self.teacher_bias, self.teacher_head)


def _source(tensor: Tensor, weight: Tensor | None, bias: Tensor | None, head: Sequence[float]) -> Source:
    if weight is None:
        return tensor
    softcap, logit_scale = head
    return Projection(tensor, weight, bias, softcap or None, logit_scale)


def source_arguments(source: Source | None) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], list[float]]:
    """(tensor, weight, bias) and head numbers of a source, as the operators take them."""
    if not isinstance(source, Projection):
        return (source, None, None), []
    return (source.hidden, source.weight, source.bias), [float(source.softcap or 0), float(source.logit_scale)]
