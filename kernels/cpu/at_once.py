"""A whole loss on logits as the native library takes it: all but the values once, then only addresses."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from fastkd.kernels.cpu.interface import KDLoss, KDRows, Matrix, RowScales
from fastkd.kernels.cpu.library import DTYPES, loaded, parameter_array
from fastkd.rows import RowSpec, row_layout_of

__all__ = ["Template", "TensorForm", "kd_loss", "template"]


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


class Template(NamedTuple):
    """A loss but for its values, in this process."""

    call: bytes  # a KDLoss, which holds addresses
    kept: tuple[Any, ...]  # of these


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
) -> Template | None:
    """Make a template; None where rows lie at no regular strides.

    `soft`, `hard`: the terms it has. `counted`: the divisor is the sum of what is divided. `total`: the loss is one
    number. The others are those of `Backend.row_scales`.
    """
    matrices = [Matrix() if form is None else form.matrix() for form in (student, teacher)]
    if None in matrices:
        return None
    leading, width = student.shape[:-1], student.shape[-1]
    rows = leading.numel()
    name, parameters = ctypes.create_string_buffer(spec.divergence.encode()), parameter_array(spec)
    call = KDLoss(soft=soft, hard=hard, masked_apart=not mask_soft, total=total)
    call.rows = KDRows(
        *matrices,
        Matrix(None, DTYPES[student.dtype], width, rows, 0, width),
        rows=rows,
        vocab_size=spec.vocab_size,
        divergence=ctypes.cast(name, ctypes.c_char_p),
        parameters=parameters,
        parameter_count=len(parameters),
        temperature=spec.temperature,
        teacher_temperature=spec.teacher_temperature,
        soft_weight=spec.soft_weight,
        hard_weight=spec.hard_weight,
    )
    call.scales = RowScales(rows=rows, length=leading[-1] if shift else 0, ignore_index=ignore_index, count=counted)
    return Template(bytes(call), (name, parameters))


def kd_loss(template: Template, *values: Any) -> bool:
    """The whole of a loss. Returns False, and has written nothing, where values are not as they must be.

    Values: the addresses of student, teacher, labels, weights, upstream gradient, gradient and loss (None: absent), and
    the divisor. Labels that are no token, and weights that are negative or not finite, are for the caller to look into.
    """
    return loaded().fastkd_kd_loss(template.call, *values, torch.get_num_threads()) == 0  # type: ignore[no-any-return]
