"""The sweeps of `dense` over one row of student and teacher logits: device functions that know no divergence by name.

A sweep is a loop over blocks [vectors, threads, width] and one more step for the row's edges (see `blocks`). Sums are
kept per thread and merged once per row. `numbers` is a `launch.Numbers` and `MODE` a `mode.DenseMode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.blocks import (
    as_columns,
    as_vectors,
    edge_columns,
    has_last,
    last_columns,
    load_logits,
    whole_columns,
    whole_steps,
)
from fastkd.kernels.gpu.lanes import finite, lane_max, lane_sum, pair_maxima, pair_sums, per_thread, row_sums
from fastkd.kernels.gpu.points import hard_exp, point, raw_gap, tempered_gap


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


class Factors(NamedTuple):
    """What turns probabilities into the gradient.

    `center`·q is subtracted from every slope. That does not change the gradient, but the student's likeliest token then
    adds 0 to Σ slope. Otherwise that token's gradient in a confident row would be the rounding of slope − q·Σ slope.
    """

    center: Any
    slope_sum: Any
    soft: Any
    hard: Any


class OneHot(NamedTuple):
    """The label's part of the cross-entropy's gradient: what is subtracted, and in which column of the row."""

    column: Any
    share: Any


# --- statistics -------------------------------------------------------------------------------------------------


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
def _observe(old, logits, at, numbers, TERM: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics after one more step."""
    s, t = _load(logits, at, "evict_last", MODE, BLOCK)
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
def _load(logits, at, POLICY: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
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
    return as_vectors(s, BLOCK), as_vectors(t, BLOCK)


@triton.jit
def statistics_of(logits, numbers, TERM: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Sweep 1, first column to last."""
    none = per_thread(BLOCK)
    lowest = none - float("inf")
    found = Statistics(Maxima(lowest, lowest, lowest), none, none, none, none, none, none, none)
    if BLOCK.edges:
        found = _observe(found, logits, edge_columns(logits.span, BLOCK), numbers, TERM, MODE, BLOCK)
    for step in tl.range(0, whole_steps(logits.span, BLOCK), num_stages=BLOCK.stages):
        found = _observe(found, logits, (whole_columns(step, BLOCK), None), numbers, TERM, MODE, BLOCK)
    if has_last(logits.span, BLOCK):
        found = _observe(found, logits, last_columns(logits.span, BLOCK), numbers, TERM, MODE, BLOCK)

    student_max, teacher_max = pair_maxima(found.maxima.student, found.maxima.teacher)
    there = float("-inf")
    if MODE.soft == "normalised":
        there = tl.max(tl.where(found.maxima.student == student_max, found.maxima.teacher_there, there), 0)
    maxima = Maxima(student_max, teacher_max, there)
    found = moved(found, maxima, numbers, MODE)
    # Between nearly equal rows the sums' difference is what counts, and most of their rounding is in their last bits.
    student_sum, teacher_sum, sum_gap, hard_sum, forward, reverse, square, _ = row_sums(
        (
            found.student_sum,
            found.teacher_sum,
            found.student_sum - found.teacher_sum,
            found.hard_sum,
            found.forward,
            found.reverse,
            found.square,
            per_thread(BLOCK),
        )
    )
    return Statistics(maxima, student_sum, teacher_sum, sum_gap, hard_sum, forward, reverse, square)


# --- terms ------------------------------------------------------------------------------------------------------


@triton.jit
def closed_terms(statistics, normalisers, numbers, CLOSE: tl.constexpr, MODE: tl.constexpr):
    """The value and Σ slope of a divergence whose `sweeps` are "closed"."""
    unit = 1.0
    if MODE.same_temperature:
        unit = numbers.student_inverse
    forward = statistics.forward * normalisers.teacher_share * unit + normalisers.log_sum_gap
    reverse = statistics.reverse * normalisers.student_share * unit - normalisers.log_sum_gap
    return CLOSE(forward, reverse, numbers.a, numbers.b)


@triton.jit
def _terms(
    old,
    logits,
    at,
    normalisers,
    center,
    numbers,
    TERM: tl.constexpr,
    SLOPE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per thread, the sums of terms and centered slopes after one more step."""
    s, t = _load(logits, at, "evict_last", MODE, BLOCK)
    p, q, gap, log_p, log_q, d = point(s, t, normalisers, numbers, MODE)
    term = TERM(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
    slope = SLOPE(p, q, gap, log_p, log_q, d, numbers.a, numbers.b)
    return old[0] + lane_sum(term), old[1] + lane_sum(slope - q * center)


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
    sums = (per_thread(BLOCK), per_thread(BLOCK))
    if has_last(logits.span, BLOCK):
        last = last_columns(logits.span, BLOCK)
        sums = _terms(sums, logits, last, normalisers, center, numbers, TERM, SLOPE, MODE, BLOCK)
    steps = whole_steps(logits.span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        at = (whole_columns(steps - 1 - step, BLOCK), None)
        sums = _terms(sums, logits, at, normalisers, center, numbers, TERM, SLOPE, MODE, BLOCK)
    if BLOCK.edges:
        edges = edge_columns(logits.span, BLOCK)
        sums = _terms(sums, logits, edges, normalisers, center, numbers, TERM, SLOPE, MODE, BLOCK)
    return pair_sums(sums[0], sums[1])


# --- gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def factors_of(soft, slope_sum, center, hard_factor, scales, numbers):
    """`Factors` of a row whose divergence is `soft`."""
    # A NaN always shows: not every slope carries the one that made the value NaN.
    return Factors(center, slope_sum, tl.where(soft != soft, soft, numbers.soft_weight * scales.soft), hard_factor)


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
def _write_step(
    grad,
    logits,
    at,
    one_hot,
    normalisers,
    factors,
    numbers,
    SLOPE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s, t = _load(logits, at, "evict_first", MODE, BLOCK)
    columns, present = at
    gradient = gradient_of(s, t, logits.soft_on, normalisers, factors, numbers, SLOPE, MODE)
    gradient = as_columns(gradient, columns, BLOCK)
    if BLOCK.shared and MODE.hard:
        gradient -= tl.where(columns == one_hot.column - logits.span.head, one_hot.share, 0.0)
    tl.store(grad + columns, gradient, present, eviction_policy="evict_first")


@triton.jit
def write_gradient(
    grad, logits, one_hot, normalisers, factors, numbers, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """The last sweep, last column to first.

    In place a step writes the columns that it has read. Where the next step's are copied ahead, none of them has been
    written: steps have no column in common, and the wait before a step's columns are used is every thread's.

    Thread blocks that share a row subtract the `one_hot` here: a store after the sweep would race with the others'.
    """
    if has_last(logits.span, BLOCK):
        last = last_columns(logits.span, BLOCK)
        _write_step(grad, logits, last, one_hot, normalisers, factors, numbers, SLOPE, MODE, BLOCK)
    steps = whole_steps(logits.span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        at = (whole_columns(steps - 1 - step, BLOCK), None)
        _write_step(grad, logits, at, one_hot, normalisers, factors, numbers, SLOPE, MODE, BLOCK)
    if BLOCK.edges:
        edges = edge_columns(logits.span, BLOCK)
        _write_step(grad, logits, edges, one_hot, normalisers, factors, numbers, SLOPE, MODE, BLOCK)
