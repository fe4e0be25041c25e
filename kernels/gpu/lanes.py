"""What each thread of a program keeps of its columns, [threads], and how a step's block becomes that."""

from __future__ import annotations

import triton
import triton.language as tl


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
