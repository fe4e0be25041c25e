"""What the loss kernels are compiled for: every combination of these fields that occurs is a kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu.divergences import Divergence
from fastkd.kernels.gpu.launch import Block, co_aligned
from fastkd.rows import RowSpec, SparseRows, Tile


@dataclass(frozen=True)
class Mode:
    """Of both kernels."""

    stage: str  # "whole" rows, or a `rows.Tile.stage`
    hard: bool
    hard_power: int  # the power of e^(z/T) that the cross-entropy's e^z is, where it saves an exponential; else 0
    about_top: bool  # as in `Divergence`
    grad_aligned: bool  # vectors that are aligned in the student's rows are so in the gradient's


@dataclass(frozen=True)
class DenseMode(Mode):
    """Of the kernel in `dense`."""

    soft: str  # a `Divergence.sweeps` or, without a teacher, "absent"
    forward: bool  # which of the sums of `sweeps.Statistics` are wanted
    reverse: bool
    same_temperature: bool
    # Some logits are fp32: log q − log p and q − p must not cancel. 16-bit logits differ by nothing or by much, and
    # differences between them are exact: q − p is small only beside larger ones in the row.
    fine: bool
    teacher_aligned: bool


@dataclass(frozen=True)
class SparseMode(Mode):
    """Of the kernel in `sparse`."""

    closed: bool  # the divergence's TERM is a `close`
    entries: int  # at least K, a power of two


def mode_for(
    spec: RowSpec,
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    grad: Tensor | None,
    block: Block,
    tile: Tile | None,
) -> Mode:
    soft = "absent" if teacher is None else divergence.sweeps
    tempered = soft in ("closed", "normalised")
    shared: dict[str, Any] = {
        "stage": "whole" if tile is None else tile.stage,
        "hard": labels is not None,
        "hard_power": int(spec.temperature) if tempered and spec.temperature in (1, 2) else 0,
        "about_top": divergence.about_top,
        "grad_aligned": co_aligned(grad, student, block),
    }
    if isinstance(teacher, SparseRows):
        entries = triton.next_power_of_2(teacher.ids.shape[-1])
        return SparseMode(**shared, closed=divergence.sweeps == "closed", entries=entries)
    return DenseMode(
        **shared,
        soft=soft,
        forward=divergence.forward,
        reverse=divergence.reverse,
        same_temperature=spec.temperature == spec.teacher_temperature,
        fine=any(tensor is not None and tensor.dtype == torch.float32 for tensor in (student, teacher)),
        teacher_aligned=co_aligned(teacher, student, block),
    )
