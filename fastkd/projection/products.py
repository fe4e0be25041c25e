"""Products that accumulate in fp32 and leave fp32, also from 16-bit operands: in which dtype, and by whom.

On GPUs the product is asked for its fp32 result, and the gradient of the logits, as an operand, is rounded once to 16
bits. On CPUs operands are cast to fp32, or bfloat16 is multiplied by a product that keeps fp32
(`fastkd.kernels.cpu.products`): then the gradient enters in two pieces of 16 bits, and the result is as exact.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from fastkd.kernels.cpu import products as cpu
from fastkd.sources import Projection

__all__ = ["gradient_dtype", "gradient_operands", "operand_dtype", "operand_of", "product"]

#: RuntimeErrors that say nothing of what a device can do. The second came with torch 2.8.
_FAILURES: tuple[type[BaseException], ...] = (
    torch.OutOfMemoryError,
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),
)


@functools.cache
def _fp32_results(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` can leave their fp32 result on this GPU; decided once, by trying.

    Warns where torch refuses: products in fp32 are many times slower. A device that is out of memory or fails refuses
    nothing: its error is the caller's, and the next call tries again.
    """
    try:
        square = torch.zeros(16, 16, dtype=dtype, device=device)
        out = torch.zeros(16, 16, dtype=torch.float32, device=device)
        torch.mm(square, square, out_dtype=torch.float32, out=out)
        torch.addmm(out, square, square, out_dtype=torch.float32, out=out)
    except _FAILURES:
        raise
    except (RuntimeError, TypeError) as error:
        warnings.warn(
            f"fastkd: torch {torch.__version__} cannot keep the fp32 results of {dtype} products on {device}, so they "
            f"are computed in fp32, which is slower ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def operand_dtype(projection: Projection, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype in which hidden states and weights enter products: `operand_of` what they are, or autocast asks for.

    Raises ValueError or RuntimeError for a value of FASTKD_CPU_PRODUCTS that cannot be followed.
    """
    if projection.dtype == torch.float64:
        return torch.float64
    narrow = autocast if autocast is not None else torch.promote_types(projection.dtype, projection.weight.dtype)
    return operand_of(narrow, projection.device)


def operand_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What is multiplied in place of a dtype: 16 bits where their products can be had in fp32, else fp32.

    fp32 holds every 16-bit number.
    """
    if device.type == "cpu":
        return dtype if cpu.multiplies(dtype) else torch.float32
    return dtype if dtype != torch.float32 and _fp32_results(device, dtype) else torch.float32


def gradient_dtype(operand: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the gradient of logits is kept until it enters products with such operands."""
    return torch.float32 if device.type == "cpu" and operand == torch.bfloat16 else operand


def gradient_operands(gradient: Tensor, operand: torch.dtype) -> tuple[Tensor, ...]:
    """Matrices of the operands' dtype that stand for a gradient: their products are to be added. May overwrite it."""
    if gradient.device.type == "cpu" and operand == torch.bfloat16 and gradient.dtype == torch.float32:
        pieces: tuple[Tensor, ...] = cpu.pieces(gradient)
        return pieces
    return (gradient.to(operand),)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """a·b into `out`, or added to it, whose dtype is the operands' or fp32."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        cpu.multiply(a, b, out, accumulate)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
