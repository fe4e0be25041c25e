"""The ways to walk a row of dense logits, and which one a call takes.

| walk | who shares a row | what the second read of a row finds | needs |
|---|---|---|---|
| sweeps | one thread block | the L2 cache, as far as the rows in flight fit into it | nothing |
| cluster | 2 to 16 thread blocks, each with a slice of the row | its slice, in the L1 cache | clusters, Triton 3.8 |

A thread block that sweeps a whole row keeps its multiprocessor busy with it for long: 132 of them have 68 MB of rows in
flight at 128256 columns of bf16, and an H100's L2 cache has 50 MB. A cluster's slices are small. So few bytes are in
flight that every byte comes from DRAM once, and a few rows occupy the whole GPU.

None of them has been timed on a GPU. So all calls take the first, unless the environment variable FASTKD_WALK names
another, which is taken wherever it can be.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import triton
from torch import Tensor

from fastkd.kernels.gpu.launch import Block, block_for

__all__ = ["CLUSTER_TRITON", "WALKS", "walk_for"]

#: Of both rows, in bytes. With the slice of a second cluster it fits into the L1 cache of 256 KiB.
_SLICE = 64 << 10
#: The first Triton whose reductions go across a cluster.
CLUSTER_TRITON = (3, 8)
#: Thread blocks of a cluster; more than 16 there cannot be.
_CTAS, _THREADS = (2, 4, 8, 16), 256


def _cluster(tensors: Sequence[Tensor], count: int, vectors: int) -> Block | None:
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or not 90 <= target.arch < 120 or _triton() < CLUSTER_TRITON:
        return None
    row = count * sum(tensor.element_size() for tensor in tensors[:2])
    ctas = next((ctas for ctas in _CTAS if row <= ctas * _SLICE), _CTAS[-1])
    return replace(block_for(tensors, count, vectors), threads=ctas * _THREADS, ctas=ctas)


@functools.cache
def _triton() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


_WALKS: dict[str, Callable[[Sequence[Tensor], int, int], Block | None]] = {"sweeps": block_for, "cluster": _cluster}
#: Values of FASTKD_WALK.
WALKS = tuple(_WALKS)


def walk_for(tensors: Sequence[Tensor], count: int, vectors: int) -> Block:
    """The block for rows of `count` columns of student, teacher and gradient.

    Raises ValueError where FASTKD_WALK is none of `WALKS`.
    """
    name = os.environ.get("FASTKD_WALK", "sweeps")
    if name not in _WALKS:
        raise ValueError(f"FASTKD_WALK={name!r}: choose one of {', '.join(WALKS)}, or unset it")
    return _WALKS[name](tensors, count, vectors) or block_for(tensors, count, vectors)
