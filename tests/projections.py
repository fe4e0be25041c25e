"""Losses from hidden states as tests run and judge them: operands, a call with either side as logits, the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.sources import Source
from tests import compare

N, V, H, H_TEACHER = 23, 1100, 16, 24
#: Budgets that keep all tokens' logits, some tokens', or tiles: as test_projection_numerics confirms.
WHOLE, FEW, TILES = None, 260_000, 215_000


def operands(
    family: str = "far", rows: int = N, vocab: int = V, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(hidden, weight, bias) of student and teacher, whose logits are distributed like the family's in `cases`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale = {"far": 3.0, "near_equal": 3.0, "peaked": 15.0, "flat": 0.01, "offset": 3.0}[family]
    width = H if family == "near_equal" else H_TEACHER
    teacher = normal(rows, width), normal(vocab, width) * scale / width**0.5, normal(vocab)
    student: tuple[Tensor, ...] = normal(rows, H), normal(vocab, H) * scale / H**0.5, normal(vocab)
    if family == "near_equal":
        student = teacher[0] + 3e-3 * normal(rows, H), teacher[1], teacher[2]
    if family == "offset":
        student, teacher = (*student[:2], student[2] + 1e4), (*teacher[:2], teacher[2] - 1e4)
    return tuple(x.to(dtype) for x in student), tuple(x.to(dtype) for x in teacher)


class Outcome:
    """A loss and the gradients of everything it was made from."""

    def __init__(self, loss: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> None:
        self.loss = loss.detach()
        self.gradients = torch.autograd.grad(loss, leaves, upstream)


def leaves_of(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def from_projections(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    student_as: str = "projection",
    teacher_as: str = "projection",
    student_head: dict[str, float] | None = None,
    teacher_head: dict[str, float] | None = None,
    call: dict[str, Any] | None = None,
    upstream: Tensor | None = None,
    **settings: Any,
) -> Outcome:
    """The loss with each side a projection, or the logits that it stands for."""
    leaves = leaves_of(student)
    sources: list[Source] = [
        fastkd.Projection(*leaves, **(student_head or {})),
        fastkd.Projection(*teacher, **(teacher_head or {})),
    ]
    for i, form in enumerate((student_as, teacher_as)):
        if form == "logits":
            sources[i] = sources[i].logits()  # type: ignore[union-attr]
    return Outcome(fastkd.KDLoss(**settings)(*sources, labels, **(call or {})), leaves, upstream)


def truth_and_eager(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Any:
    """The same from logits tensors on the eager reference: float64 from the same numbers, and fp32."""
    with fastkd.use_backend("reference"):
        return [
            from_projections(
                tuple(x.to(dtype) for x in student),
                tuple(x.to(dtype) for x in teacher),
                labels,
                **{**options, "student_as": "logits", "teacher_as": "logits"},
            )
            for dtype in (torch.float64, torch.float32)
        ]


def judge(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    *,
    run: Callable[..., Outcome] = from_projections,
    certain_rows: float = 0.0,
    **options: Any,
) -> Outcome:
    """The numerics contract for the loss and every gradient."""
    budget = options.pop("memory_budget", None)
    ours = run(student, teacher, labels, memory_budget=budget, **options)
    truth, eager = truth_and_eager(student, teacher, labels, **options)
    compare.assert_value(ours.loss, truth.loss, eager.loss)
    names = ("hidden", "weight", "bias")[: len(student)]
    for name, a, b, c in zip(names, ours.gradients, eager.gradients, truth.gradients, strict=True):
        compare.assert_gradient(a, b.to(a.dtype), c, f"d {name}", certain_rows)
    return ours
