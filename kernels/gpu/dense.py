"""The loss kernel for logits on both sides, or on the student's alone. One program per row.

Sweeps over a row, all loads of 16 bytes where the rows' addresses allow:

1. statistics: maxima and sums of exponentials of both rows, the cross-entropy's included, relative to a running
   maximum. The value and Σ slope of the Kullback-Leibler family follow from them, as does the squared difference.
2. terms, for the other divergences: Σ term and Σ slope, now that the probabilities are known.
3. gradient, if wanted: computed in fp32 and rounded once.

Each sweep loads student and teacher once: that is twice, or three times where sweep 2 is needed, and one time fewer
without a gradient. The gradient is stored once. What of this reaches DRAM depends on the cache: sweeps 2 and 3 begin at
the last column, where sweep 1 ended.

Where logits are computed for one vocabulary tile at a time, a launch makes one of the sweeps over one tile. What the
launches before it learned of the row is in `state`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import clear_tail, row_beside
from fastkd.kernels.gpu.divergences import Divergence
from fastkd.kernels.gpu.frame import Launch, hard_term, label_of, place_of, scales_of, skip_row
from fastkd.kernels.gpu.launch import Block, launch_options
from fastkd.kernels.gpu.mode import Mode
from fastkd.kernels.gpu.points import about_top, normalisers_of, slope_center
from fastkd.kernels.gpu.state import load_state, merged, store_statistics, store_terms
from fastkd.kernels.gpu.sweeps import (
    Logits,
    OneHot,
    closed_terms,
    factors_of,
    gradient_of,
    statistics_of,
    sum_terms,
    write_gradient,
)


@triton.jit
def dense_kernel(launch, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """A `frame.Launch` with `launch.Rows`, or nothing, as its teacher."""
    index = tl.program_id(0)
    numbers = launch.numbers
    scales = scales_of(launch, index, MODE)
    place = place_of(launch, index, MODE, BLOCK)
    teacher = place.student
    if launch.teacher is not None:
        teacher = row_beside(launch.teacher, index, place.span, MODE.teacher_aligned, BLOCK)
    logits = Logits(place.student.vectors, teacher.vectors, place.span, scales.soft_on)
    if (scales.soft == 0) & (scales.hard == 0):
        skip_row(launch, index, place, BLOCK)
        return

    if MODE.stage != "whole":
        before = load_state(launch.tile, index, MODE)
    label_logit = 0.0
    if MODE.hard:  # before the gradient, which may overwrite the logits
        label = label_of(launch, index, place.width, scales.hard_on, MODE)
        label_student = tl.load(place.student.columns + label.column, label.here, other=0.0).to(tl.float32)
        label_teacher = label_student
        if MODE.soft != "absent":
            there = label.here & scales.soft_on
            label_teacher = tl.load(teacher.columns + label.column, there, other=0.0).to(tl.float32)
        label_logit = label_student
        if MODE.stage != "whole":
            label_logit = tl.where(label.here, label_student, before.label_logit)

    if MODE.stage == "whole":
        statistics = statistics_of(logits, numbers, TERM, MODE, BLOCK)
    elif MODE.stage == "statistics":
        statistics = merged(before.statistics, statistics_of(logits, numbers, TERM, MODE, BLOCK), numbers, MODE)
        store_statistics(launch.tile, index, statistics, label_logit)
    else:
        statistics = before.statistics
    normalisers = normalisers_of(statistics)
    soft = 0.0
    slope_sum = 0.0
    center = 0.0
    if MODE.soft == "closed":
        soft, slope_sum = closed_terms(statistics, normalisers, numbers, TERM, MODE)
    if MODE.soft == "normalised" and MODE.stage != "statistics":
        if MODE.about_top:
            numbers = about_top(statistics.maxima, normalisers, numbers, MODE)
        center = slope_center(statistics.maxima, normalisers, numbers, SLOPE, MODE)
        if MODE.stage != "gradient":
            soft, slope_sum = sum_terms(logits, normalisers, center, numbers, TERM, SLOPE, MODE, BLOCK)
        if MODE.stage != "whole":
            soft += before.term_sum
            slope_sum += before.slope_sum
        if MODE.stage == "terms":
            store_terms(launch.tile, index, soft, slope_sum)
    if MODE.soft == "raw":
        soft = statistics.square / launch.vocab_size
    if MODE.soft != "absent":
        soft = tl.where(scales.soft_on, soft, 0.0)
    tl.store(launch.soft_values + index, soft)

    hard = 0.0
    hard_factor = 0.0
    one_hot = OneHot(0, 0.0)
    if MODE.hard:
        one_hot = OneHot(label.column, tl.where(label.here, numbers.hard_weight * scales.hard, 0.0))
        hard, hard_factor = hard_term(
            statistics.hard_sum, label_logit, statistics.maxima.student, label, scales, numbers
        )
    tl.store(launch.hard_values + index, hard)

    if launch.grad is not None:
        factors = factors_of(soft, slope_sum, center, hard_factor, scales, numbers)
        if MODE.hard and MODE.stage == "gradient":
            tl.debug_barrier()  # every thread has read the label's logit, which in place another overwrites
        write_gradient(place.grad.vectors, logits, one_hot, normalisers, factors, numbers, SLOPE, MODE, BLOCK)
        clear_tail(place.grad.columns, place.width, launch.grad_columns, BLOCK)
        if MODE.hard and not BLOCK.shared:
            # The label's −1, which in the sweep would cost every column a comparison.
            gradient = gradient_of(
                label_student, label_teacher, scales.soft_on, normalisers, factors, numbers, SLOPE, MODE
            )
            tl.debug_barrier()  # another thread wrote this column in the sweep
            tl.store(place.grad.columns + label.column, gradient - one_hot.share, label.here)


def run_sweeps(launch: Launch, divergence: Divergence, mode: Mode, block: Block) -> None:
    """Launch one program, or one cluster, per row."""
    rows = launch.soft_values.numel()
    dense_kernel[(rows,)](launch, divergence.term, divergence.slope, mode, block, **launch_options(block))
