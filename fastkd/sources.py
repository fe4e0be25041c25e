"""Where a row of logits comes from, and whether the sources of one call fit together.

A source is a tensor of logits `[..., V]` or a `Projection`, whose logits are computed a chunk at a time and never
formed as a whole. `check` raises before any work, quoting the offending value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Projection", "Source", "check", "check_logits"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Projection:
    """Logits as the product of hidden states and an output head: `z = logit_scale·(hidden·weightᵀ + bias)`.

    With a softcap, z is replaced by `softcap·tanh(z / softcap)`. Pass one wherever a loss takes logits; gradients
    flow to `hidden`, `weight` and `bias`, in their dtypes, where these require them.

    Args:
        hidden: hidden states `[..., H]`, fp32 / bf16 / fp16 (float64 on the reference backend).
        weight: output head `[V, H]`, as in `nn.Linear(H, V).weight`; of another dtype than `hidden` if you like.
        bias: `[V]` or None.
        softcap: bound of the logits' absolute value (Gemma 2, Gemma Team 2024), or None.
        logit_scale: factor of the logits (Cohere's Command models).

    The product is accumulated in fp32 and its fp32 result is used, whatever the operands' dtypes: rounding logits to
    16 bits ruins the distillation gradient of a student close to its teacher.

    Raises TypeError or ValueError for operands that do not fit together.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if tensor is not None or name != "bias":
                _check_floating(f"Projection {name}", tensor)
        if self.weight.dim() != 2 or 0 in self.weight.shape:
            raise ValueError(f"Projection weight must have shape [vocab, hidden], got {tuple(self.weight.shape)}")
        if self.hidden.dim() == 0 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"Projection hidden {tuple(self.hidden.shape)} must end in the {self.weight.shape[1]} columns of "
                f"weight {tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"Projection bias must have shape [{self.weight.shape[0]}] beside weight {tuple(self.weight.shape)}, "
                f"got {tuple(self.bias.shape)}"
            )
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None and tensor.device != self.hidden.device:
                raise ValueError(f"Projection {name} is on {tensor.device}, but hidden is on {self.hidden.device}")
        doubles = [t.dtype == torch.float64 for t in (self.hidden, self.weight, self.bias) if t is not None]
        if any(doubles) and not all(doubles):
            raise TypeError(
                "Projection hidden, weight and bias must all be float64 or none of them, got "
                f"{self.hidden.dtype}, {self.weight.dtype} and {None if self.bias is None else self.bias.dtype}"
            )
        if self.softcap is not None and not _is_positive(self.softcap):
            raise ValueError(f"Projection softcap must be a finite number > 0 or None, got {self.softcap!r}")
        if not _is_positive(self.logit_scale):
            raise ValueError(f"Projection logit_scale must be a finite number > 0, got {self.logit_scale!r}")

    @property
    def shape(self) -> torch.Size:
        """The shape `[..., V]` its logits would have."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def dim(self) -> int:
        return self.hidden.dim()

    def logits(self) -> Tensor:
        """The `[..., V]` tensor that losses avoid, differentiable; rounded as `torch.nn.functional.linear` rounds."""
        z = self.logit_scale * torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def detach(self) -> Projection:
        """The same logits without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Projection(self.hidden.detach(), self.weight.detach(), bias, self.softcap, self.logit_scale)


Source = Tensor | Projection


def check(
    student: Source,
    teacher: Source | None,
    labels: Tensor | None,
    weights: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Validate one call's inputs and return the number of vocabulary columns that count.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or size.
    """
    _check_source("student", student)
    if teacher is not None:
        _check_source("teacher", teacher)
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


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_floating(name: str, value: object) -> None:
    _check_tensor(name, value)
    if value.dtype not in _FLOATING:  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")  # type: ignore[attr-defined]


def _check_source(name: str, source: object) -> None:
    if isinstance(source, Projection):
        return  # checked itself
    if not isinstance(source, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of logits or a fastkd.Projection, got {type(source).__name__}")
    check_logits(source, f"{name} logits")


def check_logits(logits: object, name: str = "logits") -> None:
    """Raise TypeError or ValueError for anything but a floating tensor `[..., vocab]`."""
    _check_floating(name, logits)
    assert isinstance(logits, Tensor)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., vocab] with vocab > 0, got {tuple(logits.shape)}")


def _check_beside(name: str, value: Source, student: Source, leading: torch.Size) -> None:
    if leading != student.shape[:-1]:
        raise ValueError(
            f"{name} has leading shape {tuple(leading)}, but the student logits {tuple(student.shape)} "
            f"have {tuple(student.shape[:-1])}"
        )
    if value.device != student.device:
        raise ValueError(f"{name} is on {value.device}, but the student is on {student.device}")


def _vocab_size(student: Source, teacher: Source | None, vocab_size: int | None) -> int:
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
