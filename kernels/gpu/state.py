"""What is known of a row between its vocabulary tiles, where logits are computed for one tile at a time.

fp32 `[rows, FIELDS]`, read and written by the row's program. The sums of a tile are merged into those of the tiles
before it as the sums of a row's threads are merged: moved to common maxima. That rounds once per tile and not once per
thread. So student_sum − teacher_sum, which decides everything between nearly equal rows, is moved and kept on its own.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.elementary import expm1
from fastkd.kernels.gpu.mixes import divergence_of
from fastkd.kernels.gpu.points import max_gap_of, tempered_gap
from fastkd.kernels.gpu.rest import Rest
from fastkd.kernels.gpu.sweeps import Maxima, Statistics, moved
from fastkd.rows import RowSpec, Stage, StateFields


class VocabularyTile(NamedTuple):
    """A `rows.Tile` as a kernel takes it: columns [first, first + width)."""

    state: Any
    first: int
    width: int
    origin: int = 0


class State(NamedTuple):
    """A row's state beside a dense teacher."""

    statistics: Any
    label_logit: Any  # the student's, once its tile was met
    term_sum: Any
    slope_sum: Any


# --- where each field stands ------------------------------------------------------------------------------------

_STUDENT_MAX = tl.constexpr(0)
_TEACHER_MAX = tl.constexpr(1)
_TEACHER_THERE = tl.constexpr(2)
_STUDENT_SUM = tl.constexpr(3)
_TEACHER_SUM = tl.constexpr(4)
_SUM_GAP = tl.constexpr(5)
_HARD_SUM = tl.constexpr(6)
_FORWARD = tl.constexpr(7)
_REVERSE = tl.constexpr(8)
_SQUARE = tl.constexpr(9)
_LABEL_LOGIT = tl.constexpr(10)
_TERM_SUM = tl.constexpr(11)
_SLOPE_SUM = tl.constexpr(12)
FIELDS = tl.constexpr(13)


def tile_state(rows: int, device: torch.device) -> Tensor:
    """Uninitialised memory for `rows.Tile.state`."""
    return torch.empty(rows, FIELDS.value, dtype=torch.float32, device=device)


def state_fields(
    state: Tensor, spec: RowSpec, teacher: Literal["absent", "dense", "sparse"], hard: bool, stage: Stage
) -> StateFields:
    """See `fastkd.backend.Backend.state_fields`."""
    divergence = divergence_of(spec.divergence)
    soft = "absent" if teacher == "absent" else divergence.sweeps
    found: dict[str, Any] = {}
    if stage == "terms":
        found = {"value": _TERM_SUM, "total_g": _SLOPE_SUM}
    elif teacher == "dense" and soft == "raw":
        found = {"value": _SQUARE}
    elif teacher == "dense":
        found = {"teacher_max": _TEACHER_MAX, "student": _STUDENT_SUM, "teacher": _TEACHER_SUM, "gap": _SUM_GAP}
        if soft == "normalised":
            found["top_teacher"] = _TEACHER_THERE
        if soft == "closed" and divergence.forward:
            found["forward"] = _FORWARD
        if soft == "closed" and divergence.reverse:
            found["reverse"] = _REVERSE
    elif teacher == "sparse":
        found = {"student": _STUDENT_SUM}
    if stage == "statistics" and hard:
        found |= {"hard": _HARD_SUM, "label_logit": _LABEL_LOGIT}
    if "student" in found or "hard" in found:
        found["student_max"] = _STUDENT_MAX
    same = spec.temperature == spec.teacher_temperature
    units = (1.0, 1.0) if same else (1 / spec.temperature, 1 / spec.teacher_temperature)
    return StateFields({name: state[:, index.value] for name, index in found.items()}, units)


@triton.jit
def _fields(tile, index):
    """Pointer to a row's fields."""
    return tile.state + index.to(tl.int64) * FIELDS


# --- beside a dense teacher -------------------------------------------------------------------------------------


@triton.jit
def load_state(tile, index, MODE: tl.constexpr):
    """A row's state. The first tile of a stage finds the state of a row without columns."""
    fields = _fields(tile, index)
    measured = tile.first > tile.origin
    summed = tile.first > tile.origin
    if MODE.stage != "statistics":
        measured = True
    if MODE.stage == "gradient":
        summed = True
    lowest = float("-inf")
    maxima = Maxima(
        tl.load(fields + _STUDENT_MAX, measured, other=lowest),
        tl.load(fields + _TEACHER_MAX, measured, other=lowest),
        tl.load(fields + _TEACHER_THERE, measured, other=lowest),
    )
    statistics = Statistics(
        maxima,
        tl.load(fields + _STUDENT_SUM, measured, other=0.0),
        tl.load(fields + _TEACHER_SUM, measured, other=0.0),
        tl.load(fields + _SUM_GAP, measured, other=0.0),
        tl.load(fields + _HARD_SUM, measured, other=0.0),
        tl.load(fields + _FORWARD, measured, other=0.0),
        tl.load(fields + _REVERSE, measured, other=0.0),
        tl.load(fields + _SQUARE, measured, other=0.0),
    )
    return State(
        statistics,
        tl.load(fields + _LABEL_LOGIT, measured, other=0.0),
        tl.load(fields + _TERM_SUM, summed, other=0.0),
        tl.load(fields + _SLOPE_SUM, summed, other=0.0),
    )


@triton.jit
def store_statistics(tile, index, statistics, label_logit):
    """Keep what the statistics stage learned."""
    fields = _fields(tile, index)
    tl.debug_barrier()  # every thread has read what one overwrites
    tl.store(fields + _STUDENT_MAX, statistics.maxima.student)
    tl.store(fields + _TEACHER_MAX, statistics.maxima.teacher)
    tl.store(fields + _TEACHER_THERE, statistics.maxima.teacher_there)
    tl.store(fields + _STUDENT_SUM, statistics.student_sum)
    tl.store(fields + _TEACHER_SUM, statistics.teacher_sum)
    tl.store(fields + _SUM_GAP, statistics.sum_gap)
    tl.store(fields + _HARD_SUM, statistics.hard_sum)
    tl.store(fields + _FORWARD, statistics.forward)
    tl.store(fields + _REVERSE, statistics.reverse)
    tl.store(fields + _SQUARE, statistics.square)
    tl.store(fields + _LABEL_LOGIT, label_logit)


@triton.jit
def store_terms(tile, index, term_sum, slope_sum):
    """Keep what the terms stage learned."""
    fields = _fields(tile, index)
    tl.debug_barrier()  # every thread has read what one overwrites
    tl.store(fields + _TERM_SUM, term_sum)
    tl.store(fields + _SLOPE_SUM, slope_sum)


@triton.jit
def _moved_sum_gap(old, new, numbers, MODE: tl.constexpr):
    """student_sum − teacher_sum of `new`, which is `old` moved to other maxima."""
    if MODE.same_temperature:
        old_gap, old_lost = max_gap_of(old.maxima)
        new_gap, new_lost = max_gap_of(new.maxima)
        difference = ((old_gap - new_gap) + (old_lost - new_lost)) * numbers.student_inverse
    else:
        difference = tempered_gap(
            old.maxima.student - new.maxima.student, old.maxima.teacher - new.maxima.teacher, numbers, MODE
        )
    student_decay = tl.exp2((old.maxima.student - new.maxima.student) * numbers.student_scale)
    # The decays' difference is the teacher's times expm1; where it is large, or the rows were −inf, nothing cancels.
    near = old.sum_gap * student_decay + new.teacher_sum * expm1(difference)
    return tl.where(tl.abs(difference) < 0.3, near, new.student_sum - new.teacher_sum)


@triton.jit
def merged(before, here, numbers, MODE: tl.constexpr):
    """`Statistics` of the columns of both."""
    student_max = tl.maximum(before.maxima.student, here.maxima.student)
    teacher_max = tl.maximum(before.maxima.teacher, here.maxima.teacher)
    there = tl.maximum(
        tl.where(before.maxima.student == student_max, before.maxima.teacher_there, float("-inf")),
        tl.where(here.maxima.student == student_max, here.maxima.teacher_there, float("-inf")),
    )
    maxima = Maxima(student_max, teacher_max, there)
    a = moved(before, maxima, numbers, MODE)
    b = moved(here, maxima, numbers, MODE)
    sum_gap = 0.0
    if MODE.soft == "closed" or MODE.soft == "normalised":
        sum_gap = _moved_sum_gap(before, a, numbers, MODE) + _moved_sum_gap(here, b, numbers, MODE)
    return Statistics(
        maxima,
        a.student_sum + b.student_sum,
        a.teacher_sum + b.teacher_sum,
        sum_gap,
        a.hard_sum + b.hard_sum,
        a.forward + b.forward,
        a.reverse + b.reverse,
        a.square + b.square,
    )


@triton.jit
def merged_parts(parts, numbers, MODE: tl.constexpr):
    """`Statistics` of a row from those of its parts, [parts] each."""
    student_max = tl.max(parts.maxima.student, 0)
    there = tl.where(parts.maxima.student == student_max, parts.maxima.teacher_there, float("-inf"))
    maxima = Maxima(student_max, tl.max(parts.maxima.teacher, 0), tl.max(there, 0))
    new = moved(parts, maxima, numbers, MODE)
    sum_gap = 0.0
    if MODE.soft == "closed" or MODE.soft == "normalised":
        sum_gap = tl.sum(_moved_sum_gap(parts, new, numbers, MODE), 0)
    return Statistics(
        maxima,
        tl.sum(new.student_sum, 0),
        tl.sum(new.teacher_sum, 0),
        sum_gap,
        tl.sum(new.hard_sum, 0),
        tl.sum(new.forward, 0),
        tl.sum(new.reverse, 0),
        tl.sum(new.square, 0),
    )


# --- beside a sparse teacher ------------------------------------------------------------------------------------
# The student's fields alone, of the columns that are not kept.


@triton.jit
def load_rest(tile, index, MODE: tl.constexpr):
    """The row's `Rest` and its label's logit. The first tile of the statistics finds a rest without columns."""
    fields = _fields(tile, index)
    measured = tile.first > tile.origin
    if MODE.stage == "gradient":
        measured = True
    rest = Rest(
        tl.load(fields + _STUDENT_MAX, measured, other=float("-inf")),
        tl.load(fields + _STUDENT_SUM, measured, other=0.0),
        tl.load(fields + _HARD_SUM, measured, other=0.0),
    )
    return rest, tl.load(fields + _LABEL_LOGIT, measured, other=0.0)


@triton.jit
def store_rest(tile, index, rest, label_logit):
    """Keep what the statistics stage learned."""
    fields = _fields(tile, index)
    tl.debug_barrier()  # every thread has read what one overwrites
    tl.store(fields + _STUDENT_MAX, rest.max)
    tl.store(fields + _STUDENT_SUM, rest.soft_sum)
    tl.store(fields + _HARD_SUM, rest.hard_sum)
    tl.store(fields + _LABEL_LOGIT, label_logit)
