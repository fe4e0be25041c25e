"""How the kernels walk a row: where it starts, which columns a program loads together, and how wide the loads are.

One program owns one row. A row is read as vectors of `width` elements (16 bytes of the widest dtype involved), each by
one thread, `vectors` per thread and step. Rows of an odd vocabulary start anywhere, so the columns before the first
aligned vector and after the last whole one, at most 2·(width − 1), are the row's edges and are read one by one, in a
step of their own. What remains is masked in whole vectors, which keeps the loads wide. Blocks are [vectors, threads,
width] and sums are kept per thread, [threads]: inside the loop no thread waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.rows import row_layout


class Rows(NamedTuple):
    """A tensor's rows as kernels take them; strides in elements. See `fastkd.ops.RowLayout`."""

    pointer: Any
    inner: int
    outer_stride: int
    inner_stride: int


@dataclass(frozen=True)
class Block:
    """The compile-time shape of a step."""

    threads: int
    vectors: int
    width: int
    edges: bool  # False: every row is known to consist of whole vectors
    aligned: bool  # a vector may start at element 0


class Span(NamedTuple):
    """A row cut into `head` columns, `vectors` aligned vectors and what follows; `edges` columns are in no vector."""

    head: Any
    vectors: Any
    edges: Any


# --- on the host ------------------------------------------------------------------------------------------------

# Vocabulary above which a row gets so many threads. Wide rows want few rows in flight, so that the next sweep over a
# row still finds much of it in the L2 cache: 512 threads are one row per multiprocessor, or two if registers allow.
_THREADS = ((16384, 512), (4096, 256), (0, 128))


def rows_of(tensor: Tensor) -> Rows:
    layout = row_layout(tensor)
    if layout is None:
        raise ValueError(
            f"rows of a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} do not lie at two strides"
        )
    return Rows(tensor, layout.inner, layout.outer_stride, layout.inner_stride)


def block_for(tensors: Sequence[Tensor], count: int, vectors: int = 2) -> Block:
    """The block for rows of `count` columns of `tensors`, of which the first decides where vectors start.

    `vectors` of each row are a thread's share of a step.
    """
    width = 16 // max(tensor.element_size() for tensor in tensors)
    threads = next(threads for above, threads in _THREADS if count > above)
    starts = [_starts(tensor, width) for tensor in tensors]
    whole = count % width == 0 and all(start == (0, None) for start in starts)
    return Block(threads, vectors, width, not whole, aligned=starts[0][0] == 0)


def co_aligned(tensor: Tensor | None, leader: Tensor, block: Block) -> bool:
    """Whether vectors that are aligned in every row of `leader` are aligned in `tensor` too."""
    return tensor is not None and _starts(tensor, block.width) == _starts(leader, block.width)


def _starts(tensor: Tensor, width: int) -> tuple[int, tuple[int, int, int] | None]:
    """Where rows begin, modulo the vector width: the first one, and what the others depend on, if they differ."""
    rows = rows_of(tensor)
    strides = (rows.outer_stride % width, rows.inner_stride % width)
    first = tensor.data_ptr() // tensor.element_size() % width
    return first, None if strides == (0, 0) else (rows.inner, *strides)


def launch_options(block: Block) -> dict[str, Any]:
    """Keyword arguments of a launch; a warp has 32 threads or, on AMD's CDNA, 64."""
    target = triton.runtime.driver.active.get_current_target()
    options = {"num_warps": block.threads // target.warp_size, "num_stages": 1, "enable_fp_fusion": True}
    if target.backend == "cuda":
        # Left alone, ptxas prefers spilling to fewer rows in flight.
        options["maxnreg"] = min(255, 65536 // block.threads)
    return options


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)  # type: ignore[no-any-return]


# --- in kernels -------------------------------------------------------------------------------------------------


@triton.jit
def row_offset(rows, row):
    """Where a row begins, in elements; 64 bits, since tensors exceed 2³¹ elements."""
    outer = (row // rows.inner).to(tl.int64) * rows.outer_stride
    return outer + (row % rows.inner).to(tl.int64) * rows.inner_stride


@triton.jit
def span_of(pointer, offset, count, BLOCK: tl.constexpr):
    """How the row `offset` elements behind `pointer` is cut: its vectors start where the address allows."""
    if BLOCK.edges:
        element = offset
        if not BLOCK.aligned:
            element += pointer.to(tl.int64) // (pointer.dtype.element_ty.primitive_bitwidth // 8)
        head = ((BLOCK.width - element % BLOCK.width) % BLOCK.width).to(tl.int32)
        vectors = tl.maximum(count - head, 0) // BLOCK.width
        return Span(head, vectors, count - vectors * BLOCK.width)
    else:
        return Span(0, count // BLOCK.width, 0)


@triton.jit
def first_vector(pointer, offset, span, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointer to the first aligned column of a row, which `edge_columns` and `vector_columns` count from.

    The compiler is told what it cannot see. For AMD's buffer instructions it looks at the offset, not at the pointer.
    """
    start = offset + span.head
    ELEMENTS: tl.constexpr = BLOCK.width
    BYTES: tl.constexpr = BLOCK.width * pointer.dtype.element_ty.primitive_bitwidth // 8
    if ALIGNED and BLOCK.aligned:
        return pointer + tl.multiple_of(start, ELEMENTS)
    elif ALIGNED:
        return tl.multiple_of(pointer + start, BYTES)
    else:
        return pointer + start


@triton.jit
def steps_of(span, BLOCK: tl.constexpr):
    return tl.cdiv(span.vectors, BLOCK.vectors * BLOCK.threads)


@triton.jit
def vector_columns(step, span, BLOCK: tl.constexpr):
    """Columns [vectors, threads, width] of a step and which vectors [vectors, threads, 1] exist."""
    thread = tl.arange(0, BLOCK.threads)[None, :, None]
    vector = (step * BLOCK.vectors + tl.arange(0, BLOCK.vectors)[:, None, None]) * BLOCK.threads + thread
    return vector * BLOCK.width + tl.arange(0, BLOCK.width)[None, None, :], vector < span.vectors


@triton.jit
def edge_columns(span, BLOCK: tl.constexpr):
    """The row's edges, [1, threads, 1]: columns before the first vector (negative) and after the last."""
    thread = tl.arange(0, BLOCK.threads)[None, :, None]
    column = thread - span.head
    return tl.where(column < 0, column, column + span.vectors * BLOCK.width), thread < span.edges


@triton.jit
def load_logits(pointer, columns, present, POLICY: tl.constexpr):
    """Logits in fp32, −inf (probability 0) where `present` is false."""
    return tl.load(pointer + columns, present, other=float("-inf"), eviction_policy=POLICY).to(tl.float32)


@triton.jit
def per_thread(BLOCK: tl.constexpr):
    """A zero per thread, fp32. Before Triton 3.8 a list may not hold a field of a constexpr."""
    THREADS: tl.constexpr = BLOCK.threads
    return tl.zeros([THREADS], tl.float32)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def finite(maximum):
    """The maximum as something to subtract: 0 while only −inf has been seen, for −inf − −inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _clear_step(pointer, at):
    columns, present = at
    tl.store(pointer + columns, tl.zeros(columns.shape, tl.float32), present)


@triton.jit
def clear_row(pointer, span, BLOCK: tl.constexpr):
    """Write 0 to the row whose first vector is at `pointer`."""
    for step in range(steps_of(span, BLOCK)):
        _clear_step(pointer, vector_columns(step, span, BLOCK))
    if BLOCK.edges:
        _clear_step(pointer, edge_columns(span, BLOCK))


@triton.jit
def clear_tail(row, start, stop, BLOCK: tl.constexpr):
    """Write 0 to columns [start, stop) of the row that begins at `row`."""
    for step in range(tl.cdiv(stop - start, BLOCK.threads)):
        column = start + step * BLOCK.threads + tl.arange(0, BLOCK.threads)
        tl.store(row + column, per_thread(BLOCK), column < stop)
