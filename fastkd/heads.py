"""The matrix products of an output head: logits of some tokens and columns, and the way back.

Products accumulate in fp32 and leave fp32, also from 16-bit operands: on GPUs by asking the product for it, elsewhere
by casting the operands, a part of the head's rows at a time. Nothing here has the size of the vocabulary times that of
the batch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.divergences import ForwardKL
from fastkd.plan import CAST_COLUMNS, NOTHING, Side, Wants, padded, plan_for
from fastkd.sources import Projection

__all__ = ["Head", "autocast_dtype", "kept_dtype", "logit_chunks"]


#: RuntimeErrors that say nothing of what a device can do. The second came with torch 2.8.
_FAILURES: tuple[type[BaseException], ...] = (
    torch.OutOfMemoryError,
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),
)


@functools.cache
def _fp32_results(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` can leave their fp32 result on this device; decided once, by trying.

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
    """The dtype in which hidden states, weights and gradients enter products.

    On the CPU fp32: it holds every 16-bit number, and these processors multiply it fastest. On GPUs the 16-bit dtype
    that both operands share or autocast asks for, if its products can be had in fp32.
    """
    if projection.dtype == torch.float64:
        return torch.float64
    narrow = autocast if autocast is not None else torch.promote_types(projection.dtype, projection.weight.dtype)
    if projection.device.type == "cpu" or narrow == torch.float32 or not _fp32_results(projection.device, narrow):
        return torch.float32
    return narrow


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """How a parameter's gradient is kept between forward and backward: as the parameter, but fp16 in fp32.

    Sums over tokens may leave the range of fp16 on either side until the upstream gradient has scaled them.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype products are asked for in here, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """a·b into `out`, or added to it, whose dtype is the operands' or fp32."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Head:
    """One projection during one call: its logits and, for the student, its gradients.

    `hidden`, `weight` and `bias` of `gradients` are None where they are not wanted.
    """

    def __init__(self, projection: Projection, vocab_size: int, autocast: torch.dtype | None, wants: Wants) -> None:
        self.hidden = projection.hidden.reshape(-1, projection.hidden.shape[-1])
        self.weight = projection.weight[:vocab_size]
        self.bias = None if projection.bias is None else projection.bias[:vocab_size]
        self.softcap, self.scale = projection.softcap, projection.logit_scale
        self.operand = operand_dtype(projection, autocast)
        self.result = torch.float64 if self.operand == torch.float64 else torch.float32
        self.wants = wants
        self.side = Side(
            hidden=self.hidden.shape[1],
            hidden_bytes=self.hidden.dtype.itemsize,
            weight_bytes=self.weight.dtype.itemsize,
            operand_bytes=self.operand.itemsize,
            softcap=self.softcap is not None,
        )
        self._projection = projection
        self._x = self.hidden[:0]
        self._slope: Tensor | None = None
        self._weight_met = 0  # columns of the weight gradient that hold something
        if wants.hidden:
            kept = kept_dtype(self.hidden.dtype)
            self._hidden_grad = torch.zeros(self.hidden.shape, dtype=kept, device=self.hidden.device)
        if wants.weight:
            self._weight_grad = torch.empty(self.weight.shape, dtype=self.result, device=self.weight.device)
        if wants.bias:
            self._bias_grad = torch.zeros(len(self.weight), dtype=self.result, device=self.weight.device)

    def start(self, rows: slice | Tensor, slope: Tensor | None) -> None:
        """Turn to these tokens. `slope` is memory for the softcap's derivative, shaped like the logits."""
        self._rows = rows
        self._x = self.hidden[rows].to(self.operand)
        self._slope = slope
        if self.wants.hidden:
            # The gradient itself where it is in reach and sums may be kept in it, else rounded once in the end.
            direct = isinstance(rows, slice) and self._hidden_grad.dtype == self.result
            self._dx = self._hidden_grad[rows] if direct else torch.empty_like(self._x, dtype=self.result)
            self._direct = direct

    def logits(self, columns: slice, out: Tensor | None) -> Tensor:
        """The tokens' logits of these columns, into `out`."""
        assert out is not None
        for part in self._parts(columns):
            weight = self.weight[part].to(self.operand)
            _product(self._x, weight.t(), out[:, part.start - columns.start : part.stop - columns.start])
        if self.bias is not None:
            out.add_(self.bias[columns])
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()
            if self._slope is not None:
                slope = self._slope[:, : out.shape[1]]
                torch.mul(out, out, out=slope)
                slope.neg_().add_(1)
            out.mul_(self.softcap)
        return out

    def gradient_place(self, columns: slice, logits: Tensor, narrow: Tensor | None) -> Tensor:
        """Where the kernel is to write the logits' gradient: over them, or rounded for the products into `narrow`."""
        return logits if narrow is None else narrow

    def add_gradient(self, columns: slice, grad: Tensor) -> None:
        """Add what `grad`, the gradient of these logits, means for hidden states, weight and bias; overwrites it."""
        if self._slope is not None:
            grad.mul_(self._slope[:, : grad.shape[1]])
            grad = grad.to(self.operand)
        if self.wants.bias:
            self._bias_grad[columns] += grad.sum(0, dtype=self.result)
        first_of_weight = columns.start >= self._weight_met
        self._weight_met = max(self._weight_met, columns.stop)
        for part in self._parts(columns):
            g = grad[:, part.start - columns.start : part.stop - columns.start]
            if self.wants.hidden:
                _product(g, self.weight[part].to(self.operand), self._dx, accumulate=part.start > 0)
            if self.wants.weight:
                _product(g.t(), self._x, self._weight_grad[part], accumulate=not first_of_weight)

    def finish(self) -> None:
        """Done with these tokens."""
        if self.wants.hidden:
            if self.scale != 1:
                self._dx.mul_(self.scale)
            if not self._direct:
                self._hidden_grad[self._rows] = self._dx.to(self._hidden_grad.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, shaped like them, in the dtype they are kept in."""
        source = self._projection
        return (
            self._hidden_grad.view(source.hidden.shape) if self.wants.hidden else None,
            self._completed(self._weight_grad, source.weight) if self.wants.weight else None,
            self._completed(self._bias_grad, source.bias) if self.wants.bias else None,
        )

    def _completed(self, grad: Tensor, parameter: Tensor | None) -> Tensor:
        assert parameter is not None
        if grad.dim() == 2 and self._weight_met == 0:
            grad.zero_()  # no token was met
        if self.scale != 1:
            grad.mul_(self.scale)
        kept = kept_dtype(parameter.dtype)
        if len(grad) == len(parameter):
            return grad.to(kept)
        padded = torch.zeros_like(parameter, dtype=kept)
        padded[: len(grad)] = grad
        return padded

    def _parts(self, columns: slice) -> Iterator[slice]:
        """All columns at once, or the parts in which the head's rows are cast."""
        step = columns.stop - columns.start if self.weight.dtype == self.operand else CAST_COLUMNS
        for start in range(columns.start, columns.stop, step):
            yield slice(start, min(start + step, columns.stop))


@torch.no_grad()
def logit_chunks(source: Projection, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """The first `vocab_size` logits of some tokens at a time, without gradient: (tokens, `[tokens, vocab_size]`).

    fp32, or float64 where the projection is. Tokens are the collapsed leading dimensions. Each chunk overwrites the
    one before.
    """
    count, device = source.shape[:-1].numel(), source.device
    head = Head(source.detach(), vocab_size, autocast_dtype(device), NOTHING)
    chunk = plan_for(
        max(count, 1),
        vocab_size,
        head.side,
        None,
        NOTHING,
        ForwardKL(),
        device,
        memory_budget=None,
        tiles_allowed=False,
    ).chunk
    buffer = torch.empty(min(chunk, count), padded(vocab_size), dtype=head.result, device=device)
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        with torch.autocast(device.type, enabled=False):
            head.start(rows, None)
            logits = head.logits(slice(0, vocab_size), buffer[: rows.stop - start, :vocab_size])
        yield rows, logits
