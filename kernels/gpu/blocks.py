"""How a kernel walks a row: where the row starts, which columns a program loads together, how wide the loads are.

One program owns one row. A row is read as vectors of `width` elements (16 bytes of the widest dtype involved), each by
one thread, `vectors` per thread and step. Rows of an odd vocabulary start anywhere, so the columns before the first
aligned vector and after the last whole one, at most 2·(width − 1), are the row's edges and are read one by one, in a
step of their own. What remains are whole steps, without masks, and a last one that is masked in whole vectors, which
keeps its loads wide. Blocks are [vectors, threads, width] and sums are kept per thread, [threads]: inside the loop no
thread waits for another.

`rows` is a `launch.Rows` and `BLOCK` a `launch.Block`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.lanes import per_thread


class Span(NamedTuple):
    """A row, or a part of it, cut into aligned vectors and `edges` columns that are in none.

    `head` of them come before the first vector, the others `tail` columns behind it.
    """

    head: Any
    vectors: Any
    edges: Any
    tail: Any


class Row(NamedTuple):
    """One row in memory: pointers to its first column and to its first aligned vector."""

    columns: Any
    vectors: Any


# --- where a row lies -------------------------------------------------------------------------------------------


@triton.jit
def row_offset(rows, index):
    """Where a row begins, in elements; 64 bits, since tensors exceed 2³¹ elements."""
    outer = (index // rows.inner).to(tl.int64) * rows.outer_stride
    return outer + (index % rows.inner).to(tl.int64) * rows.inner_stride


@triton.jit
def span_of(pointer, offset, count, BLOCK: tl.constexpr):
    """How the row `offset` elements behind `pointer` is cut: its vectors start where the address allows."""
    if BLOCK.edges:
        element = offset
        if not BLOCK.aligned:
            element += pointer.to(tl.int64) // (pointer.dtype.element_ty.primitive_bitwidth // 8)
        head = ((BLOCK.width - element % BLOCK.width) % BLOCK.width).to(tl.int32)
        vectors = tl.maximum(count - head, 0) // BLOCK.width
        return Span(head, vectors, count - vectors * BLOCK.width, vectors * BLOCK.width)
    else:
        return Span(0, count // BLOCK.width, 0, 0)


@triton.jit
def first_vector(pointer, offset, span, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointer to the first aligned column of a row, which the columns of all steps are counted from.

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
def leading_row(rows, index, count, BLOCK: tl.constexpr):
    """The row that decides where vectors start, and its `Span`."""
    offset = row_offset(rows, index)
    span = span_of(rows.pointer, offset, count, BLOCK)
    return Row(rows.pointer + offset, first_vector(rows.pointer, offset, span, True, BLOCK)), span


@triton.jit
def row_beside(rows, index, span, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A row that is read or written in the steps of the leading row; `ALIGNED`: its vectors are aligned too."""
    offset = row_offset(rows, index)
    return Row(rows.pointer + offset, first_vector(rows.pointer, offset, span, ALIGNED, BLOCK))


# --- which columns a step takes ---------------------------------------------------------------------------------


@triton.jit
def whole_steps(span, BLOCK: tl.constexpr):
    """How many steps have a vector for every thread: the loop of a sweep. One more step takes what they leave."""
    return span.vectors // (BLOCK.vectors * BLOCK.threads)


@triton.jit
def _vectors(step, BLOCK: tl.constexpr):
    thread = tl.arange(0, BLOCK.threads)[None, :, None]
    return (step * BLOCK.vectors + tl.arange(0, BLOCK.vectors)[:, None, None]) * BLOCK.threads + thread


@triton.jit
def whole_columns(step, BLOCK: tl.constexpr):
    """Columns [vectors, threads, width] of a whole step. All are present: None stands beside them for a mask.

    For a cluster flat, and in the order thread block, vector, thread, column: Triton spreads the outermost columns of a
    flat block over a cluster, and of other blocks the innermost. `as_vectors` makes of it what the others have.
    """
    if BLOCK.ctas > 1:
        LANES: tl.constexpr = BLOCK.vectors * BLOCK.threads * BLOCK.width
        return step * LANES + tl.arange(0, LANES)
    else:
        return _vectors(step, BLOCK) * BLOCK.width + tl.arange(0, BLOCK.width)[None, None, :]


@triton.jit
def columns_of(step, span, BLOCK: tl.constexpr):
    """Columns [vectors, threads, width] of any step and which vectors [vectors, threads, 1] exist; or flat as above."""
    column = whole_columns(step, BLOCK)
    if BLOCK.ctas > 1:
        return column, column < span.vectors * BLOCK.width
    else:
        return column, _vectors(step, BLOCK) < span.vectors


@triton.jit
def has_last(span, BLOCK: tl.constexpr):
    """Whether whole steps leave anything. Rows are taken to, but slices of rows have a few whole steps each."""
    if BLOCK.slices == 1:
        return True
    else:
        return span.vectors % (BLOCK.vectors * BLOCK.threads) > 0


@triton.jit
def last_columns(span, BLOCK: tl.constexpr):
    """The step behind the whole ones."""
    return columns_of(whole_steps(span, BLOCK), span, BLOCK)


@triton.jit
def edge_columns(span, BLOCK: tl.constexpr):
    """The row's edges, [1, threads, 1]: columns before the first vector (negative) and after the last."""
    thread = tl.arange(0, BLOCK.threads)[None, :, None]
    column = thread - span.head
    return tl.where(column < 0, column, column + span.tail), thread < span.edges


@triton.jit
def as_vectors(x, BLOCK: tl.constexpr):
    """What was loaded from flat columns, as [vectors, threads, width]; others as they are. Moves nothing."""
    if len(x.shape) == 1:
        OWN: tl.constexpr = BLOCK.threads // BLOCK.ctas
        x = tl.trans(tl.reshape(x, [BLOCK.ctas, BLOCK.vectors, OWN, BLOCK.width]), (1, 0, 2, 3))
        return tl.reshape(x, [BLOCK.vectors, BLOCK.threads, BLOCK.width])
    else:
        return x


@triton.jit
def as_columns(x, columns, BLOCK: tl.constexpr):
    """`as_vectors` undone: what is to be stored at `columns`."""
    if len(columns.shape) == 1:
        OWN: tl.constexpr = BLOCK.threads // BLOCK.ctas
        x = tl.trans(tl.reshape(x, [BLOCK.vectors, BLOCK.ctas, OWN, BLOCK.width]), (1, 0, 2, 3))
        return tl.reshape(x, columns.shape)
    else:
        return x


@triton.jit
def load_logits(pointer, columns, present, POLICY: tl.constexpr):
    """Logits in fp32, −inf (probability 0) where `present` is false; None: all are present."""
    if present is None:
        return tl.load(pointer + columns, eviction_policy=POLICY).to(tl.float32)
    else:
        return tl.load(pointer + columns, present, other=float("-inf"), eviction_policy=POLICY).to(tl.float32)


# --- writing zeros ----------------------------------------------------------------------------------------------


@triton.jit
def _clear_step(pointer, at):
    columns, present = at
    tl.store(pointer + columns, tl.zeros(columns.shape, tl.float32), present)


@triton.jit
def clear_row(pointer, span, BLOCK: tl.constexpr):
    """Write 0 to the row whose first vector is at `pointer`."""
    for step in range(whole_steps(span, BLOCK)):
        _clear_step(pointer, (whole_columns(step, BLOCK), None))
    _clear_step(pointer, last_columns(span, BLOCK))
    if BLOCK.edges:
        _clear_step(pointer, edge_columns(span, BLOCK))


@triton.jit
def clear_tail(row, start, stop, BLOCK: tl.constexpr):
    """Write 0 to columns [start, stop) of the row that begins at `row`."""
    for step in range(tl.cdiv(stop - start, BLOCK.threads)):
        column = start + step * BLOCK.threads + tl.arange(0, BLOCK.threads)
        tl.store(row + column, per_thread(BLOCK), column < stop)
