"""A column's probabilities and what divergences are told of them, from its logits and the row's sums.

Device functions of one column or of blocks of them. `numbers` is a `launch.Numbers` and `MODE` a `mode.Mode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.divergences import probability_gap
from fastkd.kernels.gpu.elementary import LOG2E, exp, log_near_one
from fastkd.kernels.gpu.launch import Numbers


class Normalisers(NamedTuple):
    """What turns a row's logits into probabilities."""

    student_max: Any
    teacher_max: Any
    max_gap: Any  # student_max − teacher_max = max_gap + max_gap_lost
    max_gap_lost: Any
    student_log_sum: Any
    teacher_log_sum: Any
    log_sum_gap: Any
    student_share: Any  # 1 / student_sum
    teacher_share: Any


@triton.jit
def hard_exp(z, tempered, MODE: tl.constexpr):
    """e^z of the student, from `tempered` = e^(z/T) where T allows."""
    if MODE.hard_power == 1:
        return tempered
    elif MODE.hard_power == 2:
        return tempered * tempered
    else:
        return tl.exp2(z * LOG2E)


@triton.jit
def tempered_gap(s, t, numbers, MODE: tl.constexpr):
    """s/T − t/T of a student's and a teacher's logit, in units of 1/T where the temperatures are the same."""
    if MODE.same_temperature:
        return s - t
    else:
        return s * numbers.student_inverse - t * numbers.teacher_inverse


# --- normalisers ------------------------------------------------------------------------------------------------


@triton.jit
def _lost(x, y, difference):
    """What rounding took from `difference` = x − y (Knuth's two-sum): x − y = difference + lost."""
    back = difference - x
    lost = (x - (difference - back)) - (y + back)
    return tl.where(tl.abs(difference) < float("inf"), lost, 0.0)


@triton.jit
def max_gap_of(maxima):
    """The student's maximum minus the teacher's, and what rounding took from it."""
    gap = maxima.student - maxima.teacher
    return gap, _lost(maxima.student, maxima.teacher, gap)


@triton.jit
def normalisers_of(statistics):
    """`Normalisers` of a row from its `Statistics`."""
    max_gap, max_gap_lost = max_gap_of(statistics.maxima)
    # A NaN on either side is to make all of p and all of q NaN, for functors look at d through bounds that hide one.
    nothing = statistics.sum_gap - statistics.sum_gap
    return Normalisers(
        statistics.maxima.student,
        statistics.maxima.teacher,
        max_gap,
        max_gap_lost,
        tl.log(statistics.student_sum),
        tl.log(statistics.teacher_sum),
        log_near_one(
            statistics.student_sum / statistics.teacher_sum,
            statistics.sum_gap / statistics.teacher_sum,
        ),
        1 / statistics.student_sum + nothing,
        1 / statistics.teacher_sum + nothing,
    )


# --- points -----------------------------------------------------------------------------------------------------


@triton.jit
def raw_gap(s, t):
    return tl.where(tl.maximum(s, t) == float("-inf"), 0.0, s - t)


@triton.jit
def gap_of(p, q, d, FINE: tl.constexpr):
    """q − p."""
    if FINE:
        return probability_gap(p, q, d)
    else:
        return q - p


@triton.jit
def point(s, t, normalisers, numbers, MODE: tl.constexpr):
    """What a divergence's functions take first: p, q, gap, log p, log q, d.

    Where both logits are −inf, d is NaN or 0 and the logarithms are 0.
    """
    if MODE.soft == "raw":
        return 0.0, 0.0, 0.0, 0.0, 0.0, raw_gap(s, t)
    else:
        z = s - normalisers.student_max
        y = t - normalisers.teacher_max
        q = tl.exp2(z * numbers.student_scale) * normalisers.student_share
        p = tl.exp2(y * numbers.teacher_scale) * normalisers.teacher_share
        difference = tempered_gap(z, y, numbers, MODE)
        if MODE.same_temperature:
            if MODE.fine:
                # Between nearly equal rows z − y would be little more than the rounding of z and y.
                difference = s - t
                lost = _lost(s, t, difference) - normalisers.max_gap_lost
                difference = (difference - normalisers.max_gap) + lost
            difference *= numbers.student_inverse
        d = difference - normalisers.log_sum_gap
        nowhere = tl.maximum(s, t) == float("-inf")
        log_q = tl.where(nowhere, 0.0, z * numbers.student_inverse - normalisers.student_log_sum)
        log_p = tl.where(nowhere, 0.0, y * numbers.teacher_inverse - normalisers.teacher_log_sum)
        return p, q, gap_of(p, q, d, MODE.fine), log_p, log_q, d


@triton.jit
def with_ratio(numbers, top_d):
    """The numbers with b = e^top_d, clamped so that neither b nor 1 / b overflows."""
    return Numbers(
        numbers.student_inverse,
        numbers.teacher_inverse,
        numbers.student_scale,
        numbers.teacher_scale,
        numbers.soft_weight,
        numbers.hard_weight,
        numbers.a,
        exp(tl.minimum(tl.maximum(top_d, -60.0), 60.0)),
    )


@triton.jit
def about_top(maxima, normalisers, numbers, MODE: tl.constexpr):
    """The numbers of a row for a divergence that is `about_top`."""
    gap = tempered_gap(0.0, maxima.teacher_there - normalisers.teacher_max, numbers, MODE)
    if MODE.same_temperature:
        gap *= numbers.student_inverse
    return with_ratio(numbers, gap - normalisers.log_sum_gap)


@triton.jit
def slope_center(maxima, normalisers, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr):
    """slope / q at the student's likeliest token; 0 where that is infinite, as the divergence then is."""
    p, q, gap, log_p, log_q, d = point(maxima.student, maxima.teacher_there, normalisers, numbers, MODE)
    center = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b) / q
    return tl.where(tl.abs(center) < float("inf"), center, 0.0)
