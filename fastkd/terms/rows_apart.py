"""How far the rows of two tensors are apart, and the gradients, a chunk of rows at a time.

    p = x Wᵀ or x          x: the student's rows, W: a projector
    y = Σ a_t y_t          y_t: the teacher's, one or several; a: their shares
    p̂ = p / √(mean p² + ε), ŷ likewise, if they are normalised; else p̂ = p, ŷ = y; ε = 1e-12
    value = Σ over the rows of the mean over the width of f(p̂ − ŷ)

No tensor has the teacher's width times the tokens but those that came in. The gradients are there after the forward,
and wait, unscaled, for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import scale_saved
from fastkd.projection.products import gradient_operands, operand_dtype, product
from fastkd.projection.sides import autocast_dtype
from fastkd.rows import kept_dtype, row_dtype
from fastkd.sources import Projection

__all__ = ["CHUNK_BYTES", "DISTANCES", "EPSILON", "Comparison", "chunk_rows", "distance"]

EPSILON = 1e-12
#: name → (f, f') of a difference.
DISTANCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mse": (torch.square, lambda d: 2 * d),
    "cosine": (lambda d: d.square() / 2, lambda d: d),  # of normalised rows: 1 − cos
    "smooth_l1": (
        lambda d: torch.where(d.abs() < 1, d.square() / 2, d.abs() - 0.5),
        lambda d: d.clamp(-1, 1),
    ),
}
#: fp32 bytes of a chunk as wide as the teacher: what stays in a core's cache; what keeps a GPU's products busy.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 32 << 20}
_LEAST_ROWS = 64


@dataclass(frozen=True)
class Comparison:
    """What is computed of two rows."""

    #: A key of DISTANCES.
    loss: str
    normalise: bool


def chunk_rows(width: int, device: str) -> int:
    """Rows of a chunk, for a width of the teacher."""
    return max(CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * width), _LEAST_ROWS)


def distance(
    student: Tensor,
    teachers: Sequence[Tensor],
    rows: Tensor | None,
    counted: Tensor,
    how: Comparison,
    projector: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """A scalar, fp32 or float64: the sum over rows of the mean over the width.

    Args:
        student: `[..., H_s]`, of a floating-point dtype. What follows is on its device.
        teachers: `[..., H_t]` each. No gradient flows into them.
        rows: int64, the numbers of the rows to compute. None: all.
        counted: bool `[...]`, the rows that count, among those computed.
        projector: `[H_t, H_s]`.
        shares: `[len(teachers)]`, fp32 or float64. None where there is one teacher.
    """
    taught = [one.detach().reshape(-1, one.shape[-1]) for one in teachers]
    settings = (taught, rows, counted.flatten(), how, autocast_dtype(student.device), torch.is_grad_enabled())
    value: Tensor = _Distance.apply(student, projector, shares, settings)  # type: ignore[no-untyped-call]
    return value


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, projector: Tensor | None, shares: Tensor | None, settings: Any) -> Tensor:
        *given, traced = settings
        wanted = [need and traced for need in ctx.needs_input_grad[:3]]
        with torch.autocast(student.device.type, enabled=False):
            value, gradients = _value_and_gradients(student, projector, shares, wanted, *given)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if one is None else scale_saved(one, upstream) for one in ctx.saved_tensors), None)


def _value_and_gradients(
    student: Tensor,
    projector: Tensor | None,
    shares: Tensor | None,
    wanted: Sequence[bool],
    teachers: Sequence[Tensor],
    rows: Tensor | None,
    counted: Tensor,
    how: Comparison,
    autocast: torch.dtype | None,
) -> tuple[Tensor, list[Tensor | None]]:
    x_all = student.reshape(-1, student.shape[-1])
    width = teachers[0].shape[-1]
    operand = row_dtype(student.dtype) if projector is None else _operand(x_all, projector, autocast)
    result = row_dtype(operand)
    weight = None if projector is None else projector.to(operand)
    f, slope = DISTANCES[how.loss]
    wants_x, wants_weight, wants_shares = wanted
    dx = torch.zeros_like(x_all, dtype=kept_dtype(student.dtype)) if wants_x else None
    dweight = torch.zeros(width, x_all.shape[-1], dtype=result, device=student.device) if wants_weight else None
    dshares = torch.zeros(len(teachers), dtype=result, device=student.device) if wants_shares else None
    value = torch.zeros((), dtype=result, device=student.device)
    count = len(x_all) if rows is None else len(rows)
    step = chunk_rows(width, student.device.type)
    for start in range(0, count, step):
        chunk: Any = slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
        live = counted[chunk, None]
        x = x_all[chunk].to(operand)
        if weight is None:
            p = x
        else:
            p = torch.empty(len(x), width, dtype=result, device=x.device)
            product(x, weight.t(), p)
        y = _mixed(teachers, chunk, shares, result)
        p, p_rate = _normalised(p, how)
        y, y_rate = _normalised(y, how)
        apart = p - y
        value += torch.where(live, f(apart), 0.0).sum()
        if not any(wanted):
            continue
        g = torch.where(live, slope(apart), 0.0)
        if dshares is not None:
            dy = _through(-g, y, y_rate)
            dshares += torch.stack([(dy * one[chunk]).sum(dtype=result) for one in teachers])
        dp = _through(g, p, p_rate)
        if weight is None:
            if dx is not None:
                dx[chunk] = dp.to(dx.dtype)
            continue
        found = None if dx is None else torch.empty(len(x), x.shape[-1], dtype=result, device=x.device)
        for number, part in enumerate(gradient_operands(dp, operand)):
            if dweight is not None:
                product(part.t(), x, dweight, accumulate=True)
            if found is not None:
                product(part, weight, found, accumulate=number > 0)
        if dx is not None and found is not None:
            dx[chunk] = found.to(dx.dtype)
    gradients = (
        None if dx is None else dx.div_(width).view(student.shape),
        None if dweight is None or projector is None else dweight.div_(width).to(kept_dtype(projector.dtype)),
        None if dshares is None else dshares.div_(width),
    )
    return value / width, list(gradients)


def _operand(x: Tensor, projector: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """As in the library's products with an output head: 16 bits where their results can be had in fp32."""
    return operand_dtype(Projection(x.detach(), projector.detach()), autocast)


def _mixed(teachers: Sequence[Tensor], chunk: Any, shares: Tensor | None, dtype: torch.dtype) -> Tensor:
    if shares is None:
        return teachers[0][chunk].to(dtype)
    mixed = teachers[0][chunk].to(dtype) * shares[0]
    for share, teacher in zip(shares[1:], teachers[1:], strict=True):
        mixed += teacher[chunk].to(dtype) * share  # a scalar share would leave 16 bits at 16
    return mixed


def _normalised(rows: Tensor, how: Comparison) -> tuple[Tensor, Tensor | None]:
    """(rows, what each was multiplied by)."""
    if not how.normalise:
        return rows, None
    rate = rows.square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
    return rows * rate, rate


def _through(g: Tensor, normalised: Tensor, rate: Tensor | None) -> Tensor:
    """The gradient of the rows from that of the normalised rows."""
    if rate is None:
        return g
    return rate * (g - normalised * (g * normalised).mean(-1, keepdim=True))
