"""A gradient multiplied in place by a number on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.launch import device_of

_BLOCK = 4096


@triton.jit
def _scale_kernel(values, factor, count, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        # A mask that may end anywhere would make every load a single element. So the tail has a step of its own.
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
            grid = (triton.cdiv(count, _BLOCK),)
            _scale_kernel[grid](grad, upstream, count, count % 16 != 0, _BLOCK, num_warps=8, enable_fp_fusion=True)
    return grad
