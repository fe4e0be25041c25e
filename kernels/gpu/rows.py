"""A distillation loss and its gradient on rows of logits, for every divergence of the table. One program per row.

Sweeps over a row, all loads of 16 bytes where the rows' addresses allow:

1. statistics: maxima and sums of exponentials of both rows, the cross-entropy's included, relative to a running
   maximum. The value and Σ slope of the Kullback-Leibler family follow from them, as does the squared difference.
2. terms, for the other divergences: Σ term and Σ slope, now that the probabilities are known.
3. gradient, if wanted: computed in fp32 and rounded once.

So student and teacher are each loaded twice (three times if sweep 2 is needed, once less without a gradient) and the
gradient is stored once. What of this reaches DRAM depends on the cache: sweeps 2 and 3 begin at the last column, where
sweep 1 ended.

Where logits are computed for one vocabulary tile at a time, a launch makes one of the sweeps over one tile, and takes
from `state` what the launches before it learned of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    first_vector,
    launch_options,
    row_offset,
    rows_of,
    span_of,
)
from fastkd.kernels.gpu.divergences import DIVERGENCES, Divergence
from fastkd.kernels.gpu.numbers import hard_power, numbers_for
from fastkd.kernels.gpu.sparse import kd_sparse_rows
from fastkd.kernels.gpu.state import VocabularyTile, load_state, merged, store_statistics, store_terms
from fastkd.kernels.gpu.sweeps import (
    Factors,
    Logits,
    about_top,
    gradient_of,
    row_of,
    slope_center,
    statistics_of,
    sum_terms,
    write_gradient,
)
from fastkd.rows import RowSpec, SparseRows, Tile


@dataclass(frozen=True)
class Mode:
    """What a kernel is compiled for."""

    stage: str  # "whole" rows, or a `backend.Tile.stage`
    soft: str  # a `Divergence.sweeps` or, without a teacher, "absent"
    hard: bool
    forward: bool  # which of the sums of `Statistics` are wanted
    reverse: bool
    about_top: bool  # as in `Divergence`
    same_temperature: bool
    hard_power: int  # see `numbers.hard_power`
    # Some logits are fp32: log q − log p and q − p must not cancel. 16-bit logits differ by nothing or by much, and
    # differences between them are exact: q − p is small only beside larger ones in the row.
    fine: bool
    teacher_aligned: bool
    grad_aligned: bool


@triton.jit
def _kd_rows_kernel(
    student_rows,
    teacher_rows,
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
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    soft_by = 0.0
    hard_by = 0.0
    if MODE.soft != "absent":
        soft_by = tl.load(soft_scale + index)
    if MODE.hard:
        hard_by = tl.load(hard_scale + index)
    soft_on = soft_by != 0
    hard_on = hard_by != 0
    width = vocab_size
    if MODE.stage != "whole":
        width = tile.width

    student_offset = row_offset(student_rows, index)
    span = span_of(student_rows.pointer, student_offset, width, BLOCK)
    student = student_rows.pointer + student_offset
    teacher = student
    student_vectors = first_vector(student_rows.pointer, student_offset, span, True, BLOCK)
    logits = Logits(student_vectors, student_vectors, span, soft_on)
    if MODE.soft != "absent":
        teacher_offset = row_offset(teacher_rows, index)
        teacher = teacher_rows.pointer + teacher_offset
        teacher_vectors = first_vector(teacher_rows.pointer, teacher_offset, span, MODE.teacher_aligned, BLOCK)
        logits = Logits(student_vectors, teacher_vectors, span, soft_on)
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

    if MODE.stage != "whole":
        before = load_state(tile, index, MODE)
    label_logit = 0.0
    if MODE.hard:  # before the gradient, which may overwrite the logits
        label = tl.load(labels + index)
        labelled = (label >= 0) & (label < vocab_size) & hard_on
        label_here = labelled
        if MODE.stage != "whole":
            label -= tile.first
            label_here = labelled & (label >= 0) & (label < width)
        label_student = tl.load(student + label, label_here, other=0.0).to(tl.float32)
        label_teacher = label_student
        if MODE.soft != "absent":
            label_teacher = tl.load(teacher + label, label_here & soft_on, other=0.0).to(tl.float32)
        label_logit = label_student
        if MODE.stage != "whole":
            label_logit = tl.where(label_here, label_student, before.label_logit)

    if MODE.stage == "whole":
        sums = statistics_of(logits, numbers, TERM, MODE, BLOCK)
    elif MODE.stage == "statistics":
        sums = merged(before.statistics, statistics_of(logits, numbers, TERM, MODE, BLOCK), numbers, MODE)
        store_statistics(tile, index, sums, label_logit)
    else:
        sums = before.statistics
    row = row_of(sums)
    soft = 0.0
    slope_sum = 0.0
    center = 0.0
    if MODE.soft == "closed":
        unit = 1.0
        if MODE.same_temperature:
            unit = numbers.student_inverse
        forward = sums.forward * row.teacher_share * unit + row.log_sum_gap
        reverse = sums.reverse * row.student_share * unit - row.log_sum_gap
        soft, slope_sum = TERM(forward, reverse, numbers.a, numbers.b)
    if MODE.soft == "normalised" and MODE.stage != "statistics":
        if MODE.about_top:
            numbers = about_top(sums, row, numbers, MODE)
        center = slope_center(sums, row, numbers, SLOPE, MODE)
        if MODE.stage != "gradient":
            soft, slope_sum = sum_terms(logits, row, center, numbers, TERM, SLOPE, MODE, BLOCK)
        if MODE.stage != "whole":
            soft += before.term_sum
            slope_sum += before.slope_sum
        if MODE.stage == "terms":
            store_terms(tile, index, soft, slope_sum)
    if MODE.soft == "raw":
        soft = sums.square / vocab_size
    if MODE.soft != "absent":
        soft = tl.where(soft_on, soft, 0.0)
    tl.store(soft_values + index, soft)

    hard = 0.0
    hard_factor = 0.0
    if MODE.hard:
        hard = tl.log(sums.hard_sum) - (label_logit - sums.student_max)
        hard = tl.where(labelled, hard, tl.where(hard_on, float("nan"), 0.0))
        hard_factor = numbers.hard_weight * hard_by / sums.hard_sum
        hard_factor = tl.where(labelled, hard_factor, tl.where(hard_on & (numbers.hard_weight != 0), float("nan"), 0.0))
    tl.store(hard_values + index, hard)

    if grad_rows is not None:
        # A NaN is never hidden: not every slope carries the one that made the value NaN.
        soft_factor = tl.where(soft != soft, soft, numbers.soft_weight * soft_by)
        factors = Factors(center, slope_sum, soft_factor, hard_factor)
        if MODE.hard and MODE.stage == "gradient":
            tl.debug_barrier()  # every thread has read the label's logit, which in place another overwrites
        write_gradient(grad_vectors, logits, row, factors, numbers, SLOPE, MODE, BLOCK)
        clear_tail(grad, width, grad_columns, BLOCK)
        if MODE.hard:
            # The label's −1, which in the sweep would cost every column a comparison.
            gradient = gradient_of(label_student, label_teacher, soft_on, row, factors, numbers, SLOPE, MODE)
            tl.debug_barrier()  # another thread wrote this column in the sweep
            tl.store(grad + label, gradient - numbers.hard_weight * hard_by, label_here)


def kd_rows(
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross-entropy of each row, fp32 `[rows]`; the gradient into `grad`. See `backend.Backend`.

    Rows must lie at two strides (`fastkd.ops.row_layout`). fp32, bf16 or fp16, student and teacher independently.
    """
    if isinstance(teacher, SparseRows):
        assert soft_scale is not None  # without a soft term no teacher is handed down
        values: tuple[Tensor, Tensor] = kd_sparse_rows(
            student, teacher, labels, soft_scale, hard_scale, spec, grad, tile
        )
        return values
    count = student[..., 0].numel()
    soft, hard = (torch.empty(count, dtype=torch.float32, device=student.device) for _ in range(2))
    if count == 0:
        return soft, hard
    divergence = DIVERGENCES[spec.divergence]
    width = spec.vocab_size if tile is None else student.shape[-1]
    block = block_for([tensor for tensor in (student, teacher, grad) if tensor is not None], width, divergence.vectors)
    with device_of(student):
        _kd_rows_kernel[(count,)](
            rows_of(student),
            None if teacher is None else rows_of(teacher),
            None if grad is None else rows_of(grad),
            labels,
            soft_scale,
            hard_scale,
            soft,
            hard,
            numbers_for(spec, divergence),
            spec.vocab_size,
            None if tile is None else VocabularyTile(tile.state, tile.first, width),
            student.shape[-1] if grad is None else grad.shape[-1],
            divergence.term,
            divergence.slope,
            _mode_for(spec, divergence, student, teacher, labels, grad, block, tile),
            block,
            **launch_options(block),
        )
    return soft, hard


def _mode_for(
    spec: RowSpec,
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    grad: Tensor | None,
    block: Block,
    tile: Tile | None,
) -> Mode:
    soft = "absent" if teacher is None else divergence.sweeps
    tempered = soft in ("closed", "normalised")
    return Mode(
        stage="whole" if tile is None else tile.stage,
        soft=soft,
        hard=labels is not None,
        forward=divergence.forward,
        reverse=divergence.reverse,
        about_top=divergence.about_top,
        same_temperature=spec.temperature == spec.teacher_temperature,
        hard_power=hard_power(spec) if tempered else 0,
        fine=any(tensor is not None and tensor.dtype == torch.float32 for tensor in (student, teacher)),
        teacher_aligned=co_aligned(teacher, student, block),
        grad_aligned=co_aligned(grad, student, block),
    )


# --- scaling a gradient -----------------------------------------------------------------------------------------

_SCALE_BLOCK = 4096


@triton.jit
def _scale_kernel(values, factor, count, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        # A mask that may end anywhere would make every load a single element: what is beyond whole vectors goes apart.
        whole = count // 16 * 16
        _scale_step(values, tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), whole, by)
        if TAIL:
            _scale_step(values, whole + tl.arange(0, 16), tl.where(tl.program_id(0) == 0, count, whole), by)


@triton.jit
def _scale_step(values, offsets, stop, by):
    x = tl.load(values + offsets, offsets < stop).to(tl.float32)
    tl.store(values + offsets, x * by, offsets < stop)


def scale_(grad: Tensor, upstream: Tensor) -> Tensor:
    """Multiply `grad` in place by the 0-dim `upstream`, without waiting for the device; free where that is 1."""
    if not grad.is_contiguous():
        return grad.mul_(upstream)
    if grad.numel() > 0:
        with device_of(grad):
            count = grad.numel()
            grid = (triton.cdiv(count, _SCALE_BLOCK),)
            _scale_kernel[grid](
                grad, upstream, count, count % 16 != 0, _SCALE_BLOCK, num_warps=8, enable_fp_fusion=True
            )
    return grad
