"""The loss kernel beside a teacher of which each row keeps K tokens (`rows.SparseRows`). One program per row.

Student and teacher are K + 1 categories: the K tokens and the rest, all other columns as one.

1. statistics: maximum and sums of exponentials of the rest. The tokens that are kept are excluded from it, so the rest
   is summed from its own columns and never taken as 1 minus the others.
2. categories: the divergence's terms and slopes, in registers.
3. gradient, if wanted: the rest's slope is spread over its columns in proportion to their probabilities; then the K
   columns are written over what the sweep wrote there.

The student is loaded twice and the gradient stored once. In tiles as in `dense`; the K logits are kept between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import clear_tail
from fastkd.kernels.gpu.divergences import Divergence
from fastkd.kernels.gpu.elementary import exp, weighted
from fastkd.kernels.gpu.frame import Launch, hard_term, label_of, place_of, scales_of, skip_row
from fastkd.kernels.gpu.lanes import finite
from fastkd.kernels.gpu.launch import Block, launch_options
from fastkd.kernels.gpu.mode import Mode
from fastkd.kernels.gpu.points import gap_of, hard_exp, with_ratio
from fastkd.kernels.gpu.rest import Excluded, RestFactors, merged_rest, rest_gradient, rest_of, write_rest_gradient
from fastkd.kernels.gpu.state import load_rest, store_rest


class Kept(NamedTuple):
    """A `rows.SparseRows`, [rows, width] and [rows], `picked` being memory for the student's logits."""

    ids: Any
    logprobs: Any
    rest: Any
    offset: Any
    picked: Any
    width: int  # K


NOWHERE = tl.constexpr(1 << 62)  # an id behind every column


@triton.jit
def _category(log_q, log_p, q):
    """A category's p, q, log p, log q and d, from logarithms in float64: near a match only d counts."""
    nowhere = tl.maximum(log_q, log_p) == float("-inf")
    d = tl.where(nowhere, 0.0, log_q - log_p).to(tl.float32)
    log_q = tl.where(nowhere, 0.0, log_q).to(tl.float32)
    p = exp(log_p.to(tl.float32))
    log_p = tl.where(nowhere, 0.0, log_p).to(tl.float32)
    # As `sweeps.normalisers_of`: a NaN in one shows in the other.
    p = tl.where(q == q, p, q)
    q = tl.where(p == p, q, p)
    return p, q, log_p, log_q, d


@triton.jit
def sparse_kernel(launch, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """A `frame.Launch` with `Kept` as its teacher."""
    index = tl.program_id(0)
    kept = launch.teacher
    numbers = launch.numbers
    scales = scales_of(launch, index, MODE)
    place = place_of(launch, index, MODE, BLOCK)
    if (scales.soft == 0) & (scales.hard == 0):
        skip_row(launch, index, place, BLOCK)
        return

    first = 0
    if MODE.stage != "whole":
        first = launch.tile.first
    # Everything that is read of single columns, before the gradient, which may overwrite the logits.
    entries = tl.arange(0, MODE.entries)
    row_start = index.to(tl.int64) * kept.width
    ids = tl.load(kept.ids + row_start + entries, entries < kept.width, other=NOWHERE)
    present = ids < launch.vocab_size
    here = present & (ids >= first) & (ids < first + place.width)
    kept_logits = tl.load(place.student.columns + (ids - first), here, other=float("-inf")).to(tl.float32)
    if MODE.stage != "whole":
        picked = kept.picked + row_start + entries
        before = tl.load(picked, present & ~here & ((ids < first) | (MODE.stage == "gradient")), other=float("-inf"))
        kept_logits = tl.where(here, kept_logits, before)
        if MODE.stage == "statistics":
            tl.store(picked, kept_logits, here)
    label_logit = 0.0
    if MODE.hard:
        label = label_of(launch, index, place.width, scales.hard_on, MODE)
        label_logit = tl.load(place.student.columns + label.column, label.here, other=0.0).to(tl.float32)

    if MODE.stage == "gradient":
        rest, label_logit = load_rest(launch.tile, index, MODE)
    else:
        excluded = Excluded(kept.ids + row_start, ids, first + place.span.head)
        rest = rest_of(place.student.vectors, place.span, excluded, kept.width, numbers, MODE, BLOCK)
    if MODE.stage == "statistics":
        rest_before, label_logit_before = load_rest(launch.tile, index, MODE)
        rest = merged_rest(rest_before, rest, numbers, MODE)
        if MODE.hard:
            label_logit = tl.where(label.here, label_logit, label_logit_before)
        store_rest(launch.tile, index, rest, label_logit)

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
    gap = gap_of(p, q, d, True)
    gap_rest = gap_of(p_rest, q_rest, d_rest, True)
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
    soft = tl.where(scales.soft_on, soft, 0.0)
    tl.store(launch.soft_values + index, soft)

    hard = 0.0
    hard_factor = 0.0
    if MODE.hard:
        rest_hard = hard_exp(down, rest_decay, MODE)
        hard_sum = tl.sum(hard_exp(z, soft_exp, MODE), 0) + rest.hard_sum * rest_hard
        hard, hard_factor = hard_term(hard_sum, label_logit, top, label, scales, numbers)
    tl.store(launch.hard_values + index, hard)

    if launch.grad is not None:
        soft_factor = tl.where(soft != soft, soft, numbers.soft_weight * scales.soft)
        # Relative to the rest's own maximum, at which its exponentials do not underflow, however little it holds.
        by_soft = tl.where(rest.soft_sum == 0, 0.0, slope_rest / rest.soft_sum) * soft_factor
        by_soft = tl.where(scales.soft_on, by_soft, 0.0)
        by_hard = 0.0
        if MODE.hard:
            by_hard = hard_factor * rest_hard
        factors = RestFactors(by_soft, by_hard)
        rest_top = finite(rest.max)
        if MODE.stage == "gradient":
            tl.debug_barrier()  # every thread has read the kept tokens' logits, which in place another overwrites
        write_rest_gradient(
            place.grad.vectors, place.student.vectors, place.span, rest_top, factors, numbers, MODE, BLOCK
        )
        clear_tail(place.grad.columns, place.width, launch.grad_columns, BLOCK)
        gradient = tl.where(scales.soft_on, slope * soft_factor, 0.0)
        if MODE.hard:
            gradient += hard_exp(z, soft_exp, MODE) * hard_factor
            gradient -= tl.where(ids == label.id, numbers.hard_weight * scales.hard, 0.0)
        tl.debug_barrier()  # other threads wrote these columns in the sweep
        tl.store(place.grad.columns + (ids - first), gradient, here)
        if MODE.hard:
            unkept = tl.sum((ids == label.id).to(tl.int32), 0) == 0
            label_gradient = rest_gradient(label_logit - rest_top, factors, numbers, MODE)
            label_gradient -= numbers.hard_weight * scales.hard
            tl.store(place.grad.columns + label.column, label_gradient, label.here & unkept)


def run_sparse(launch: Launch, divergence: Divergence, mode: Mode, block: Block) -> None:
    """Launch one program per row."""
    rows = launch.soft_values.numel()
    sparse_kernel[(rows,)](launch, divergence.term, divergence.slope, mode, block, **launch_options(block))
