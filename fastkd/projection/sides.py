"""The two sides of a loss from hidden states: where the logits of some tokens and columns come from, and the way back.

A side is the product of a `Projection` (`Head`) or a tensor of logits (`Logits`); teachers may be more, which is in
`teachers`. The loop asks no side what it is. Tokens come in groups, and the tokens of a group in parts, the chunks: a
slice of the group each.

How operands are multiplied is in `products`. Where the head has another dtype than operands, a part of its rows is cast
at a time. Nothing here has the size of the vocabulary times that of the batch, but what the caller holds already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastkd.call import Call
from fastkd.projection.plan import CAST_COLUMNS, HeadSize, padded
from fastkd.projection.products import gradient_dtype, gradient_operands, operand_dtype, product
from fastkd.rows import SparseRows, Wants, kept_dtype, row_count, row_dtype
from fastkd.sources import Projection, Source, VocabShard

__all__ = [
    "Gradients",
    "Head",
    "RowIndex",
    "StudentSide",
    "TeacherSide",
    "autocast_dtype",
    "head_size",
    "held",
    "held_here",
    "part_of",
    "student_side",
]

#: Some rows of all, by their numbers.
RowIndex = slice | Tensor


def part_of(rows: RowIndex, part: slice) -> RowIndex:
    """A part of some rows; `part` counts from the first of them."""
    return slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]


class Gradients(NamedTuple):
    """Of the student: of its logits or hidden states, and of its head."""

    student: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class TeacherSide(Protocol):
    """What the loop asks of a teacher, and of a student too."""

    #: Whether every column is known.
    whole: bool

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        """Make the buffers: for logits of `chunk` tokens and their gradient of `group`, `tile` columns each."""
        ...

    def start(self, rows: RowIndex) -> None:
        """Turn to these tokens, a group."""
        ...

    def logits(self, columns: slice, part: slice) -> Tensor | SparseRows:
        """What a backend is given of the logits in these columns, of a part of the group."""
        ...


class StudentSide(TeacherSide, Protocol):
    """What the loop asks of a student."""

    def logits(self, columns: slice, part: slice) -> Tensor: ...

    def gradient_place(self, columns: slice, part: slice, logits: Tensor) -> Tensor:
        """Where the kernel is to write the gradient of these logits; may be over them."""
        ...

    def take_gradient(self, columns: slice, part: slice, grad: Tensor) -> None:
        """Take over the gradient of these logits; may overwrite it."""
        ...

    def multiply(self, columns: slice) -> None:
        """Every part's gradient of these columns has been taken: add what it means for the operands of the logits."""
        ...

    def finish(self) -> None:
        """Done with this group."""
        ...

    def gradients(self) -> Gradients:
        """Of all tokens."""
        ...


def student_side(call: Call, wants: Wants, grad: Tensor | None, count: int) -> StudentSide:
    """Of the first `count` columns that are here; `grad` takes the gradient of a student that is a tensor."""
    source, own = held_here(call.student_source()), slice(0, count)
    return Head(source, own, call.autocast, wants) if isinstance(source, Projection) else Logits(source, grad, own)


def held_here(source: Source) -> Tensor | Projection:
    """What this rank has of it."""
    return source.source if isinstance(source, VocabShard) else source


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype products are asked for in here, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def head_size(source: object, autocast: torch.dtype | None) -> HeadSize | None:
    """What the products of a source take; None for one that is no `Projection`."""
    source = source.source if isinstance(source, VocabShard) else source
    if not isinstance(source, Projection):
        return None
    operand = operand_dtype(source, autocast)
    return HeadSize(
        hidden_size=source.weight.shape[1],
        hidden_bytes=source.hidden.dtype.itemsize,
        hidden_kept=kept_dtype(source.hidden.dtype).itemsize,
        weight_bytes=source.weight.dtype.itemsize,
        operand_bytes=operand.itemsize,
        gradient_bytes=gradient_dtype(operand, source.device).itemsize,
        softcap=source.softcap is not None,
    )


class Head:
    """A `Projection` during one call: its logits in some columns, `own`, and, for the student, its gradients.

    `gradients` holds None for what is not wanted. Those of a head are wanted of its first columns only.
    """

    whole: bool = True

    def __init__(self, projection: Projection, own: slice, autocast: torch.dtype | None, wants: Wants) -> None:
        self.hidden = projection.hidden.reshape(-1, projection.hidden.shape[-1])
        self.weight = projection.weight[own]
        self.bias = None if projection.bias is None else projection.bias[own]
        self.softcap, self.scale = projection.softcap, projection.logit_scale
        self.operand = operand_dtype(projection, autocast)
        self.result = row_dtype(self.operand)
        self.gradient = gradient_dtype(self.operand, projection.device)
        self.wants = wants
        self._projection = projection
        self._x = self.hidden[:0]
        self._slope: Tensor | None = None  # the softcap's derivative, shaped like the logits
        self._narrow: Tensor | None = None  # the gradient of a group's logits, rounded for the products
        self._dx = self._grad = self._x  # of hidden states and logits, of the group at hand
        self._weight_met = 0  # columns of the weight gradient that hold something
        if wants.hidden:
            kept = kept_dtype(self.hidden.dtype)
            self._hidden_grad = torch.zeros(self.hidden.shape, dtype=kept, device=self.hidden.device)
        if wants.weight:
            self._weight_grad = torch.empty(self.weight.shape, dtype=self.result, device=self.weight.device)
        if wants.bias:
            self._bias_grad = torch.zeros(len(self.weight), dtype=self.result, device=self.weight.device)

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        def buffer(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, padded(tile), dtype=dtype, device=self.hidden.device)

        self._buffer = buffer(chunk, self.result)
        if self.wants.any and self.softcap is not None:
            self._slope = buffer(chunk, self.result)
        if self.wants.any and self.gradient != self.result:
            self._narrow = buffer(group, self.gradient)

    def start(self, rows: RowIndex) -> None:
        self._rows = rows
        self._x = self._dx = self._grad = self.hidden[:0]  # frees the last group's before this one's are made
        self._x = self.hidden[rows].to(self.operand)
        if self.wants.hidden:
            # The gradient itself where it is in reach and sums may be kept in it, else rounded once in the end.
            direct = isinstance(rows, slice) and self._hidden_grad.dtype == self.result
            self._dx = self._hidden_grad[rows] if direct else torch.empty_like(self._x, dtype=self.result)
            if len(self.weight) == 0:
                self._dx.zero_()  # no product writes it
            self._direct = direct

    def logits(self, columns: slice, part: slice) -> Tensor:
        out = held(self._buffer, columns, part)
        for some in self._parts(columns):
            weight = self.weight[some].to(self.operand)
            product(self._x[part], weight.t(), out[:, some.start - columns.start : some.stop - columns.start])
        if self.bias is not None:
            out.add_(self.bias[columns])
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()
            if self._slope is not None:
                slope = held(self._slope, columns, part)
                torch.mul(out, out, out=slope)
                slope.neg_().add_(1)
            out.mul_(self.softcap)
        return out

    def gradient_place(self, columns: slice, part: slice, logits: Tensor) -> Tensor:
        if self._narrow is None or self._slope is not None:
            return logits
        return self._narrow[part, : columns.stop - columns.start]

    def take_gradient(self, columns: slice, part: slice, grad: Tensor) -> None:
        """Keep it until it is multiplied: where it is as wide as the logits, over them, and the part is the group."""
        width = columns.stop - columns.start
        if self._slope is not None:
            out = grad if self._narrow is None else self._narrow[part, :width]
            torch.mul(grad, held(self._slope, columns, part), out=out)
        self._grad = grad if self._narrow is None else self._narrow[: len(self._x), :width]

    def multiply(self, columns: slice) -> None:
        """Add what the gradient of the group's logits means for hidden states, weight and bias."""
        if self.wants.bias:
            self._bias_grad[columns] += self._grad.sum(0, dtype=self.result)
        first_of_weight = columns.start >= self._weight_met
        self._weight_met = max(self._weight_met, columns.stop)
        for some in self._parts(columns, of_gradient=self.gradient != self.operand):
            gradient = self._grad[:, some.start - columns.start : some.stop - columns.start]
            weight = self.weight[some].to(self.operand) if self.wants.hidden else None
            for number, g in enumerate(gradient_operands(gradient, self.operand)):
                if weight is not None:
                    product(g, weight, self._dx, accumulate=some.start > 0 or number > 0)
                if self.wants.weight:
                    first = first_of_weight and number == 0
                    product(g.t(), self._x, self._weight_grad[some], accumulate=not first)

    def finish(self) -> None:
        if self.wants.hidden:
            if self.scale != 1:
                self._dx.mul_(self.scale)
            if isinstance(self._rows, Tensor):
                self._hidden_grad[self._rows] = self._dx.to(self._hidden_grad.dtype)
            elif not self._direct:
                self._hidden_grad[self._rows] = self._dx  # rounds on the way

    def gradients(self) -> Gradients:
        """Of hidden states, weight and bias, shaped like them, in the dtype they are kept in."""
        source = self._projection
        return Gradients(
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
        whole = torch.zeros_like(parameter, dtype=kept)
        whole[: len(grad)] = grad
        return whole

    def _parts(self, columns: slice, of_gradient: bool = False) -> Iterator[slice]:
        """All columns at once, or the parts in which the head's rows, or the gradient of their logits, are cast."""
        step = CAST_COLUMNS if of_gradient or self.weight.dtype != self.operand else columns.stop - columns.start
        for start in range(columns.start, columns.stop, max(step, 1)):
            yield slice(start, min(start + step, columns.stop))


class Logits:
    """A tensor of logits, in some columns. The gradient goes to `grad`, which may be the logits."""

    whole: bool = True

    def __init__(self, logits: Tensor, grad: Tensor | None, own: slice) -> None:
        self._logits = _as_matrix(logits)[..., own]
        self._grad = None if grad is None else _as_matrix(grad)[..., own]

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        """Nothing is needed."""

    def start(self, rows: RowIndex) -> None:
        self._rows = rows

    def logits(self, columns: slice, part: slice) -> Tensor:
        return self._logits[self._index(self._logits, columns, part)]

    def gradient_place(self, columns: slice, part: slice, logits: Tensor) -> Tensor:
        """The gradient itself, or over rows that had to be gathered."""
        assert self._grad is not None
        return self._grad[self._index(self._grad, columns, part)] if self._in_reach(self._grad) else logits

    def take_gradient(self, columns: slice, part: slice, grad: Tensor) -> None:
        assert self._grad is not None
        if not self._in_reach(self._grad):
            self._grad[self._index(self._grad, columns, part)] = grad

    def multiply(self, columns: slice) -> None:
        """They are no product."""

    def finish(self) -> None:
        """Nothing is left to do."""

    def gradients(self) -> Gradients:
        """None: it is in `grad`."""
        return Gradients()

    def _in_reach(self, tensor: Tensor) -> bool:
        return isinstance(self._rows, slice) and tensor.dim() == 2

    def _index(self, tensor: Tensor, columns: slice, part: slice) -> tuple[RowIndex, ...]:
        rows = part_of(self._rows, part)
        if tensor.dim() == 2:
            return rows, columns
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=tensor.device)
        return (*_unravelled(rows, tensor.shape[:-1]), columns)


def held(buffer: Tensor, columns: slice, part: slice) -> Tensor:
    """What of a buffer for a chunk holds these columns of these tokens."""
    return buffer[: part.stop - part.start, : columns.stop - columns.start]


def _unravelled(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices into leading dimensions; `torch.unravel_index` would copy the shape to the device, and wait for that."""
    found = []
    for size in reversed(shape):
        found.append(rows % size)
        rows = rows // size
    return tuple(reversed(found))


def _as_matrix(tensor: Tensor) -> Tensor:
    """`[rows, V]` without a copy; as it is where its strides do not allow that. Copied where columns lie apart."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    try:
        return tensor.view(row_count(tensor), tensor.shape[-1])
    except RuntimeError:
        return tensor
