"""A distillation loss and its gradient on rows of logits: what is launched, and with what."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels.gpu.dense import dense_kernel
from fastkd.kernels.gpu.divergences import DIVERGENCES
from fastkd.kernels.gpu.frame import Launch
from fastkd.kernels.gpu.launch import (
    Rows,
    block_for,
    device_of,
    launch_options,
    numbers_for,
    rows_of,
)
from fastkd.kernels.gpu.mode import mode_for
from fastkd.kernels.gpu.sparse import Kept, sparse_kernel
from fastkd.kernels.gpu.state import VocabularyTile
from fastkd.rows import RowSpec, SparseRows, Tile


def kd_rows(
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross-entropy of each row, fp32 `[rows]`; the gradient into `grad`. See `backend.Backend`.

    Rows must lie at two strides (`fastkd.rows.row_layout`). fp32, bf16 or fp16, student and teacher independently.
    """
    count = student[..., 0].numel()
    soft, hard = (torch.empty(count, dtype=torch.float32, device=student.device) for _ in range(2))
    if count == 0:
        return soft, hard
    divergence = DIVERGENCES[spec.divergence]
    sparse = isinstance(teacher, SparseRows)
    width = spec.vocab_size if tile is None else student.shape[-1]
    swept = [tensor for tensor in (student, teacher, grad) if isinstance(tensor, Tensor)]
    with device_of(student):
        if sparse:
            block = block_for(swept, width)
        else:
            busy = divergence.sweeps == "normalised"
            block = block_for(swept, width, divergence.vectors, loaded=1 + (teacher is not None), busy=busy)
    launch = Launch(
        rows_of(student),
        Kept(*teacher, teacher.ids.shape[-1]) if isinstance(teacher, SparseRows) else _rows_or_none(teacher),
        _rows_or_none(grad),
        labels,
        soft_scale,
        hard_scale,
        soft,
        hard,
        numbers_for(spec, divergence),
        spec.vocab_size,
        None if tile is None else VocabularyTile(tile.state, tile.first, width),
        student.shape[-1] if grad is None else grad.shape[-1],
    )
    mode = mode_for(spec, divergence, student, teacher, labels, grad, block, tile)
    kernel = sparse_kernel if sparse else dense_kernel
    with device_of(student):
        kernel[(count,)](launch, divergence.term, divergence.slope, mode, block, **launch_options(block))
    return soft, hard


def _rows_or_none(tensor: Tensor | None) -> Rows | None:
    return None if tensor is None else rows_of(tensor)
