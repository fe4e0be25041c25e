"""`fastkd.plan`: what a loss from hidden states will do, and how long it would take at a GPU's rates.

The time is a roofline: a product takes as long as its arithmetic or the bytes that it reads and writes, whichever is
longer; the row kernel and the rounding of gradients as long as their bytes. Nothing is added for launches, and nothing
overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fastkd import arguments
from fastkd.divergences import Divergence, resolve
from fastkd.projection.devices import GPUS, Gpu, gpu_of
from fastkd.projection.plan import HeadSize, Plan, plan_for
from fastkd.projection.products import gradient_dtype, operand_of
from fastkd.rows import Wants, kept_dtype

__all__ = ["plan", "product_seconds"]


def plan(
    tokens: int,
    vocab_size: int,
    student_hidden: int | None,
    teacher_hidden: int | Sequence[int] | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gpu: str | None = None,
    memory_budget: int | None = None,
    divergence: str | Divergence = "forward_kl",
) -> Plan:
    """What `KDLoss` will do with projections of these sizes: chunks, bytes, FLOPs and, on GPUs, an estimate of time.

    Args:
        tokens: rows of the batch that count: those not masked on the CPU, or where their number is known (`live=`).
        vocab_size: columns of the output heads that count.
        student_hidden: H of the student, or None where it comes as a tensor of logits.
        teacher_hidden: H of the teacher, or None where it comes as logits or there is none; of a `fastkd.Mixture` a
            sequence, of its projections, also where it has but one beside logits. No mixture is computed in tiles.
        dtype: of hidden states and weights.
        device: where they are.
        gpu: plan for this kind of GPU in place of the machine's, with all of its memory free: "A100" (80 GB, SXM),
            "H100" (SXM), "H200", "B200" or "MI300X". With device="cuda".
        memory_budget: bytes of working memory, beside the gradients; None for the default of the device, on a GPU a
            share of what it has free now.
        divergence: some keep more per token than others.

    Assumes that both the student's hidden states and its head get a gradient, at an integer temperature up to 4; in the
    estimate of time also that a teacher without hidden size comes as logits.
    Raises ValueError where the budget is too small for any strategy, naming the smallest that is not, and for a GPU of
    another name.
    """
    device = torch.device(device)
    sizes = {"tokens": tokens, "vocab_size": vocab_size}
    mixed = isinstance(teacher_hidden, Sequence)
    taught = () if teacher_hidden is None else teacher_hidden
    taught = (*taught,) if isinstance(taught, Sequence) else (taught,)
    if student_hidden is not None:
        sizes["student_hidden"] = student_hidden
    for name, value in (*sizes.items(), *(("teacher_hidden", width) for width in taught)):
        arguments.integer(name, value, least=1)
    if student_hidden is None and not taught:
        raise ValueError("student_hidden and teacher_hidden are both None: losses on logits need no plan")
    if gpu is not None and (gpu not in GPUS or device.type != "cuda"):
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, with device='cuda', got {gpu!r} with {str(device)!r}")
    size = dtype.itemsize
    on_cpu = device.type == "cpu" and dtype != torch.float64
    operand = operand_of(dtype, device) if on_cpu else dtype  # another device may not be there to be asked
    gradient = gradient_dtype(operand, device)

    def head(width: int) -> HeadSize:
        return HeadSize(width, size, kept_dtype(dtype).itemsize, size, operand.itemsize, gradient.itemsize)

    student = None if student_hidden is None else head(student_hidden)
    teachers = [head(width) for width in taught]
    wants, found = Wants(hidden=True, weight=student is not None, bias=False), resolve(divergence)
    memory = None if gpu is None else GPUS[gpu].memory
    tiles = not mixed  # teachers are mixed in whole rows
    planned = plan_for(
        tokens, vocab_size, student, teachers, wants, found, device, memory_budget, tiles_allowed=tiles, free=memory
    )
    card = gpu_of(device) if gpu is None else GPUS[gpu]
    if card is None or size == 8:
        return planned
    return replace(planned, milliseconds=1e3 * _seconds(planned, student, teachers, size, found.normalised, card))


def product_seconds(m: int, k: int, n: int, operand_bytes: int, result_bytes: float, gpu: Gpu) -> float:
    """`[m, k]` times `[k, n]`; `result_bytes` are those per element of the result, read and written."""
    flops = gpu.flops_16 if operand_bytes == 2 else gpu.flops_32
    moved = operand_bytes * (m * k + k * n) + result_bytes * m * n
    return max(2 * m * k * n / flops, moved / gpu.bytes)


def _seconds(
    plan: Plan, student: HeadSize | None, teachers: Sequence[HeadSize], size: int, normalised: bool, gpu: Gpu
) -> float:
    passes = 1 if plan.strategy == "chunks" else 2 + normalised
    seconds = 0.0
    for group, groups in _parts(plan.tokens, plan.group):
        for width, tiles in _parts(plan.vocab_size, plan.tile):
            for chunk, chunks in _parts(group, plan.chunk):
                for side in (student, *teachers):
                    if side is not None:
                        product = product_seconds(chunk, side.hidden_size, width, side.operand_bytes, 4, gpu)
                        seconds += groups * tiles * chunks * passes * product
            if student is not None:
                h, operand = student.hidden_size, student.operand_bytes
                # The first into memory that holds nothing, the others on top of it.
                d_hidden = product_seconds(group, width, h, operand, _mean_traffic(plan.vocab_size, plan.tile), gpu)
                d_weight = product_seconds(width, group, h, operand, _mean_traffic(plan.tokens, plan.group), gpu)
                seconds += groups * tiles * (d_hidden + d_weight)
    read = (4 if student is not None else size) + (4 if teachers else size)
    written = size if student is None else student.gradient_bytes
    moved = plan.tokens * plan.vocab_size * ((2 + normalised) * read + written)
    if len(teachers) > 1:
        moved += plan.tokens * plan.vocab_size * (2 * len(teachers) + 1) * 4  # mixed: each read twice, one row written
    if student is not None and size == 2:
        moved += (plan.tokens + plan.vocab_size) * student.hidden_size * (4 + size)  # fp32 sums, rounded
    return seconds + moved / gpu.bytes


def _mean_traffic(total: int, step: int) -> float:
    """Bytes of fp32 read and written per element of a sum that is made in steps, for each."""
    count = -(-total // step)
    return (8 * count - 4) / count


def _parts(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(size, how many) of the parts that steps make of a total."""
    if total >= step:
        yield step, total // step
    if total % step:
        yield total % step, 1
