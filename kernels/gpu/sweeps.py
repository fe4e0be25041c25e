"""The sweeps of `rows` over one row of student and teacher logits: device functions that know no divergence by name.

A sweep is a loop over blocks [vectors, threads, width] and one more step for the row's edges (see `blocks`). Sums are
kept per thread and merged once per row. `numbers` and `MODE` are `numbers.Numbers` and `rows.Mode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import (
    edge_columns,
    finite,
    lane_max,
    lane_sum,
    load_logits,
    per_thread,
    steps_of,
    vector_columns,
)
from fastkd.kernels.gpu.divergences import LOG2E, log_near_one, probability_gap
from fastkd.kernels.gpu.numbers import with_ratio


class Logits(NamedTuple):
    """A row's logits: pointers to the first vectors, and whether the teacher's may be read."""

    student: Any
    teacher: Any
    span: Any
    soft_on: Any


class Statistics(NamedTuple):
    """What sweep 1 keeps, per thread and at last per row. Logits z are relative to the maxima."""

    student_max: Any
    teacher_max: Any
    teacher_there: Any  # the teacher's logit where the student's maximum is
    student_sum: Any  # Σ e^(z_s/T)
    teacher_sum: Any  # Σ e^(z_t/T)
    sum_gap: Any  # student_sum − teacher_sum, to more digits; only of a row
    hard_sum: Any  # Σ e^(z_s)
    forward: Any  # Σ e^(z_t/T) (z_t/T − z_s/T), in units of 1/T where both temperatures are the same
    reverse: Any  # Σ e^(z_s/T) (z_s/T − z_t/T), likewise
    square: Any  # Σ term of a raw divergence


class Row(NamedTuple):
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


class Factors(NamedTuple):
    """What turns probabilities into the gradient.

    Slopes are taken less `center`·q, to which the gradient is blind: it makes the student's likeliest token add 0 to
    Σ slope. In a confident row that token's gradient would else be the rounding of slope − q·Σ slope.
    """

    center: Any
    slope_sum: Any
    soft: Any
    hard: Any


# --- statistics -------------------------------------------------------------------------------------------------


@triton.jit
def hard_exp(z, tempered, MODE: tl.constexpr):
    """e^z of the student, from e^(z/T) where T allows."""
    if MODE.hard_power == 1:
        return tempered
    elif MODE.hard_power == 2:
        return tempered * tempered
    else:
        return tl.exp2(z * LOG2E)


@triton.jit
def tempered_gap(s, t, numbers, MODE: tl.constexpr):
    """s/T − t/T of the student's and the teacher's numbers, in units of 1/T where the temperatures are the same."""
    if MODE.same_temperature:
        return s - t
    else:
        return s * numbers.student_inverse - t * numbers.teacher_inverse


@triton.jit
def moved(old, student_max, teacher_max, teacher_there, numbers, MODE: tl.constexpr):
    """The same sums relative to other maxima. What vanishes does so even where it was infinite."""
    student_shift = old.student_max - finite(student_max)
    student_decay = tl.exp2(student_shift * numbers.student_scale)
    student_sum = old.student_sum
    teacher_sum = old.teacher_sum
    hard_sum = old.hard_sum
    forward = old.forward
    reverse = old.reverse
    if MODE.hard:
        hard_sum *= hard_exp(student_shift, student_decay, MODE)
    if MODE.soft == "closed" or MODE.soft == "normalised":
        teacher_decay = tl.exp2((old.teacher_max - finite(teacher_max)) * numbers.teacher_scale)
        if MODE.soft == "closed":
            gap = tempered_gap(
                finite(old.student_max) - finite(student_max),
                finite(old.teacher_max) - finite(teacher_max),
                numbers,
                MODE,
            )
            forward = tl.where(teacher_decay == 0, 0.0, teacher_decay * (forward - teacher_sum * gap))
            reverse = tl.where(student_decay == 0, 0.0, student_decay * (reverse + student_sum * gap))
        student_sum *= student_decay
        teacher_sum *= teacher_decay
    return Statistics(
        student_max,
        teacher_max,
        teacher_there,
        student_sum,
        teacher_sum,
        old.sum_gap,
        hard_sum,
        forward,
        reverse,
        old.square,
    )


@triton.jit
def _observe(old, logits, at, numbers, TERM: tl.constexpr, MODE: tl.constexpr):
    """Statistics after one more step."""
    s, t = _load(logits, at, "evict_last", MODE)
    student_max = tl.maximum(old.student_max, lane_max(s))
    teacher_max = old.teacher_max
    teacher_there = old.teacher_there
    if MODE.soft == "closed" or MODE.soft == "normalised":
        teacher_max = tl.maximum(teacher_max, lane_max(t))
    if MODE.soft == "normalised":
        there = lane_max(tl.where(s == student_max[None, :, None], t, float("-inf")))
        teacher_there = tl.where(student_max > old.student_max, there, tl.maximum(teacher_there, there))
    new = moved(old, student_max, teacher_max, teacher_there, numbers, MODE)
    student_sum = new.student_sum
    teacher_sum = new.teacher_sum
    hard_sum = new.hard_sum
    forward = new.forward
    reverse = new.reverse
    square = new.square

    z = s - finite(student_max)[None, :, None]
    student_exp = tl.exp2(z * numbers.student_scale)
    if MODE.hard:
        hard_sum += lane_sum(hard_exp(z, student_exp, MODE))
    if MODE.soft == "closed" or MODE.soft == "normalised":
        y = t - finite(teacher_max)[None, :, None]
        teacher_exp = tl.exp2(y * numbers.teacher_scale)
        student_sum += lane_sum(student_exp)
        teacher_sum += lane_sum(teacher_exp)
        gap = tempered_gap(z, y, numbers, MODE)
        if MODE.forward:
            forward -= lane_sum(tl.where(teacher_exp == 0, 0.0, teacher_exp * gap))
        if MODE.reverse:
            reverse += lane_sum(tl.where(student_exp == 0, 0.0, student_exp * gap))
    if MODE.soft == "raw":
        square += lane_sum(TERM(0.0, 0.0, 0.0, 0.0, 0.0, raw_gap(s, t), numbers.a, numbers.b))
    return Statistics(
        student_max,
        teacher_max,
        teacher_there,
        student_sum,
        teacher_sum,
        old.sum_gap,
        hard_sum,
        forward,
        reverse,
        square,
    )


@triton.jit
def _load(logits, at, POLICY: tl.constexpr, MODE: tl.constexpr):
    """Student's and teacher's logits of a step, fp32; −inf where there is no column or the teacher is not wanted."""
    columns, present = at
    s = load_logits(logits.student, columns, present, POLICY)
    t = s
    if MODE.soft != "absent":
        t = load_logits(logits.teacher, columns, present & logits.soft_on, POLICY)
    return s, t


@triton.jit
def statistics_of(logits, numbers, TERM: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sweep 1, first column to last."""
    none = per_thread(BLOCK)
    lowest = none - float("inf")
    state = Statistics(lowest, lowest, lowest, none, none, none, none, none, none, none)
    if BLOCK.edges:
        state = _observe(state, logits, edge_columns(logits.span, BLOCK), numbers, TERM, MODE)
    for step in range(steps_of(logits.span, BLOCK)):
        state = _observe(state, logits, vector_columns(step, logits.span, BLOCK), numbers, TERM, MODE)

    student_max, teacher_max = tl.reduce((state.student_max, state.teacher_max), 0, _maxima)
    there = float("-inf")
    if MODE.soft == "normalised":
        there = tl.max(tl.where(state.student_max == student_max, state.teacher_there, there), 0)
    state = moved(state, student_max, teacher_max, there, numbers, MODE)
    # Between nearly equal rows the sums' difference is what counts, and most of their rounding is in their last bits.
    student_sum, teacher_sum, sum_gap, hard_sum, forward, reverse, square = tl.reduce(
        (
            state.student_sum,
            state.teacher_sum,
            state.student_sum - state.teacher_sum,
            state.hard_sum,
            state.forward,
            state.reverse,
            state.square,
        ),
        0,
        _totals,
    )
    return Statistics(
        student_max,
        teacher_max,
        there,
        student_sum,
        teacher_sum,
        sum_gap,
        hard_sum,
        forward,
        reverse,
        square,
    )


@triton.jit
def _maxima(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _totals(a, b, c, d, e, f, g, h, i, j, k, l, m, n):  # noqa: E741  (one reduction: a barrier each is dear)
    return a + h, b + i, c + j, d + k, e + l, f + m, g + n


@triton.jit
def _lost(x, y, difference):
    """What rounding took from `difference` = x − y (Knuth's two-sum): x − y = difference + lost."""
    back = difference - x
    lost = (x - (difference - back)) - (y + back)
    return tl.where(tl.abs(difference) < float("inf"), lost, 0.0)


@triton.jit
def max_gap_of(sums):
    """student_max − teacher_max, and what rounding took from it."""
    gap = sums.student_max - sums.teacher_max
    return gap, _lost(sums.student_max, sums.teacher_max, gap)


@triton.jit
def row_of(sums):
    """`Row` from its `Statistics`."""
    max_gap, max_gap_lost = max_gap_of(sums)
    return Row(
        sums.student_max,
        sums.teacher_max,
        max_gap,
        max_gap_lost,
        tl.log(sums.student_sum),
        tl.log(sums.teacher_sum),
        log_near_one(sums.student_sum / sums.teacher_sum, sums.sum_gap / sums.teacher_sum),
        1 / sums.student_sum,
        1 / sums.teacher_sum,
    )


# --- terms ------------------------------------------------------------------------------------------------------


@triton.jit
def raw_gap(s, t):
    return tl.where(tl.maximum(s, t) == float("-inf"), 0.0, s - t)


@triton.jit
def gap_of(p, q, d, numbers, FINE: tl.constexpr, MODE: tl.constexpr):
    """q − p or, for a divergence that is `about_top`, q − b·p, which is 0 at the student's likeliest token."""
    if MODE.about_top:
        p *= numbers.b
        d -= log_near_one(numbers.b, numbers.b - 1)
    if FINE or MODE.about_top:  # q − b·p is small where p and q are equal and their rows' sums are not
        return probability_gap(p, q, d)
    else:
        return q - p


@triton.jit
def point(s, t, row, numbers, MODE: tl.constexpr):
    """What a divergence's functions take first: p, q, gap, log p, log q, d; the last three 0 where both are −inf."""
    if MODE.soft == "raw":
        return 0.0, 0.0, 0.0, 0.0, 0.0, raw_gap(s, t)
    else:
        z = s - row.student_max
        y = t - row.teacher_max
        q = tl.exp2(z * numbers.student_scale) * row.student_share
        p = tl.exp2(y * numbers.teacher_scale) * row.teacher_share
        difference = tempered_gap(z, y, numbers, MODE)
        if MODE.same_temperature:
            if MODE.fine:
                # Between nearly equal rows z − y would be little more than the rounding of z and y.
                difference = s - t
                lost = _lost(s, t, difference) - row.max_gap_lost
                difference = (difference - row.max_gap) + lost
            difference *= numbers.student_inverse
        d = difference - row.log_sum_gap
        nowhere = tl.maximum(s, t) == float("-inf")
        d = tl.where(nowhere, 0.0, d)
        log_q = tl.where(nowhere, 0.0, z * numbers.student_inverse - row.student_log_sum)
        log_p = tl.where(nowhere, 0.0, y * numbers.teacher_inverse - row.teacher_log_sum)
        return p, q, gap_of(p, q, d, numbers, MODE.fine, MODE), log_p, log_q, d


@triton.jit
def about_top(sums, row, numbers, MODE: tl.constexpr):
    """The numbers of a row for a divergence that is `about_top`."""
    gap = tempered_gap(0.0, sums.teacher_there - row.teacher_max, numbers, MODE)
    if MODE.same_temperature:
        gap *= numbers.student_inverse
    return with_ratio(numbers, gap - row.log_sum_gap)


@triton.jit
def slope_center(sums, row, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr):
    """slope / q at the student's likeliest token; 0 where that is infinite, as the divergence then is."""
    p, q, gap, log_p, log_q, d = point(sums.student_max, sums.teacher_there, row, numbers, MODE)
    center = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b) / q
    return tl.where(tl.abs(center) < float("inf"), center, 0.0)


@triton.jit
def _terms(logits, at, row, center, numbers, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr):
    """Per thread, the sums of a step's terms and centered slopes."""
    s, t = _load(logits, at, "evict_last", MODE)
    p, q, gap, log_p, log_q, d = point(s, t, row, numbers, MODE)
    term = TERM(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
    slope = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
    return lane_sum(term), lane_sum(slope - q * center)


@triton.jit
def sum_terms(
    logits,
    row,
    center,
    numbers,
    TERM: tl.constexpr,
    SLOPE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sweep 2, last column to first: Σ term and Σ centered slope."""
    term = per_thread(BLOCK)
    slope = per_thread(BLOCK)
    steps = steps_of(logits.span, BLOCK)
    for step in range(steps):
        at = vector_columns(steps - 1 - step, logits.span, BLOCK)
        more, steeper = _terms(logits, at, row, center, numbers, TERM, SLOPE, MODE)
        term += more
        slope += steeper
    if BLOCK.edges:
        last, steepest = _terms(logits, edge_columns(logits.span, BLOCK), row, center, numbers, TERM, SLOPE, MODE)
        term += last
        slope += steepest
    return tl.reduce((term, slope), 0, _pair_of_totals)


@triton.jit
def _pair_of_totals(a, b, c, d):
    return a + c, b + d


# --- gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def gradient_of(s, t, soft_on, row, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr):
    """Gradient with respect to student logits, but for the label's −1."""
    gradient = 0.0
    if MODE.soft != "absent":
        p, q, gap, log_p, log_q, d = point(s, t, row, numbers, MODE)
        slope = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
        if MODE.soft == "normalised":
            slope -= q * factors.center
        if MODE.soft != "raw":
            slope -= q * factors.slope_sum
        gradient = tl.where(soft_on, slope * factors.soft, 0.0)
    if MODE.hard:
        z = s - row.student_max
        gradient += hard_exp(z, tl.exp2(z * numbers.student_scale), MODE) * factors.hard
    return gradient


@triton.jit
def _write_step(grad, logits, at, row, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr):
    s, t = _load(logits, at, "evict_first", MODE)
    columns, present = at
    gradient = gradient_of(s, t, logits.soft_on, row, factors, numbers, SLOPE, MODE)
    tl.store(grad + columns, gradient, present, eviction_policy="evict_first")


@triton.jit
def write_gradient(grad, logits, row, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """The last sweep, last column to first."""
    steps = steps_of(logits.span, BLOCK)
    for step in range(steps):
        at = vector_columns(steps - 1 - step, logits.span, BLOCK)
        _write_step(grad, logits, at, row, factors, numbers, SLOPE, MODE)
    if BLOCK.edges:
        _write_step(grad, logits, edge_columns(logits.span, BLOCK), row, factors, numbers, SLOPE, MODE)
