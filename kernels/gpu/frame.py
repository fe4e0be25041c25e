"""The frame of the two loss kernels, `dense` and `sparse`: their arguments, and what they do around their sweeps.

`launch` is a `Launch` and `MODE` a `mode.Mode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import clear_row, clear_tail, leading_row, row_beside


class Launch(NamedTuple):
    """What a loss kernel is given. Row scalars are fp32 `[rows]`."""

    student: Any  # `launch.Rows`
    teacher: Any  # `launch.Rows`, `sparse.Kept` or None
    grad: Any  # `launch.Rows` or None
    labels: Any
    soft_scale: Any
    hard_scale: Any
    soft_values: Any  # results
    hard_values: Any
    numbers: Any  # `launch.Numbers`
    vocab_size: int
    tile: Any  # `state.VocabularyTile` or None
    grad_columns: int  # of the gradient in memory; 0 is written from the row's last column on


class Scales(NamedTuple):
    """What a row's two terms are multiplied by; a term that is not `on` is not computed and reads 0."""

    soft: Any
    hard: Any
    soft_on: Any
    hard_on: Any


class Place(NamedTuple):
    """Where a program's row lies: of the vocabulary, or of a tile, `width` columns."""

    width: Any
    span: Any
    student: Any  # `blocks.Row`
    grad: Any  # likewise; without a gradient the student's


class Label(NamedTuple):
    """A row's label."""

    id: Any
    column: Any  # where the id is, counted from the row's first column in memory
    valid: Any  # an id of the vocabulary, and the hard term is on
    here: Any  # valid, and among the columns in memory


@triton.jit
def scales_of(launch, index, MODE: tl.constexpr):
    soft = 0.0
    hard = 0.0
    if launch.teacher is not None:
        soft = tl.load(launch.soft_scale + index)
    if MODE.hard:
        hard = tl.load(launch.hard_scale + index)
    return Scales(soft, hard, soft != 0, hard != 0)


@triton.jit
def place_of(launch, index, MODE: tl.constexpr, BLOCK: tl.constexpr):
    width = launch.vocab_size
    if MODE.stage != "whole":
        width = launch.tile.width
    student, span = leading_row(launch.student, index, width, BLOCK)
    grad = student
    if launch.grad is not None:
        grad = row_beside(launch.grad, index, span, MODE.grad_aligned, BLOCK)
    return Place(width, span, student, grad)


@triton.jit
def skip_row(launch, index, place, BLOCK: tl.constexpr):
    """Values and gradient of a row both of whose scales are 0."""
    tl.store(launch.soft_values + index, 0.0)
    tl.store(launch.hard_values + index, 0.0)
    if launch.grad is not None:
        clear_row(place.grad.vectors, place.span, BLOCK)
        clear_tail(place.grad.columns, place.width, launch.grad_columns, BLOCK)


@triton.jit
def label_of(launch, index, width, hard_on, MODE: tl.constexpr):
    id = tl.load(launch.labels + index)
    valid = (id >= 0) & (id < launch.vocab_size) & hard_on
    column = id
    here = valid
    if MODE.stage != "whole":
        column = id - launch.tile.first
        here = valid & (column >= 0) & (column < width)
    return Label(id, column, valid, here)


@triton.jit
def hard_term(hard_sum, label_logit, top, label, scales, numbers):
    """The cross-entropy, and what e^z is multiplied by in its gradient; `hard_sum` = Σ e^z, z = logit − `top`.

    NaN where the term is on and the label is no id of the vocabulary.
    """
    value = tl.log(hard_sum) - (label_logit - top)
    value = tl.where(label.valid, value, tl.where(scales.hard_on, float("nan"), 0.0))
    factor = numbers.hard_weight * scales.hard / hard_sum
    wrong = tl.where(scales.hard_on & (numbers.hard_weight != 0), float("nan"), 0.0)
    return value, tl.where(label.valid, factor, wrong)
