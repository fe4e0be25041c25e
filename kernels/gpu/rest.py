"""The student's columns that a sparse teacher does not keep, the rest: their statistics and their gradient.

Tokens that are kept are excluded from the rest, read as −inf. Their ids ascend, so a step compares its columns with the
few ids that lie among them. `numbers` is a `launch.Numbers` and `MODE` a `mode.SparseMode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import edge_columns, last_columns, load_logits, whole_columns, whole_steps
from fastkd.kernels.gpu.lanes import finite, lane_max, lane_sum, pair_sums, per_thread
from fastkd.kernels.gpu.points import hard_exp


class Rest(NamedTuple):
    """Statistics of the rest, per thread and at last per row. Sums are relative to the maximum."""

    max: Any
    soft_sum: Any  # Σ e^(z/T)
    hard_sum: Any  # Σ e^z


class Excluded(NamedTuple):
    """A row's kept tokens as the sweep sees them."""

    ids: Any  # pointer to the first
    all: Any  # all of them, [K]
    origin: Any  # the row's column that the span's first vector begins with


class RestFactors(NamedTuple):
    """What turns the rest's exponentials, relative to its own maximum, into the gradient."""

    soft: Any
    hard: Any


# --- statistics -------------------------------------------------------------------------------------------------


@triton.jit
def _below(excluded, column):
    """How many ids lie before `column`, counted from the first vector."""
    return tl.sum((excluded.all < column + excluded.origin).to(tl.int32), 0)


@triton.jit
def _moved(old, to, numbers, MODE: tl.constexpr):
    shift = old.max - finite(to)
    decay = tl.exp2(shift * numbers.student_scale)
    hard_sum = old.hard_sum
    if MODE.hard:
        hard_sum *= hard_exp(shift, decay, MODE)
    return Rest(to, old.soft_sum * decay, hard_sum)


@triton.jit
def _observe_edges(old, student, at, excluded, entries, numbers, MODE: tl.constexpr):
    """`Rest` with the row's edges, any of whose columns may be an id."""
    columns, present = at
    s = load_logits(student, columns, present, "evict_last")
    for entry in range(entries):
        s = tl.where(columns == (tl.load(excluded.ids + entry) - excluded.origin).to(tl.int32), float("-inf"), s)
    return _with(old, s, numbers, MODE)


@triton.jit
def _observe(old, student, at, step, excluded, start, stop, numbers, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """`Rest` after one more step, among whose columns are the ids from `start` to `stop`, and no others of them.

    An id sets a bit in the thread that holds its column. Comparing it with every column took as long as the sweep.
    """
    columns, present = at
    s = load_logits(student, columns, present, "evict_last")
    THREADS: tl.constexpr = BLOCK.threads
    thread = tl.arange(0, THREADS)
    bits = tl.zeros([THREADS], tl.int32)
    first = excluded.origin + step * BLOCK.vectors * BLOCK.threads * BLOCK.width
    for entry in range(start, stop):
        column = (tl.load(excluded.ids + entry) - first).to(tl.int32)
        vector = column // BLOCK.width
        bit = 1 << (vector // BLOCK.threads * BLOCK.width + column % BLOCK.width)
        bits = tl.where(thread == vector % BLOCK.threads, bits | bit, bits)
    lane = tl.arange(0, BLOCK.vectors)[:, None, None] * BLOCK.width + tl.arange(0, BLOCK.width)[None, None, :]
    s = tl.where(((bits[None, :, None] >> lane) & 1) != 0, float("-inf"), s)
    return _with(old, s, numbers, MODE)


@triton.jit
def _with(old, s, numbers, MODE: tl.constexpr):
    """`Rest` with a step's logits."""
    new = _moved(old, tl.maximum(old.max, lane_max(s)), numbers, MODE)
    z = s - finite(new.max)[None, :, None]
    soft_exp = tl.exp2(z * numbers.student_scale)
    hard_sum = new.hard_sum
    if MODE.hard:
        hard_sum += lane_sum(hard_exp(z, soft_exp, MODE))
    return Rest(new.max, new.soft_sum + lane_sum(soft_exp), hard_sum)


@triton.jit
def rest_of(student, span, excluded, entries, numbers, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sweep 1, first column to last; `student` points to the row's first vector."""
    none = per_thread(BLOCK)
    rest = Rest(none - float("inf"), none, none)
    if BLOCK.edges:
        rest = _observe_edges(rest, student, edge_columns(span, BLOCK), excluded, entries, numbers, MODE)
    STEP: tl.constexpr = BLOCK.vectors * BLOCK.threads * BLOCK.width
    start = _below(excluded, 0)
    steps = whole_steps(span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        stop = _below(excluded, (step + 1) * STEP)
        at = (whole_columns(step, BLOCK), None)
        rest = _observe(rest, student, at, step, excluded, start, stop, numbers, MODE, BLOCK)
        start = stop
    stop = _below(excluded, (steps + 1) * STEP)
    rest = _observe(rest, student, last_columns(span, BLOCK), steps, excluded, start, stop, numbers, MODE, BLOCK)
    rest = _moved(rest, tl.max(rest.max, 0), numbers, MODE)
    soft_sum, hard_sum = pair_sums(rest.soft_sum, rest.hard_sum)
    return Rest(rest.max, soft_sum, hard_sum)


@triton.jit
def merged_rest(before, here, numbers, MODE: tl.constexpr):
    """`Rest` of the columns of both."""
    to = tl.maximum(before.max, here.max)
    a = _moved(before, to, numbers, MODE)
    b = _moved(here, to, numbers, MODE)
    return Rest(to, a.soft_sum + b.soft_sum, a.hard_sum + b.hard_sum)


# --- gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def rest_gradient(z, factors, numbers, MODE: tl.constexpr):
    """Of a column of the rest, z relative to its maximum."""
    soft_exp = tl.exp2(z * numbers.student_scale)
    gradient = soft_exp * factors.soft
    if MODE.hard:
        gradient += hard_exp(z, soft_exp, MODE) * factors.hard
    return gradient


@triton.jit
def _write_step(grad, student, at, top, factors, numbers, MODE: tl.constexpr):
    columns, present = at
    z = load_logits(student, columns, present, "evict_first") - top
    tl.store(grad + columns, rest_gradient(z, factors, numbers, MODE), present, eviction_policy="evict_first")


@triton.jit
def write_rest_gradient(grad, student, span, top, factors, numbers, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """The last sweep, last column to first, as if every column belonged to the rest."""
    _write_step(grad, student, last_columns(span, BLOCK), top, factors, numbers, MODE)
    steps = whole_steps(span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        _write_step(grad, student, (whole_columns(steps - 1 - step, BLOCK), None), top, factors, numbers, MODE)
    if BLOCK.edges:
        _write_step(grad, student, edge_columns(span, BLOCK), top, factors, numbers, MODE)
