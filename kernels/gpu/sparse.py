"""A loss and its gradient beside a teacher of which each row keeps K tokens (`backend.SparseRows`), a program per row.

Student and teacher are K + 1 categories: the K tokens and the rest, all other columns as one.

1. statistics: maximum and sums of exponentials of the rest. Tokens that are kept are read as −inf, so that the rest is
   never 1 less the others: ids ascend, and a step compares its columns with the few that lie among them.
2. categories: the divergence's terms and slopes, in registers.
3. gradient, if wanted: the rest's slope is spread over its columns as their share of it; then the K columns are written
   over what the sweep made of them.

The student is loaded twice and the gradient stored once. In tiles as in `rows`; the K logits are kept between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.blocks import (
    Block,
    block_for,
    clear_row,
    clear_tail,
    co_aligned,
    device_of,
    edge_columns,
    finite,
    first_vector,
    lane_max,
    lane_sum,
    launch_options,
    load_logits,
    per_thread,
    row_offset,
    rows_of,
    span_of,
    steps_of,
    vector_columns,
)
from fastkd.kernels.gpu.divergences import DIVERGENCES, exp, weighted
from fastkd.kernels.gpu.numbers import Numbers, hard_power, numbers_for, with_ratio
from fastkd.kernels.gpu.state import VocabularyTile, row_state
from fastkd.kernels.gpu.sweeps import gap_of, hard_exp
from fastkd.rows import RowSpec, SparseRows, Tile


@dataclass(frozen=True)
class SparseMode:
    """What a kernel is compiled for. See `rows.Mode`."""

    stage: str
    closed: bool  # the divergence's TERM is a `close`
    about_top: bool
    hard: bool
    hard_power: int
    grad_aligned: bool


class Kept(NamedTuple):
    """The teacher's rows, [rows, width] and [rows], and memory for the student's logits."""

    ids: Any
    logprobs: Any
    rest: Any
    offset: Any
    picked: Any
    width: int


class Rest(NamedTuple):
    """Of the columns that are not kept, per thread and at last per row: relative to their maximum."""

    max: Any
    soft_sum: Any  # Σ e^(z/T)
    hard_sum: Any  # Σ e^z


class Hidden(NamedTuple):
    """A row's kept tokens as the sweep sees them."""

    ids: Any  # pointer to the first
    all: Any  # all of them, [K]
    origin: Any  # the row's column that the span's first vector begins with


NOWHERE = tl.constexpr(1 << 62)  # an id behind every column


# --- statistics -------------------------------------------------------------------------------------------------


@triton.jit
def _below(hidden, column):
    """How many ids lie before `column`, counted from the first vector."""
    return tl.sum((hidden.all < column + hidden.origin).to(tl.int32), 0)


@triton.jit
def _moved(old, to, numbers, MODE: tl.constexpr):
    shift = old.max - finite(to)
    decay = tl.exp2(shift * numbers.student_scale)
    hard_sum = old.hard_sum
    if MODE.hard:
        hard_sum *= hard_exp(shift, decay, MODE)
    return Rest(to, old.soft_sum * decay, hard_sum)


@triton.jit
def _observe(old, student, at, hidden, start, stop, numbers, MODE: tl.constexpr):
    """`Rest` after one more step, among whose columns are the ids from `start` to `stop`."""
    columns, present = at
    s = load_logits(student, columns, present, "evict_last")
    for entry in range(start, stop):
        s = tl.where(columns == (tl.load(hidden.ids + entry) - hidden.origin).to(tl.int32), float("-inf"), s)
    new = _moved(old, tl.maximum(old.max, lane_max(s)), numbers, MODE)
    z = s - finite(new.max)[None, :, None]
    soft_exp = tl.exp2(z * numbers.student_scale)
    hard_sum = new.hard_sum
    if MODE.hard:
        hard_sum += lane_sum(hard_exp(z, soft_exp, MODE))
    return Rest(new.max, new.soft_sum + lane_sum(soft_exp), hard_sum)


@triton.jit
def _pair_of_totals(a, b, c, d):
    return a + c, b + d


@triton.jit
def _rest_of(student, span, hidden, entries, numbers, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sweep 1, first column to last."""
    none = per_thread(BLOCK)
    rest = Rest(none - float("inf"), none, none)
    if BLOCK.edges:
        rest = _observe(rest, student, edge_columns(span, BLOCK), hidden, 0, entries, numbers, MODE)
    STEP: tl.constexpr = BLOCK.vectors * BLOCK.threads * BLOCK.width
    start = _below(hidden, 0)
    for step in range(steps_of(span, BLOCK)):
        stop = _below(hidden, (step + 1) * STEP)
        rest = _observe(rest, student, vector_columns(step, span, BLOCK), hidden, start, stop, numbers, MODE)
        start = stop
    rest = _moved(rest, tl.max(rest.max, 0), numbers, MODE)
    soft_sum, hard_sum = tl.reduce((rest.soft_sum, rest.hard_sum), 0, _pair_of_totals)
    return Rest(rest.max, soft_sum, hard_sum)


@triton.jit
def _both(a, b, numbers, MODE: tl.constexpr):
    """`Rest` of the columns of both."""
    to = tl.maximum(a.max, b.max)
    a = _moved(a, to, numbers, MODE)
    b = _moved(b, to, numbers, MODE)
    return Rest(to, a.soft_sum + b.soft_sum, a.hard_sum + b.hard_sum)


# --- categories -------------------------------------------------------------------------------------------------


@triton.jit
def _category(log_q, log_p, q):
    """A category's p, q, log p, log q and d, from logarithms in float64: near a match only d counts."""
    nowhere = tl.maximum(log_q, log_p) == float("-inf")
    d = tl.where(nowhere, 0.0, log_q - log_p).to(tl.float32)
    log_q = tl.where(nowhere, 0.0, log_q).to(tl.float32)
    p = exp(log_p.to(tl.float32))
    log_p = tl.where(nowhere, 0.0, log_p).to(tl.float32)
    return p, q, log_p, log_q, d


# --- gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def _gradient_of(z, by_soft, by_hard, numbers, MODE: tl.constexpr):
    """Of a column of the rest, z relative to its maximum."""
    soft_exp = tl.exp2(z * numbers.student_scale)
    gradient = soft_exp * by_soft
    if MODE.hard:
        gradient += hard_exp(z, soft_exp, MODE) * by_hard
    return gradient


@triton.jit
def _write_step(grad, student, at, top, by_soft, by_hard, numbers, MODE: tl.constexpr):
    columns, present = at
    z = load_logits(student, columns, present, "evict_first") - top
    tl.store(grad + columns, _gradient_of(z, by_soft, by_hard, numbers, MODE), present, eviction_policy="evict_first")


@triton.jit
def _kernel(
    student_rows,
    kept,
    grad_rows,
    labels,
    soft_scale,
    hard_scale,
    soft_values,
    hard_values,
    numbers,
    vocab_size,
    tile,
    grad_columns,
    TERM: tl.constexpr,
    SLOPE: tl.constexpr,
    MODE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    soft_by = tl.load(soft_scale + index)
    hard_by = 0.0
    if MODE.hard:
        hard_by = tl.load(hard_scale + index)
    soft_on = soft_by != 0
    hard_on = hard_by != 0
    width = vocab_size
    first = 0
    if MODE.stage != "whole":
        width = tile.width
        first = tile.first

    student_offset = row_offset(student_rows, index)
    span = span_of(student_rows.pointer, student_offset, width, BLOCK)
    student = student_rows.pointer + student_offset
    vectors = first_vector(student_rows.pointer, student_offset, span, True, BLOCK)
    if grad_rows is not None:
        grad_offset = row_offset(grad_rows, index)
        grad = grad_rows.pointer + grad_offset
        grad_vectors = first_vector(grad_rows.pointer, grad_offset, span, MODE.grad_aligned, BLOCK)

    if (soft_by == 0) & (hard_by == 0):
        tl.store(soft_values + index, 0.0)
        tl.store(hard_values + index, 0.0)
        if grad_rows is not None:
            clear_row(grad_vectors, span, BLOCK)
            clear_tail(grad, width, grad_columns, BLOCK)
        return

    # Everything that is read of single columns, before the gradient, which may overwrite the logits.
    entries = tl.arange(0, ENTRIES)
    row_start = index.to(tl.int64) * kept.width
    ids = tl.load(kept.ids + row_start + entries, entries < kept.width, other=NOWHERE)
    present = ids < vocab_size
    here = present & (ids >= first) & (ids < first + width)
    kept_logits = tl.load(student + (ids - first), here, other=float("-inf")).to(tl.float32)
    if MODE.stage != "whole":
        picked = kept.picked + row_start + entries
        before = tl.load(picked, present & ~here & ((ids < first) | (MODE.stage == "gradient")), other=float("-inf"))
        kept_logits = tl.where(here, kept_logits, before)
        if MODE.stage == "statistics":
            tl.store(picked, kept_logits, here)
    label_logit = 0.0
    if MODE.hard:
        label = tl.load(labels + index)
        labelled = (label >= 0) & (label < vocab_size) & hard_on
        label_here = labelled & (label >= first) & (label < first + width)
        label_logit = tl.load(student + (label - first), label_here, other=0.0).to(tl.float32)

    hidden = Hidden(kept.ids + row_start, ids, first + span.head)
    if MODE.stage == "gradient":
        state = row_state(tile, index)
        rest = Rest(tl.load(state), tl.load(state + 1), tl.load(state + 2))
        label_logit = tl.load(state + 3)
    else:
        rest = _rest_of(vectors, span, hidden, kept.width, numbers, MODE, BLOCK)
    if MODE.stage == "statistics":
        state = row_state(tile, index)
        met = first > 0
        lowest = float("-inf")
        before_it = Rest(
            tl.load(state, met, other=lowest),
            tl.load(state + 1, met, other=0.0),
            tl.load(state + 2, met, other=0.0),
        )
        rest = _both(before_it, rest, numbers, MODE)
        if MODE.hard:
            label_logit = tl.where(label_here, label_logit, tl.load(state + 3, met, other=0.0))
        tl.debug_barrier()  # every thread has read what one overwrites
        tl.store(state, rest.max)
        tl.store(state + 1, rest.soft_sum)
        tl.store(state + 2, rest.hard_sum)
        tl.store(state + 3, label_logit)

    top = finite(tl.maximum(rest.max, tl.max(kept_logits, 0)))
    z = kept_logits - top
    soft_exp = tl.exp2(z * numbers.student_scale)
    down = rest.max - top
    rest_decay = tl.exp2(down * numbers.student_scale)
    rest_sum = rest.soft_sum * rest_decay
    total = tl.sum(soft_exp, 0) + rest_sum
    log_total = tl.log(total).to(tl.float64)
    log_rest = tl.log(rest.soft_sum).to(tl.float64)
    log_q = z.to(tl.float64) * numbers.student_inverse - log_total
    log_q_rest = down.to(tl.float64) * numbers.student_inverse + (log_rest - log_total)
    lowest = float("-inf")
    log_p = tl.load(kept.logprobs + row_start + entries, present, other=lowest).to(tl.float64)
    log_p_rest = tl.load(kept.rest + index).to(tl.float64)
    p, q, log_p, log_q, d = _category(log_q, log_p, soft_exp / total)
    p_rest, q_rest, log_p_rest, log_q_rest, d_rest = _category(log_q_rest, log_p_rest, rest_sum / total)
    likeliest = tl.max(q, 0)
    if MODE.about_top:
        top_d = tl.max(tl.where(present & (q == likeliest), d, float("-inf")), 0)
        numbers = with_ratio(numbers, tl.where(q_rest > likeliest, d_rest, top_d))
    gap = gap_of(p, q, d, numbers, True, MODE)
    gap_rest = gap_of(p_rest, q_rest, d_rest, numbers, True, MODE)
    a = numbers.a
    b = numbers.b
    if MODE.closed:
        forward = -tl.sum(weighted(p, d), 0) - weighted(p_rest, d_rest)
        reverse = tl.sum(weighted(q, d), 0) + weighted(q_rest, d_rest)
        soft, _ = TERM(forward, reverse, a, b)
    else:
        terms = TERM(p, q, gap, log_p, log_q, d, a, b)
        soft = tl.sum(tl.where(present, terms, 0.0), 0) + TERM(
            p_rest, q_rest, gap_rest, log_p_rest, log_q_rest, d_rest, a, b
        )
    slope = tl.where(present, SLOPE(p, q, gap, log_p, log_q, d, a, b), 0.0)
    slope_rest = SLOPE(p_rest, q_rest, gap_rest, log_p_rest, log_q_rest, d_rest, a, b)
    # As `sweeps.slope_center`: the likeliest category's slope is to add nothing that would have to cancel.
    center = tl.max(tl.where(present & (q == likeliest), slope / q, float("-inf")), 0)
    center = tl.where(q_rest > likeliest, slope_rest / q_rest, center)
    center = tl.where(tl.abs(center) < float("inf"), center, 0.0)
    slope -= center * q
    slope_rest -= center * q_rest
    slope_sum = tl.sum(slope, 0) + slope_rest
    slope -= slope_sum * q
    slope_rest -= slope_sum * q_rest
    soft += tl.load(kept.offset + index)
    soft = tl.where(soft_on, soft, 0.0)
    tl.store(soft_values + index, soft)

    hard = 0.0
    hard_factor = 0.0
    if MODE.hard:
        rest_hard = hard_exp(down, rest_decay, MODE)
        hard_sum = tl.sum(hard_exp(z, soft_exp, MODE), 0) + rest.hard_sum * rest_hard
        hard = tl.log(hard_sum) - (label_logit - top)
        hard = tl.where(labelled, hard, tl.where(hard_on, float("nan"), 0.0))
        hard_factor = numbers.hard_weight * hard_by / hard_sum
        hard_factor = tl.where(labelled, hard_factor, tl.where(hard_on & (numbers.hard_weight != 0), float("nan"), 0.0))
    tl.store(hard_values + index, hard)

    if grad_rows is not None:
        soft_factor = tl.where(soft != soft, soft, numbers.soft_weight * soft_by)
        # Relative to the rest's own maximum, at which its exponentials do not underflow, however little it holds.
        by_soft = tl.where(rest.soft_sum == 0, 0.0, slope_rest / rest.soft_sum) * soft_factor
        by_soft = tl.where(soft_on, by_soft, 0.0)
        by_hard = 0.0
        if MODE.hard:
            by_hard = hard_factor * rest_hard
        rest_top = finite(rest.max)
        if MODE.stage == "gradient":
            tl.debug_barrier()  # every thread has read the kept tokens' logits, which in place another overwrites
        steps = steps_of(span, BLOCK)
        for step in range(steps):
            at = vector_columns(steps - 1 - step, span, BLOCK)
            _write_step(grad_vectors, vectors, at, rest_top, by_soft, by_hard, numbers, MODE)
        if BLOCK.edges:
            _write_step(grad_vectors, vectors, edge_columns(span, BLOCK), rest_top, by_soft, by_hard, numbers, MODE)
        clear_tail(grad, width, grad_columns, BLOCK)
        gradient = tl.where(soft_on, slope * soft_factor, 0.0)
        if MODE.hard:
            gradient += hard_exp(z, soft_exp, MODE) * hard_factor
            gradient -= tl.where(ids == label, numbers.hard_weight * hard_by, 0.0)
        tl.debug_barrier()  # other threads wrote these columns in the sweep
        tl.store(grad + (ids - first), gradient, here)
        if MODE.hard:
            unkept = tl.sum((ids == label).to(tl.int32), 0) == 0
            label_gradient = _gradient_of(label_logit - rest_top, by_soft, by_hard, numbers, MODE)
            tl.store(grad + (label - first), label_gradient - numbers.hard_weight * hard_by, label_here & unkept)


def kd_sparse_rows(
    student: Tensor,
    teacher: SparseRows,
    labels: Tensor | None,
    soft_scale: Tensor,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`rows.kd_rows` beside a teacher of which K tokens are known."""
    count = student[..., 0].numel()
    soft, hard = (torch.empty(count, dtype=torch.float32, device=student.device) for _ in range(2))
    if count == 0:
        return soft, hard
    divergence = DIVERGENCES[spec.divergence]
    width = spec.vocab_size if tile is None else student.shape[-1]
    block: Block = block_for([student] if grad is None else [student, grad], width)
    entries = teacher.ids.shape[-1]
    numbers: Numbers = numbers_for(spec, divergence)
    mode = SparseMode(
        stage="whole" if tile is None else tile.stage,
        closed=divergence.sweeps == "closed",
        about_top=divergence.about_top,
        hard=labels is not None,
        hard_power=hard_power(spec),
        grad_aligned=co_aligned(grad, student, block),
    )
    with device_of(student):
        _kernel[(count,)](
            rows_of(student),
            Kept(*teacher, entries),
            None if grad is None else rows_of(grad),
            labels,
            soft_scale,
            hard_scale,
            soft,
            hard,
            numbers,
            spec.vocab_size,
            None if tile is None else VocabularyTile(tile.state, tile.first, width),
            student.shape[-1] if grad is None else grad.shape[-1],
            divergence.term,
            divergence.slope,
            mode,
            triton.next_power_of_2(entries),
            block,
            **launch_options(block),
        )
    return soft, hard
