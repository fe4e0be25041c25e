"""The sweeps of `dense` over one row of student and teacher logits: device functions that know no divergence by name.

A sweep is a loop over blocks [vectors, threads, width] and one more step for the row's edges (see `blocks`). Sums are
kept per thread and merged once per row. `numbers` is a `launch.Numbers` and `MODE` a `mode.DenseMode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import edge_columns, last_columns, load_logits, whole_columns, whole_steps
from fastkd.kernels.gpu.divergences import probability_gap
from fastkd.kernels.gpu.elementary import LOG2E, exp, log_near_one
from fastkd.kernels.gpu.lanes import finite, lane_max, lane_sum, per_thread
from fastkd.kernels.gpu.launch import Numbers


class Logits(NamedTuple):
    """A row's logits: pointers to the first vectors, and whether the teacher's may be read."""

    student: Any
    teacher: Any
    span: Any
    soft_on: Any


class Maxima(NamedTuple):
    """What sums of exponentials are relative to."""

    student: Any
    teacher: Any
    teacher_there: Any  # the teacher's logit where the student's maximum is


class Statistics(NamedTuple):
    """What sweep 1 keeps, per thread and at last per row. Logits z are relative to the maxima."""

    maxima: Any
    student_sum: Any  # Σ e^(z_s/T)
    teacher_sum: Any  # Σ e^(z_t/T)
    sum_gap: Any  # student_sum − teacher_sum, to more digits; only of a row
    hard_sum: Any  # Σ e^(z_s)
    forward: Any  # Σ e^(z_t/T) (z_t/T − z_s/T), in units of 1/T where both temperatures are the same
    reverse: Any  # Σ e^(z_s/T) (z_s/T − z_t/T), likewise
    square: Any  # Σ term of a raw divergence


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


class Factors(NamedTuple):
    """What turns probabilities into the gradient.

    `center`·q is subtracted from every slope. That does not change the gradient, but the student's likeliest token then
    adds 0 to Σ slope. Otherwise that token's gradient in a confident row would be the rounding of slope − q·Σ slope.
    """

    center: Any
    slope_sum: Any
    soft: Any
    hard: Any


# --- statistics -------------------------------------------------------------------------------------------------


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


@triton.jit
def moved(old, maxima, numbers, MODE: tl.constexpr):
    """The same sums relative to other maxima. A sum that vanishes becomes 0 even where it was infinite."""
    student_shift = old.maxima.student - finite(maxima.student)
    student_decay = tl.exp2(student_shift * numbers.student_scale)
    student_sum = old.student_sum
    teacher_sum = old.teacher_sum
    hard_sum = old.hard_sum
    forward = old.forward
    reverse = old.reverse
    if MODE.hard:
        hard_sum *= hard_exp(student_shift, student_decay, MODE)
    if MODE.soft == "closed" or MODE.soft == "normalised":
        teacher_decay = tl.exp2((old.maxima.teacher - finite(maxima.teacher)) * numbers.teacher_scale)
        if MODE.soft == "closed":
            gap = tempered_gap(
                finite(old.maxima.student) - finite(maxima.student),
                finite(old.maxima.teacher) - finite(maxima.teacher),
                numbers,
                MODE,
            )
            forward = tl.where(teacher_decay == 0, 0.0, teacher_decay * (forward - teacher_sum * gap))
            reverse = tl.where(student_decay == 0, 0.0, student_decay * (reverse + student_sum * gap))
        student_sum *= student_decay
        teacher_sum *= teacher_decay
    return Statistics(maxima, student_sum, teacher_sum, old.sum_gap, hard_sum, forward, reverse, old.square)


@triton.jit
def _observe(old, logits, at, numbers, TERM: tl.constexpr, MODE: tl.constexpr):
    """Statistics after one more step."""
    s, t = _load(logits, at, "evict_last", MODE)
    student_max = tl.maximum(old.maxima.student, lane_max(s))
    teacher_max = old.maxima.teacher
    teacher_there = old.maxima.teacher_there
    if MODE.soft == "closed" or MODE.soft == "normalised":
        teacher_max = tl.maximum(teacher_max, lane_max(t))
    if MODE.soft == "normalised":
        there = lane_max(tl.where(s == student_max[None, :, None], t, float("-inf")))
        teacher_there = tl.where(student_max > old.maxima.student, there, tl.maximum(teacher_there, there))
    maxima = Maxima(student_max, teacher_max, teacher_there)
    new = moved(old, maxima, numbers, MODE)
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
    return Statistics(maxima, student_sum, teacher_sum, old.sum_gap, hard_sum, forward, reverse, square)


@triton.jit
def _load(logits, at, POLICY: tl.constexpr, MODE: tl.constexpr):
    """Student's and teacher's logits of a step, fp32; −inf where there is no column.

    A teacher that is not wanted is not read: its logits are then anything, and what follows from them is not used.
    """
    columns, present = at
    s = load_logits(logits.student, columns, present, POLICY)
    t = s
    if MODE.soft != "absent":
        if present is None:
            t = tl.load(logits.teacher + columns, logits.soft_on, eviction_policy=POLICY).to(tl.float32)
        else:
            t = load_logits(logits.teacher, columns, present & logits.soft_on, POLICY)
    return s, t


@triton.jit
def statistics_of(logits, numbers, TERM: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sweep 1, first column to last."""
    none = per_thread(BLOCK)
    lowest = none - float("inf")
    found = Statistics(Maxima(lowest, lowest, lowest), none, none, none, none, none, none, none)
    if BLOCK.edges:
        found = _observe(found, logits, edge_columns(logits.span, BLOCK), numbers, TERM, MODE)
    for step in tl.range(0, whole_steps(logits.span, BLOCK), num_stages=BLOCK.stages):
        found = _observe(found, logits, (whole_columns(step, BLOCK), None), numbers, TERM, MODE)
    found = _observe(found, logits, last_columns(logits.span, BLOCK), numbers, TERM, MODE)

    student_max, teacher_max = tl.reduce((found.maxima.student, found.maxima.teacher), 0, _maxima)
    there = float("-inf")
    if MODE.soft == "normalised":
        there = tl.max(tl.where(found.maxima.student == student_max, found.maxima.teacher_there, there), 0)
    maxima = Maxima(student_max, teacher_max, there)
    found = moved(found, maxima, numbers, MODE)
    # Between nearly equal rows the sums' difference is what counts, and most of their rounding is in their last bits.
    student_sum, teacher_sum, sum_gap, hard_sum, forward, reverse, square = tl.reduce(
        (
            found.student_sum,
            found.teacher_sum,
            found.student_sum - found.teacher_sum,
            found.hard_sum,
            found.forward,
            found.reverse,
            found.square,
        ),
        0,
        _totals,
    )
    return Statistics(maxima, student_sum, teacher_sum, sum_gap, hard_sum, forward, reverse, square)


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
    if FINE or MODE.about_top:  # q − b·p cancels, too, where p and q are equal and their rows' sums are not
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
        return p, q, gap_of(p, q, d, numbers, MODE.fine, MODE), log_p, log_q, d


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


@triton.jit
def _terms(logits, at, normalisers, center, numbers, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr):
    """Per thread, the sums of a step's terms and centered slopes."""
    s, t = _load(logits, at, "evict_last", MODE)
    p, q, gap, log_p, log_q, d = point(s, t, normalisers, numbers, MODE)
    term = TERM(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
    slope = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
    return lane_sum(term), lane_sum(slope - q * center)


@triton.jit
def sum_terms(
    logits,
    normalisers,
    center,
    numbers,
    TERM: tl.constexpr,
    SLOPE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sweep 2, last column to first: Σ term and Σ centered slope."""
    term, slope = _terms(logits, last_columns(logits.span, BLOCK), normalisers, center, numbers, TERM, SLOPE, MODE)
    steps = whole_steps(logits.span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        at = (whole_columns(steps - 1 - step, BLOCK), None)
        more, steeper = _terms(logits, at, normalisers, center, numbers, TERM, SLOPE, MODE)
        term += more
        slope += steeper
    if BLOCK.edges:
        last, steepest = _terms(
            logits, edge_columns(logits.span, BLOCK), normalisers, center, numbers, TERM, SLOPE, MODE
        )
        term += last
        slope += steepest
    return tl.reduce((term, slope), 0, pair_of_totals)


@triton.jit
def pair_of_totals(a, b, c, d):
    return a + c, b + d


# --- gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def gradient_of(s, t, soft_on, normalisers, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr):
    """Gradient with respect to student logits, but for the label's −1."""
    gradient = 0.0
    if MODE.soft != "absent":
        p, q, gap, log_p, log_q, d = point(s, t, normalisers, numbers, MODE)
        slope = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
        if MODE.soft == "normalised":
            slope -= q * factors.center
        if MODE.soft != "raw":
            slope -= q * factors.slope_sum
        gradient = tl.where(soft_on, slope * factors.soft, 0.0)
    if MODE.hard:
        z = s - normalisers.student_max
        gradient += hard_exp(z, tl.exp2(z * numbers.student_scale), MODE) * factors.hard
    return gradient


@triton.jit
def _write_step(grad, logits, at, normalisers, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr):
    s, t = _load(logits, at, "evict_first", MODE)
    columns, present = at
    gradient = gradient_of(s, t, logits.soft_on, normalisers, factors, numbers, SLOPE, MODE)
    tl.store(grad + columns, gradient, present, eviction_policy="evict_first")


@triton.jit
def write_gradient(
    grad, logits, normalisers, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """The last sweep, last column to first.

    In place a step writes the columns that it has read. Where the next step's are copied ahead, none of them has been
    written: steps have no column in common, and the wait before a step's columns are used is every thread's.
    """
    _write_step(grad, logits, last_columns(logits.span, BLOCK), normalisers, factors, numbers, SLOPE, MODE)
    steps = whole_steps(logits.span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        at = (whole_columns(steps - 1 - step, BLOCK), None)
        _write_step(grad, logits, at, normalisers, factors, numbers, SLOPE, MODE)
    if BLOCK.edges:
        _write_step(grad, logits, edge_columns(logits.span, BLOCK), normalisers, factors, numbers, SLOPE, MODE)
