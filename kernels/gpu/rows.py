"""A distillation loss and its gradient on rows of logits: what is launched, and with what."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.kernels.gpu.frame import Launch
from fastkd.kernels.gpu.launch import (
    Rows,
    block_for,
    device_of,
    numbers_for,
    rows_of,
)
from fastkd.kernels.gpu.mixes import divergence_of
from fastkd.kernels.gpu.mode import mode_for
from fastkd.kernels.gpu.sparse import Kept, run_sparse
from fastkd.kernels.gpu.state import VocabularyTile
from fastkd.kernels.gpu.walks import Swept, Walk, sweeping, walk_for
from fastkd.rows import RowSpec, SparseRows, Tile, row_count


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
    count = row_count(student)
    soft, hard = (torch.empty(count, dtype=torch.float32, device=student.device) for _ in range(2))
    if count == 0:
        return soft, hard
    divergence = divergence_of(spec.divergence)
    width = spec.vocab_size if tile is None else student.shape[-1]
    if width == 0:  # of a rank without columns: kernels take an address all the same
        student = student.new_zeros(1, 1).expand(count, 1)
        teacher = student if isinstance(teacher, Tensor) else teacher
        grad = None
    logits = [tensor for tensor in (student, teacher) if isinstance(tensor, Tensor)]
    with device_of(student):
        if isinstance(teacher, SparseRows):
            walk = Walk(run_sparse, block_for([*logits, *([] if grad is None else [grad])], width))
        else:
            swept = Swept(logits, grad, width, divergence)
            walk = walk_for(swept) if tile is None else sweeping(swept)
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
        None if tile is None else VocabularyTile(tile.state, tile.first, width, tile.origin),
        student.shape[-1] if grad is None else grad.shape[-1],
    )
    mode = mode_for(spec, divergence, student, teacher, labels, grad, walk.block, tile)
    with device_of(student):
        walk.run(launch, divergence, mode, walk.block)
    return soft, hard


def _rows_or_none(tensor: Tensor | None) -> Rows | None:
    return None if tensor is None else rows_of(tensor)
