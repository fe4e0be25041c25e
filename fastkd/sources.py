"""Where a row of logits comes from, and whether the sources of one call fit together.

Today a source is a tensor of logits `[..., V]`. `check` raises before any work, quoting the offending value.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Validate one call's tensors and return the number of vocabulary columns that count.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or size.
    """
    _check_logits("student", student)
    if teacher is not None:
        _check_logits("teacher", teacher)
        _check_beside("teacher", teacher, student, teacher.shape[:-1])
    if labels is not None:
        _check_tensor("labels", labels)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers (token ids), got {labels.dtype}")
        _check_beside("labels", labels, student, labels.shape)
    if weights is not None:
        _check_tensor("weights", weights)
        if weights.is_complex():
            raise TypeError(f"weights must be real numbers, got {weights.dtype}")
        _check_beside("weights", weights, student, weights.shape)
    return _vocab_size(student, teacher, vocab_size)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_logits(name: str, logits: Tensor) -> None:
    _check_tensor(name, logits)
    if logits.dtype not in _FLOATING:
        raise TypeError(f"{name} logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} logits must have shape [..., vocab] with vocab > 0, got {tuple(logits.shape)}")


def _check_beside(name: str, tensor: Tensor, student: Tensor, leading: torch.Size) -> None:
    if leading != student.shape[:-1]:
        raise ValueError(
            f"{name} has leading shape {tuple(leading)}, but the student logits {tuple(student.shape)} "
            f"have {tuple(student.shape[:-1])}"
        )
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, but the student is on {student.device}")


def _vocab_size(student: Tensor, teacher: Tensor | None, vocab_size: int | None) -> int:
    width = student.shape[-1]
    narrowest = width if teacher is None else min(width, teacher.shape[-1])
    if vocab_size is None:
        if teacher is not None and teacher.shape[-1] != width:
            raise ValueError(
                f"student has {width} vocabulary columns and teacher {teacher.shape[-1]}; if one is padded, "
                "pass vocab_size=<number of real tokens> so that only the first vocab_size columns count"
            )
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 0 < vocab_size <= narrowest:
        raise ValueError(f"vocab_size={vocab_size} must be in [1, {narrowest}], the narrower of the two sources")
    return vocab_size
