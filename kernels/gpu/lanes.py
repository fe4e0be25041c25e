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


# Threads exchange numbers through shared memory, or across a cluster, with a barrier for every field of a tuple that is
# reduced. A reduction of one block that holds all of them needs one.


@triton.jit
def pair_maxima(a, b):
    """Over all threads, of two [threads]."""
    return tl.split(tl.max(tl.join(a, b), 0))


@triton.jit
def pair_sums(a, b):
    """Over all threads, of two [threads]."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def row_sums(x):
    """Over all threads, of eight [threads]."""
    low = tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3]))
    high = tl.join(tl.join(x[4], x[5]), tl.join(x[6], x[7]))
    # Of what is joined last, split gives halves first.
    low, high = tl.split(tl.sum(tl.join(low, high), 0))
    ab, cd = tl.split(low)
    ef, gh = tl.split(high)
    return tl.split(ab) + tl.split(cd) + tl.split(ef) + tl.split(gh)
