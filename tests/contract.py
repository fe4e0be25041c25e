"""The numerics contract of one call of a backend: value and gradient against float64, with fp32 eager as yardstick."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd import reference
from fastkd.divergences import Divergence
from tests import cases, compare

Compute = Callable[..., tuple[Tensor, Tensor]]  #: `Backend.kd_rows` of a backend


def run(
    compute: Compute,
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float = 2.0,
    hard: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft losses, cross-entropies and the gradient, with labels or (not `hard`) the soft term alone."""
    grad = torch.empty_like(student)
    scale = torch.ones(len(student), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    labels = cases.labels(*student.shape) if hard else None
    spec = cases.spec(divergence, student.shape[1], temperature)
    soft, cross_entropy = compute(student, teacher, labels, scale, scale if hard else None, spec, grad)
    return soft, cross_entropy, grad


def check(
    compute: Compute,
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float = 2.0,
    hard: bool = True,
    certain_rows: float = 0.0,
) -> None:
    """Hold `compute` to the contract. `certain_rows` as in `compare.assert_gradient`."""
    truth = run(reference.kd_rows, student.double(), teacher.double(), divergence, temperature, hard)
    eager = run(reference.kd_rows, student, teacher, divergence, temperature, hard)
    ours = run(compute, student, teacher, divergence, temperature, hard)
    compare.assert_value(ours[0], truth[0], eager[0], "soft loss")
    compare.assert_value(ours[1], truth[1], eager[1], "hard loss")
    undecided = cases.undecided(student, teacher, cases.spec(divergence, student.shape[1], temperature))
    compare.assert_gradient(ours[2], eager[2], truth[2], certain_rows=certain_rows, undecided=undecided)
