"""Gradients rounded to fp16: what fits in its range arrives, whatever weights, temperature and number of tokens."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests import cases, compare


@pytest.mark.parametrize("settings", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
def test_large_weights_do_not_overflow(backend: str, settings: dict[str, object]) -> None:
    """∂/∂z = 3000 · 2·(z_s − z_t)/V ÷ 8 tokens."""
    student = torch.full((8, 4), 100.0, dtype=torch.float16).requires_grad_()
    teacher = torch.zeros_like(student, requires_grad=False)
    kd = fastkd.KDLoss(divergence="mse", soft_weight=3000, hard_weight=0, **settings)  # type: ignore[arg-type]
    loss = kd(student * 1, teacher)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, 1 / 8 if settings.get("reduction") else 1))
    assert gradient.float().unique().tolist() == [pytest.approx(18750, rel=1e-3)]


@pytest.mark.parametrize("upstream", [1.0, 16.0])
@pytest.mark.parametrize("weight", [1e-3, 1.0, 3e3])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("divergence", cases.NAMES)
def test_what_fits_arrives(divergence: str, temperature: float, weight: float, upstream: float, backend: str) -> None:
    student, teacher = cases.logits("far", 8, 65, torch.float16)
    student, teacher = student.clone(), teacher.clone()
    student[0, :2], teacher[0, :2] = torch.tensor([6e4, 5.99e4]), torch.tensor([-6e4, 6e4])
    labels = cases.labels(8, 65)
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaf = student.to(dtype, copy=True).requires_grad_()
        with fastkd.use_backend("reference" if dtype == torch.float64 else backend):
            kd = fastkd.KDLoss(temperature, divergence=divergence, soft_weight=weight, hard_weight=0.1 * weight)
            loss = kd(leaf, teacher.to(dtype), labels)
            grads += torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    fits = grads[1].abs() < 65000
    ours, truth = (x[fits] for x in grads)
    assert fits.float().mean() > 0.8
    assert ours.isfinite().all()
    assert compare.relative_error(ours, truth) < compare.LOW_PRECISION


def test_both_ends_of_the_range_are_used() -> None:
    """A reverse KL of logits at the ends of fp16, and a mean over more tokens than fp16 counts to."""
    student = torch.tensor([[65504.0, -65504.0]] * 2, dtype=torch.float16)
    student[1] = torch.tensor([0.0, 0.0])
    teacher = -student
    teacher[1] = torch.tensor([65504.0, -65504.0])
    leaf = student.requires_grad_()
    kd = fastkd.KDLoss(1.0, divergence="reverse_kl", soft_weight=1.0, hard_weight=0.0)
    (gradient,) = torch.autograd.grad(kd(leaf, teacher, num_items=2.0), leaf)
    assert gradient[1].tolist() == [-16376.0, 16376.0]  # ½ token · ½·½·131008
    (gradient,) = torch.autograd.grad(kd(leaf, teacher, num_items=2.0**36), leaf, torch.tensor(2.0**35))
    assert gradient[1].tolist() == [-16376.0, 16376.0]
