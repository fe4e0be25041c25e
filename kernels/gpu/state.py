"""What is known of a row between its vocabulary tiles, where logits are computed for one tile at a time.

fp32 `[rows, FIELDS]`, read and written by the row's program. The sums of a tile are merged into those of the tiles
before it as the sums of a row's threads are merged: moved to common maxima. That rounds once per tile and not once per
thread, so student_sum − teacher_sum, on which all rests between nearly equal rows, is moved and carried on its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.divergences import expm1
from fastkd.kernels.gpu.sweeps import Statistics, max_gap_of, moved, tempered_gap


class VocabularyTile(NamedTuple):
    """A `backend.Tile` as the kernel takes it: columns [first, first + width)."""

    state: Any
    first: int
    width: int


class State(NamedTuple):
    """A row's state."""

    statistics: Any
    label_logit: Any  # the student's, once its tile was met
    term_sum: Any
    slope_sum: Any


_STATISTICS = len(Statistics._fields)
LABEL_LOGIT = tl.constexpr(_STATISTICS)
TERM_SUM = tl.constexpr(_STATISTICS + 1)
SLOPE_SUM = tl.constexpr(_STATISTICS + 2)
FIELDS = tl.constexpr(_STATISTICS + 3)


def tile_state(rows: int, device: torch.device) -> Tensor:
    """Uninitialised memory for `backend.Tile.state`."""
    return torch.empty(rows, FIELDS.value, dtype=torch.float32, device=device)


@triton.jit
def row_state(tile, row):
    """Pointer to a row's fields; `sparse` has its own meaning for the first few."""
    return tile.state + row.to(tl.int64) * FIELDS


@triton.jit
def load_state(tile, row, MODE: tl.constexpr):
    """A row's state; what the first tile of a stage finds is that of no column."""
    state = row_state(tile, row)
    measured = tile.first > 0
    summed = tile.first > 0
    if MODE.stage != "statistics":
        measured = True
    if MODE.stage == "gradient":
        summed = True
    lowest = float("-inf")
    statistics = Statistics(
        tl.load(state, measured, other=lowest),
        tl.load(state + 1, measured, other=lowest),
        tl.load(state + 2, measured, other=lowest),
        tl.load(state + 3, measured, other=0.0),
        tl.load(state + 4, measured, other=0.0),
        tl.load(state + 5, measured, other=0.0),
        tl.load(state + 6, measured, other=0.0),
        tl.load(state + 7, measured, other=0.0),
        tl.load(state + 8, measured, other=0.0),
        tl.load(state + 9, measured, other=0.0),
    )
    return State(
        statistics,
        tl.load(state + LABEL_LOGIT, measured, other=0.0),
        tl.load(state + TERM_SUM, summed, other=0.0),
        tl.load(state + SLOPE_SUM, summed, other=0.0),
    )


@triton.jit
def store_statistics(tile, row, statistics, label_logit):
    """Keep what the statistics stage learned."""
    state = row_state(tile, row)
    tl.debug_barrier()  # every thread has read what one overwrites
    tl.store(state, statistics.student_max)
    tl.store(state + 1, statistics.teacher_max)
    tl.store(state + 2, statistics.teacher_there)
    tl.store(state + 3, statistics.student_sum)
    tl.store(state + 4, statistics.teacher_sum)
    tl.store(state + 5, statistics.sum_gap)
    tl.store(state + 6, statistics.hard_sum)
    tl.store(state + 7, statistics.forward)
    tl.store(state + 8, statistics.reverse)
    tl.store(state + 9, statistics.square)
    tl.store(state + LABEL_LOGIT, label_logit)


@triton.jit
def store_terms(tile, row, term_sum, slope_sum):
    """Keep what the terms stage learned."""
    state = row_state(tile, row)
    tl.debug_barrier()  # every thread has read what one overwrites
    tl.store(state + TERM_SUM, term_sum)
    tl.store(state + SLOPE_SUM, slope_sum)


@triton.jit
def _moved_sum_gap(old, new, numbers, MODE: tl.constexpr):
    """student_sum − teacher_sum of `new`, which is `old` moved to other maxima."""
    if MODE.same_temperature:
        old_gap, old_lost = max_gap_of(old)
        new_gap, new_lost = max_gap_of(new)
        difference = ((old_gap - new_gap) + (old_lost - new_lost)) * numbers.student_inverse
    else:
        difference = tempered_gap(old.student_max - new.student_max, old.teacher_max - new.teacher_max, numbers, MODE)
    student_decay = tl.exp2((old.student_max - new.student_max) * numbers.student_scale)
    # The decays' difference is the teacher's times expm1; where it is large, or the rows were −inf, nothing cancels.
    near = old.sum_gap * student_decay + new.teacher_sum * expm1(difference)
    return tl.where(tl.abs(difference) < 0.3, near, new.student_sum - new.teacher_sum)


@triton.jit
def merged(before, here, numbers, MODE: tl.constexpr):
    """`Statistics` of the columns of both."""
    student_max = tl.maximum(before.student_max, here.student_max)
    teacher_max = tl.maximum(before.teacher_max, here.teacher_max)
    there = tl.maximum(
        tl.where(before.student_max == student_max, before.teacher_there, float("-inf")),
        tl.where(here.student_max == student_max, here.teacher_there, float("-inf")),
    )
    a = moved(before, student_max, teacher_max, there, numbers, MODE)
    b = moved(here, student_max, teacher_max, there, numbers, MODE)
    sum_gap = 0.0
    if MODE.soft == "closed" or MODE.soft == "normalised":
        sum_gap = _moved_sum_gap(before, a, numbers, MODE) + _moved_sum_gap(here, b, numbers, MODE)
    return Statistics(
        student_max,
        teacher_max,
        there,
        a.student_sum + b.student_sum,
        a.teacher_sum + b.teacher_sum,
        sum_gap,
        a.hard_sum + b.hard_sum,
        a.forward + b.forward,
        a.reverse + b.reverse,
        a.square + b.square,
    )
