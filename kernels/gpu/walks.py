"""The ways to walk a row of dense logits, and which one a call takes.

| walk | who shares a row | what the second read of a row finds | needs |
|---|---|---|---|
| sweeps | one thread block | the L2 cache, as far as the rows in flight fit into it | nothing |
| cluster | 2 to 16 thread blocks, each with a slice of the row | its slice, in the L1 cache | clusters, Triton 3.8 |
| tickets | thread blocks that claim slices of rows in order | its slice, in the L2 cache | a gradient |

A thread block that sweeps a whole row keeps its multiprocessor busy with it for long: 132 of them have 68 MB of rows in
flight at 128256 columns of bf16, and an H100's L2 cache has 50 MB. Slices are small. So few bytes are in flight that
every byte comes from DRAM once, and a few rows occupy the whole GPU.

None of them has been timed on a GPU. So all calls take the first, unless the environment variable FASTKD_WALK names
another, which is taken wherever it can be.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu.dense import run_sweeps
from fastkd.kernels.gpu.divergences import DIVERGENCES, Divergence
from fastkd.kernels.gpu.frame import Launch
from fastkd.kernels.gpu.launch import Block, block_for
from fastkd.kernels.gpu.mode import Mode
from fastkd.kernels.gpu.tickets import run_tickets

__all__ = ["CLUSTER_TRITON", "WALKS", "Swept", "Walk", "offered", "sweeping", "walk_for"]

#: Bytes of both rows in a slice. Of a cluster two fit into the L1 cache of 256 KiB. With tickets, those that lie
#: between two phases, some 300 or 600, fit into what an L2 cache of 50 MB can hold of different data.
_CLUSTER_SLICE, _TICKET_SLICE = 64 << 10, 32 << 10
#: The first Triton whose reductions go across a cluster.
CLUSTER_TRITON = (3, 8)
#: Slices of a row, and the threads of each; a cluster cannot have more than 16 thread blocks.
_SLICES, _THREADS = (2, 4, 8, 16, 32), 256


class Swept(NamedTuple):
    """What a loss kernel walks over."""

    logits: Sequence[Tensor]  # of the student and, if there is one, of the teacher
    grad: Tensor | None
    columns: int
    divergence: Divergence

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [*self.logits, *([] if self.grad is None else [self.grad])]


class Walk(NamedTuple):
    """A kernel and its block."""

    run: Callable[[Launch, Divergence, Mode, Block], None]
    block: Block


def sweeping(swept: Swept) -> Walk:
    """A thread block per row, or per tile of it."""
    divergence = swept.divergence
    busy = divergence.sweeps == "normalised"
    block = block_for(swept.tensors, swept.columns, divergence.vectors, loaded=len(swept.logits), busy=busy)
    return Walk(run_sweeps, block)


def _clusters(swept: Swept) -> Walk | None:
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or not 90 <= target.arch < 120 or _triton() < CLUSTER_TRITON:
        return None
    ctas = min(_slices(swept, _CLUSTER_SLICE), 16)
    return Walk(run_sweeps, _shared(swept, threads=ctas * _THREADS, ctas=ctas))


def _tickets(swept: Swept) -> Walk | None:
    if swept.grad is None:
        return None
    phases = 3 if swept.divergence.sweeps == "normalised" and len(swept.logits) == 2 else 2
    # Divergences that take one vector at a step need more registers than 256 threads leave.
    threads = _THREADS // 2 * swept.divergence.vectors
    block = _shared(swept, threads=threads, slices=_slices(swept, _TICKET_SLICE), phases=phases)
    return Walk(run_tickets, block)


def _shared(swept: Swept, **fields: int) -> Block:
    """A block of thread blocks that share rows. While one waits the other loads: nothing is copied ahead."""
    return replace(sweeping(swept).block, stages=1, shared=True, **fields)


def _slices(swept: Swept, size: int) -> int:
    """How many slices a row is cut into, so that none has more than `size` bytes of logits."""
    row = swept.columns * sum(tensor.element_size() for tensor in swept.logits)
    return next((slices for slices in _SLICES if row <= slices * size), _SLICES[-1])


@functools.cache
def _triton() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


_WALKS: dict[str, Callable[[Swept], Walk | None]] = {"sweeps": sweeping, "cluster": _clusters, "tickets": _tickets}
#: Values of FASTKD_WALK.
WALKS = tuple(_WALKS)


def offered() -> tuple[str, ...]:
    """The walks that the current device can take, for rows of 16 bits and a common vocabulary."""
    row = torch.empty(1, 50257, dtype=torch.bfloat16, device="cpu")
    swept = Swept([row, row], row, 50257, DIVERGENCES["forward_kl"])
    return tuple(name for name, walk in _WALKS.items() if walk(swept) is not None)


def walk_for(swept: Swept) -> Walk:
    """How to walk whole rows on the current device.

    Raises ValueError where FASTKD_WALK is none of `WALKS`.
    """
    name = os.environ.get("FASTKD_WALK", "sweeps")
    if name not in _WALKS:
        raise ValueError(f"FASTKD_WALK={name!r}: choose one of {', '.join(WALKS)}, or unset it")
    return _WALKS[name](swept) or sweeping(swept)
