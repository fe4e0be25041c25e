"""A whole loss on logits as the native library takes it: all but the values once, then only addresses."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from fastkd.divergences import TABLE
from fastkd.kernels.cpu.interface import KDLoss, KDRows, Matrix, RowScales
from fastkd.kernels.cpu.library import DTYPES, loaded
from fastkd.rows import RowSpec, row_layout_of

__all__ = ["TensorForm", "kd_loss", "template"]


class TensorForm(NamedTuple):
    """What a tensor in main memory is besides its values."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """As `Tensor.is_contiguous`, but that a dimension of one element may have any stride there."""
        return self.strides == tuple(self.shape[i + 1 :].numel() for i in range(len(self.shape)))

    def matrix(self) -> Matrix | None:
        """Without an address; None where its rows lie at no regular strides."""
        layout = row_layout_of(self.shape, self.strides)
        if self.dtype not in DTYPES or layout is None:
            return None
        return Matrix(None, DTYPES[self.dtype], self.shape[-1], *layout[1:])


#: The names of divergences where they stay: a template holds the address of one.
_NAMES = {name: ctypes.create_string_buffer(name.encode()) for name in TABLE}


def template(
    student: TensorForm,
    teacher: TensorForm | None,
    spec: RowSpec,
    *,
    soft: bool,
    hard: bool,
    shift: bool,
    ignore_index: int,
    mask_soft: bool,
    counted: bool,
    total: bool,
) -> bytes | None:
    """A loss but for its values, in this process; None where rows lie at no regular strides.

    `soft`, `hard`: the terms it has. `counted`: the divisor is the sum of what is divided. `total`: the loss is one
    number. The others are those of `Backend.row_scales`.
    """
    matrices = [Matrix() if form is None else form.matrix() for form in (student, teacher)]
    if None in matrices:
        return None
    leading, width = student.shape[:-1], student.shape[-1]
    rows = leading.numel()
    call = KDLoss(soft=soft, hard=hard, masked_apart=not mask_soft, total=total)
    call.rows = KDRows(
        *matrices,
        Matrix(None, DTYPES[student.dtype], width, rows, 0, width),
        rows=rows,
        vocab_size=spec.vocab_size,
        divergence=ctypes.cast(_NAMES[spec.divergence], ctypes.c_char_p),
        parameters=(ctypes.c_double * 2)(*spec.parameters),
        temperature=spec.temperature,
        teacher_temperature=spec.teacher_temperature,
        soft_weight=spec.soft_weight,
        hard_weight=spec.hard_weight,
    )
    call.scales = RowScales(rows=rows, length=leading[-1] if shift else 0, ignore_index=ignore_index, count=counted)
    return bytes(call)


def kd_loss(template: bytes, *values: Any) -> bool:
    """The whole of a loss. Returns False, and has written nothing, where values are not as they must be.

    Values: the addresses of student, teacher, labels, weights, upstream gradient, gradient and loss (None: absent), and
    the divisor. Labels that are no token, and weights that are negative or not finite, are for the caller to look into.
    """
    return loaded().fastkd_kd_loss(template, *values, torch.get_num_threads()) == 0  # type: ignore[no-any-return]
