"""Divergence of the teacher's rows of attention from the student's, and the gradients, a chunk of rows at a time.

A row is what one query of one head makes of all keys. Rows come from probabilities, or from products of queries and
keys, or of values with values, which are formed here. Either way the library's own kernel takes them: a softmax of
log-probabilities is the probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastkd.autograd import scale_saved
from fastkd.losses import KDLoss
from fastkd.rows import kept_dtype, row_dtype

__all__ = ["Probabilities", "Products", "divergence_of_rows"]

#: fp32 bytes of the rows of a chunk.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


class Chunk(NamedTuple):
    """Some queries of some rows of a batch."""

    batch: slice
    queries: Tensor  # int64
    #: Bool `[batch, queries]`; None: all count.
    live: Tensor | None


class _Side(Protocol):
    """Where rows come from."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def heads(self) -> int: ...
    def parts(self, chunk: Chunk) -> list[Tensor]: ...
    def places(self, of: list[Tensor], chunk: Chunk) -> Iterator[tuple[Tensor, Any]]: ...
    def logits(self, parts: list[Tensor], chunk: Chunk, heads: int) -> Tensor: ...


@dataclass(frozen=True)
class Probabilities:
    """Rows that a model returned: `[batch, heads, queries, keys]`."""

    given: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a gradient may flow into."""
        return (self.given,)

    @property
    def heads(self) -> int:
        """How many there are."""
        return self.given.shape[1]

    def parts(self, chunk: Chunk) -> list[Tensor]:
        """What of the tensors a chunk needs."""
        return [self.given[chunk.batch, :, chunk.queries]]

    def places(self, of: list[Tensor], chunk: Chunk) -> Iterator[tuple[Tensor, Any]]:
        """(tensor shaped like one of `tensors`, index of the part)."""
        yield of[0], (chunk.batch, slice(None), chunk.queries)

    def logits(self, parts: list[Tensor], chunk: Chunk, heads: int) -> Tensor:
        """`[batch, heads, queries, keys]`, of the heads' means in groups."""
        return _log_of_mean(parts[0], heads)


@dataclass(frozen=True)
class Products:
    """softmax(scaling · a bᵀ) over the keys up to the query's own place that are no padding, and its own.

    With a softcap c: softmax(c · tanh(scaling · a bᵀ / c)).

    a `[batch, heads, tokens, size]`; b has as many heads, or a divisor of them, each for a group of a's. `real` is bool
    `[batch, tokens]`: the keys that are no padding.
    """

    a: Tensor
    b: Tensor
    scaling: float
    real: Tensor | None
    softcap: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a gradient may flow into."""
        return self.a, self.b

    @property
    def heads(self) -> int:
        """How many there are."""
        return self.a.shape[1]

    def parts(self, chunk: Chunk) -> list[Tensor]:
        """What of the tensors a chunk needs."""
        return [self.a[chunk.batch, :, chunk.queries], self.b[chunk.batch]]

    def places(self, of: list[Tensor], chunk: Chunk) -> Iterator[tuple[Tensor, Any]]:
        """(tensor shaped like one of `tensors`, index of the part)."""
        yield of[0], (chunk.batch, slice(None), chunk.queries)
        yield of[1], chunk.batch

    def logits(self, parts: list[Tensor], chunk: Chunk, heads: int) -> Tensor:
        """`[batch, heads, queries, keys]`, −inf where a key is not seen; of the heads' means in groups."""
        a, b = parts
        batch, count, queries, size = a.shape
        groups = b.shape[1]
        # The heads that share keys are rows of one product.
        found = a.reshape(batch, groups, count // groups * queries, size) @ b.transpose(-1, -2)
        found = found.view(batch, count, queries, -1) * self.scaling
        if self.softcap is not None:
            found = (found / self.softcap).tanh() * self.softcap
        keys, here = torch.arange(b.shape[2], dtype=torch.int64, device=b.device), chunk.queries[:, None]
        seen = here >= keys
        if self.real is not None:  # a query sees itself: rows without any key would be NaN
            seen = seen & (self.real[chunk.batch, None, None] | (here == keys))
        found = found.masked_fill(~seen, -torch.inf)
        if heads == count:
            return found
        return _log_of_mean(found.softmax(-1), heads).masked_fill(~seen, -torch.inf)  # as on the other side


def _log_of_mean(rows: Tensor, heads: int) -> Tensor:
    """log of the means over groups of heads that stand side by side; at least that of the smallest normal number."""
    batch, count, queries, keys = rows.shape
    if count != heads:
        rows = rows.view(batch, heads, count // heads, queries, keys).mean(2)
    return rows.clamp(min=torch.finfo(rows.dtype).tiny).log()


def divergence_of_rows(student: _Side, teacher: _Side, counted: Tensor) -> Tensor:
    """A scalar: KL(teacher ‖ student), the sum over the queries that count of the mean over heads.

    Args:
        student, teacher: of the same batch, queries and keys. Where one has more heads than the other, by a factor, its
            heads are averaged in groups.
        counted: bool `[batch, queries]`.
    """
    heads = min(student.heads, teacher.heads)
    settings = student, teacher, counted, heads, torch.is_grad_enabled()
    value: Tensor = _Divergence.apply(settings, *student.tensors)  # type: ignore[no-untyped-call]
    return value


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Any, *tensors: Tensor) -> Tensor:
        student, teacher, counted, heads, traced = settings
        wanted = traced and any(ctx.needs_input_grad[1:])
        with torch.autocast(counted.device.type, enabled=False):
            value, gradients = _value_and_gradients(student, teacher, counted, heads, wanted)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(scale_saved(one, upstream) for one in ctx.saved_tensors)


def _value_and_gradients(
    student: _Side, teacher: _Side, counted: Tensor, heads: int, wanted: bool
) -> tuple[Tensor, list[Tensor]]:
    loss = KDLoss(1.0, soft_weight=1.0, hard_weight=0.0, reduction="sum")
    first = student.tensors[0]
    dtype = row_dtype(first.dtype)
    value = torch.zeros((), dtype=dtype, device=first.device)
    # A chunk writes rows of its own into the first; into the others, of keys, every chunk adds: not in 16 bits.
    gradients = [
        torch.zeros_like(one, dtype=dtype if number else kept_dtype(one.dtype))
        for number, one in enumerate(student.tensors if wanted else ())
    ]
    for chunk in _chunks(counted, max(student.heads, teacher.heads)):
        leaves = [part.detach().to(dtype).requires_grad_(wanted) for part in student.parts(chunk)]
        taught = teacher.logits([part.detach().to(dtype) for part in teacher.parts(chunk)], chunk, heads)
        weights = None
        if chunk.live is not None:
            weights = chunk.live[:, None].expand(taught.shape[:-1]).to(dtype)
        with torch.set_grad_enabled(wanted):
            rows = student.logits(leaves, chunk, heads)
            found: Any = loss(rows, taught, weights=weights)
        value += found.detach()
        if wanted:
            parts = torch.autograd.grad(found, leaves)
            for part, (gradient, place) in zip(parts, student.places(gradients, chunk), strict=True):
                gradient[place] += (part / heads).to(gradient.dtype)
    kept = [one.to(kept_dtype(given.dtype)) for one, given in zip(gradients, student.tensors, strict=False)]
    return value / heads, kept


def _chunks(counted: Tensor, heads: int) -> Iterator[Chunk]:
    """Queries that count, of one row of the batch; where the host cannot know them, all queries of some rows."""
    batch, keys = counted.shape
    device = counted.device
    room = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * heads * keys)  # queries
    if device.type == "cpu":
        for number in range(batch):
            queries = counted[number].nonzero()[:, 0]
            for some in queries.split(max(room, 1)):
                if len(some):
                    yield Chunk(slice(number, number + 1), some, None)
        return
    rows = max(room // keys, 1)
    for first in range(0, batch, rows):
        for some in torch.arange(keys, dtype=torch.int64, device=device).split(min(max(room, 1), keys)):
            part = slice(first, first + rows)
            yield Chunk(part, some, counted[part, some])
