"""Several teachers as one: logits of which the softmax is the weighted mean of theirs.

Each row is read once for its normaliser and once more for what is written, over all teachers at a time. `teachers` are
`launch.Rows`, `shares` the base-2 logarithms of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.blocks import (
    edge_columns,
    last_columns,
    leading_row,
    load_logits,
    row_beside,
    whole_columns,
    whole_steps,
)
from fastkd.kernels.gpu.elementary import LN2, LOG2E, log2
from fastkd.kernels.gpu.lanes import finite, lane_max, lane_sum, per_thread
from fastkd.kernels.gpu.launch import block_for, co_aligned, device_of, launch_options, rows_of


@triton.jit
def _observe(logits, at, found, scale):
    """Per thread: maximum, and the sum of exponentials relative to it."""
    highest, total = found
    columns, present = at
    x = load_logits(logits, columns, present, "evict_last")
    new = tl.maximum(highest, lane_max(x))
    e = tl.exp2((x - finite(new)[None, :, None]) * scale)
    return new, total * tl.exp2((highest - finite(new)) * scale) + lane_sum(e)


@triton.jit
def _normaliser(logits, span, scale, BLOCK: tl.constexpr):
    """The row's maximum, and log2 of its sum of exponentials relative to that."""
    none = per_thread(BLOCK)
    found = (none - float("inf"), none)
    for step in tl.range(0, whole_steps(span, BLOCK), num_stages=BLOCK.stages):
        found = _observe(logits, (whole_columns(step, BLOCK), None), found, scale)
    found = _observe(logits, last_columns(span, BLOCK), found, scale)
    if BLOCK.edges:
        found = _observe(logits, edge_columns(span, BLOCK), found, scale)
    top = tl.max(found[0], 0)
    return finite(top), tl.log2(tl.sum(found[1] * tl.exp2((found[0] - finite(top)) * scale), 0))


class Teacher(NamedTuple):
    """A teacher's row: log2(w·p) of a column is (z − top)·scale − shift."""

    vectors: Any
    top: Any
    shift: Any


@triton.jit
def _teacher(rows, share, index, span, scale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A tuple of it alone."""
    vectors = row_beside(rows, index, span, ALIGNED, BLOCK).vectors
    top, total = _normaliser(vectors, span, scale, BLOCK)
    return (Teacher(vectors, top, total - share),)


@triton.jit
def _mix_step(out, mixed, least, at, scale, back, COUNT: tl.constexpr):
    """`least` of all shifts is left out: a constant of the row, beside which small differences would round away."""
    columns, present = at
    best = tl.full(columns.shape, float("-inf"), tl.float32)
    total = tl.zeros(columns.shape, tl.float32)
    for i in tl.static_range(COUNT):
        z = load_logits(mixed[i].vectors, columns, present, "evict_first")
        y = (z - mixed[i].top) * scale - (mixed[i].shift - least)
        new = tl.maximum(best, y)
        total = total * tl.exp2(best - finite(new)) + tl.exp2(y - finite(new))
        best = new
    tl.store(out + columns, (best + log2(total)) * back, present)


@triton.jit
def _mix_kernel(
    teachers,
    out_rows,
    shares,
    scales,
    scale,
    back,
    width,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    wanted = True
    if scales is not None:
        wanted = tl.load(scales + index) != 0
    if wanted:
        _, span = leading_row(teachers[0], index, width, BLOCK)
        mixed = _teacher(teachers[0], shares[0], index, span, scale, ALIGNED[0], BLOCK)
        least = mixed[0].shift
        for i in tl.static_range(1, COUNT):
            mixed = mixed + _teacher(teachers[i], shares[i], index, span, scale, ALIGNED[i], BLOCK)
            least = tl.minimum(least, mixed[i].shift)

        out = row_beside(out_rows, index, span, OUT_ALIGNED, BLOCK).vectors
        _mix_step(out, mixed, least, last_columns(span, BLOCK), scale, back, COUNT)
        steps = whole_steps(span, BLOCK)
        for step in tl.range(0, steps, num_stages=BLOCK.stages):
            at = (whole_columns(steps - 1 - step, BLOCK), None)
            _mix_step(out, mixed, least, at, scale, back, COUNT)
        if BLOCK.edges:
            _mix_step(out, mixed, least, edge_columns(span, BLOCK), scale, back, COUNT)


def mix_rows(
    teachers: Sequence[Tensor], weights: Sequence[float], temperature: float, scale: Tensor | None, out: Tensor
) -> None:
    """See `fastkd.backend.Backend.mix_rows`."""
    rows, width = out.shape
    if rows == 0:
        return
    with device_of(out):
        block = block_for([*teachers, out], width, busy=True)
        _mix_kernel[(rows,)](
            tuple(rows_of(teacher) for teacher in teachers),
            rows_of(out),
            tuple(math.log2(weight) for weight in weights),
            scale,
            LOG2E.value / temperature,
            LN2.value * temperature,
            width,
            len(teachers),
            tuple(co_aligned(teacher, teachers[0], block) for teacher in teachers),
            co_aligned(out, teachers[0], block),
            block,
            **launch_options(block),
        )
