"""What stands before and after a loss kernel, one number a row: the scales of its terms, and their weighted total.

Each is one launch of one program, which goes through the rows by blocks and adds up in the same order every time: a
thousand times fewer numbers than there are logits, and a sum over many programs would need a second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.launch import device_of
from fastkd.rows import row_count

_BLOCK = 4096
_OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}


@triton.jit
def _masked(labels, weights, index, rows, length, ignore_index, SHIFT: tl.constexpr):
    """The weights of some rows, without the mask and with it, and their labels; 0 where there is no row."""
    here = index < rows
    source = index
    if SHIFT:  # what a row is scored against stands beside the next one; the last of a sequence has none
        here = here & (index % length != length - 1)
        source = index + 1
    every = tl.where(here, 1.0, 0.0)
    if weights is not None:
        every = tl.load(weights + source, here, other=0).to(tl.float32)
    masked = every
    label = tl.full(index.shape, 0, tl.int64) + ignore_index
    if labels is not None:
        label = tl.load(labels + source, here, other=ignore_index)
        masked = tl.where(label == ignore_index, 0.0, every)
    return every, masked, label


@triton.jit
def _divided(scale, divisor):
    """Rounded as torch does, which Triton's own division is not; 0 where the divisor is 0."""
    return tl.where(divisor == 0, 0.0, tl.div_rn(scale, tl.where(divisor == 0, 1.0, divisor)))


@triton.jit
def _row_scales_kernel(
    labels,
    weights,
    num_items,
    number,
    scales,
    moved,
    rows,
    length,
    ignore_index,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last of `scales` is the one with the mask; with `BOTH` one without it stands before it."""
    every_divisor = number
    masked_divisor = number
    if num_items is not None:
        every_divisor = tl.load(num_items)
        masked_divisor = every_divisor
    if COUNT:
        every_sum = tl.zeros([BLOCK], tl.float32)
        masked_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, rows, BLOCK):
            index = start + tl.arange(0, BLOCK)
            every, masked, label = _masked(labels, weights, index, rows, length, ignore_index, SHIFT)
            every_sum += every
            masked_sum += masked
        every_divisor = tl.sum(every_sum, 0)
        masked_divisor = tl.sum(masked_sum, 0)
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        every, masked, label = _masked(labels, weights, index, rows, length, ignore_index, SHIFT)
        if BOTH:
            tl.store(scales + index, _divided(every, every_divisor), index < rows)
            tl.store(scales + rows + index, _divided(masked, masked_divisor), index < rows)
        else:
            tl.store(scales + index, _divided(masked, masked_divisor), index < rows)
        if moved is not None:
            tl.store(moved + index, label, index < rows)


def row_scales(
    student: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    divisor: float | Tensor | None,
    ignore_index: int,
    shift: bool,
    mask_soft: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `backend.Backend.row_scales`."""
    rows, both = row_count(student), labels is not None and not mask_soft
    scales = torch.empty((1 + both, rows), dtype=torch.float32, device=student.device)
    moved = None
    if shift and labels is not None:
        moved = torch.empty(rows, dtype=torch.int64, device=student.device)
    if rows == 0:
        return scales, moved
    num_items, number = None, 1.0
    if isinstance(divisor, Tensor):
        num_items = divisor.to(student.device, torch.float32, non_blocking=True)
    elif divisor is not None:
        number = float(divisor)
    with device_of(student):
        _row_scales_kernel[(1,)](
            None if labels is None else labels.contiguous(),
            None if weights is None else weights.contiguous(),
            num_items,
            number,
            scales,
            moved,
            rows,
            student.shape[-2] if shift else rows,
            ignore_index,
            divisor is None,
            shift,
            both,
            _BLOCK,
            **_OPTIONS,
        )
    return scales, moved


@triton.jit
def _weighted_total_kernel(
    soft, hard, soft_scale, hard_scale, soft_weight, hard_weight, total, rows, BLOCK: tl.constexpr
):
    """A term is absent where its scale is None."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        here = index < rows
        if soft_scale is not None:
            sums += soft_weight * tl.load(soft_scale + index, here, other=0.0) * tl.load(soft + index, here, other=0.0)
        if hard_scale is not None:
            sums += hard_weight * tl.load(hard_scale + index, here, other=0.0) * tl.load(hard + index, here, other=0.0)
    tl.store(total, tl.sum(sums, 0))


def weighted_total(
    soft: Tensor,
    hard: Tensor,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    soft_weight: float,
    hard_weight: float,
) -> Tensor:
    """See `backend.Backend.weighted_total`."""
    total = torch.empty((), dtype=torch.float32, device=soft.device)
    with device_of(soft):
        _weighted_total_kernel[(1,)](
            soft.contiguous(),
            hard.contiguous(),
            None if soft_scale is None or soft_weight == 0 else soft_scale.contiguous(),
            None if hard_scale is None or hard_weight == 0 else hard_scale.contiguous(),
            soft_weight,
            hard_weight,
            total,
            soft.numel(),
            _BLOCK,
            **_OPTIONS,
        )
    return total
