"""What the host prepares for a launch: a tensor's rows, the shape of a step, the numbers of a loss, options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu.divergences import Divergence
from fastkd.kernels.gpu.elementary import LOG2E
from fastkd.kernels.gpu.mixes import parameters_of
from fastkd.rows import RowSpec, row_layout

# --- rows -------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A tensor's rows as kernels take them; strides in elements. See `fastkd.rows.RowLayout`."""

    pointer: Any
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(tensor: Tensor) -> Rows:
    layout = row_layout(tensor)
    if layout is None:
        raise ValueError(
            f"rows of a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} do not lie at two strides"
        )
    return Rows(tensor, layout.inner, layout.outer_stride, layout.inner_stride)


# --- blocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """The compile-time shape of a step. See `blocks`."""

    threads: int
    vectors: int
    width: int
    edges: bool  # False: every row is known to consist of whole vectors
    aligned: bool  # a vector may start at element 0
    stages: int  # of the loops over a row; above 1 a step's logits are copied to shared memory during the step before
    ctas: int = 1  # thread blocks that have the threads: a cluster, where there are several
    shared: bool = False  # several thread blocks write a row
    slices: int = 1  # that a row is cut into, a power of two, and how often each is visited: see `tickets`
    phases: int = 1


#: Thread blocks on a multiprocessor where they share rows: while one exchanges sums or waits for them, another works.
SHARING = 2

# A row of more than so many columns gets so many threads. Wide rows want few rows in flight, so that the next sweep
# over a row still finds much of it in the L2 cache: 512 threads are one row per multiprocessor, or two if registers
# allow.
_THREADS = ((16384, 512), (4096, 256), (0, 128))

# From a compute capability on, loops have so many stages where a thread loads fewer bytes in a step than that. To move
# B bytes a second with a latency of 800 ns, B · 800 ns must be on the way. Of 512 threads on each multiprocessor an
# A100 wants 30 bytes each, an H100 40, an H200 57 and a B200 84. Plain loads have a step's bytes on the way, 64 of a
# student and a teacher; those of a student alone are met by as many that are stored. A stage more adds a step's bytes,
# for an instruction per logit and a barrier per step. Reasoned so, and not measured on any GPU.
_STAGES = ((100, 96, 2),)


def block_for(tensors: Sequence[Tensor], count: int, vectors: int = 2, *, loaded: int = 1, busy: bool = False) -> Block:
    """The block for rows of `count` columns of `tensors`, of which the first decides where vectors start.

    A thread takes so many `vectors` of each row in a step, which reads as many of the tensors as are `loaded`. A kernel
    is `busy` if its instructions take longer than its loads: copies ahead would only add to them. The block is for the
    current device.
    """
    width = 16 // max(tensor.element_size() for tensor in tensors)
    threads = next((threads for above, threads in _THREADS if count > above), _THREADS[-1][1])
    starts = [_starts(tensor, width) for tensor in tensors]
    whole = count % width == 0 and all(start == (0, None) for start in starts)
    stages = 1 if busy else _stages(16 * vectors * loaded)
    return Block(threads, vectors, width, not whole, starts[0][0] == 0, stages)


def _stages(step_bytes: int) -> int:
    """Of loops in which a thread loads so many bytes in a step. AMD's compiler would keep them all in registers."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return 1
    return next((stages for since, below, stages in _STAGES if target.arch >= since and step_bytes < below), 1)


def co_aligned(tensor: Tensor | None, leader: Tensor, block: Block) -> bool:
    """Whether vectors that are aligned in every row of `leader` are aligned in `tensor` too."""
    return tensor is not None and _starts(tensor, block.width) == _starts(leader, block.width)


def _starts(tensor: Tensor, width: int) -> tuple[int, tuple[int, int, int] | None]:
    """Where rows begin, modulo the vector width: the first row, and what the other rows depend on, if they differ."""
    rows = rows_of(tensor)
    strides = (rows.outer_stride % width, rows.inner_stride % width)
    first = tensor.data_ptr() // tensor.element_size() % width
    return first, None if strides == (0, 0) else (rows.inner, *strides)


# --- the numbers of a loss --------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """The scalars that a loss kernel computes with."""

    student_inverse: float  # 1 / T
    teacher_inverse: float
    student_scale: float  # log2(e) / T, rounded once
    teacher_scale: float
    soft_weight: float  # divided by what the gradient is divided by
    hard_weight: float
    a: Any  # a parameter, or those of a mix: see `mixes`
    b: float  # a parameter as a is, or the ratio of a row: see `points.with_ratio`


def numbers_for(spec: RowSpec, divergence: Divergence) -> Numbers:
    a, b = parameters_of(spec)
    return Numbers(
        student_inverse=1 / spec.temperature,
        teacher_inverse=1 / spec.teacher_temperature,
        student_scale=LOG2E.value / spec.temperature,
        teacher_scale=LOG2E.value / spec.teacher_temperature,
        soft_weight=spec.soft_weight / (spec.vocab_size if divergence.sweeps == "raw" else spec.temperature),
        hard_weight=spec.hard_weight,
        a=a,
        b=b,
    )


# --- the launch itself ------------------------------------------------------------------------------------------


def launch_options(block: Block, rows: int = 1) -> dict[str, Any]:
    """Keyword arguments of a launch; a warp has 32 threads or, on AMD's CDNA, 64.

    `rows` is how many rows of 512 threads a multiprocessor is to hold at least.
    """
    target = triton.runtime.driver.active.get_current_target()
    threads = block.threads // block.ctas
    options = {"num_warps": threads // target.warp_size, "num_stages": 1, "enable_fp_fusion": True}
    if target.backend == "cuda":
        # Left alone, ptxas prefers spilling to fewer rows in flight.
        options["maxnreg"] = min(255, 65536 // (threads * (SHARING if block.shared else rows)))
    if block.ctas > 1:
        options["num_ctas"] = block.ctas
    return options


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    device = tensor.device
    if device.type == "cpu":
        return _THIS_DEVICE
    module = getattr(torch, device.type)
    return _THIS_DEVICE if module.current_device() == device.index else module.device(device)


_THIS_DEVICE = nullcontext()
