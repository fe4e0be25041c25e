"""The specification itself: against the textbook by autograd, and its g against finite differences.

The oracles here are written from the published definitions with plain torch operations, not from `reference.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence
from tests import cases

T = 2.0


def textbook(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """`[rows]` divergence between softmax(teacher/T) and softmax(student/T), differentiable."""
    if isinstance(divergence, fastkd.MSE):
        return F.mse_loss(student, teacher, reduction="none").mean(-1)
    log_p, log_q = F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)
    p, q = log_p.exp(), log_q.exp()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    match divergence:
        case fastkd.ForwardKL():
            return kl(log_p, log_q)
        case fastkd.ReverseKL():
            return kl(log_q, log_p)
        case fastkd.JSD(beta=beta):
            log_m = (beta * p + (1 - beta) * q).log()
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        case fastkd.SkewKL(lam=lam):
            return kl(log_p, (lam * p + (1 - lam) * q).log())
        case fastkd.SkewReverseKL(lam=lam):
            return kl(log_q, ((1 - lam) * p + lam * q).log())
        case fastkd.SymmetricKL(weight=weight):
            return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)
        case fastkd.TVD():
            return 0.5 * (p - q).abs().sum(-1)
        case fastkd.SquaredHellinger():
            return 1 - (p * q).sqrt().sum(-1)
        case fastkd.AlphaBeta(alpha=a, beta=b):
            if a == 0 and b == 0:
                return 0.5 * (log_p - log_q).square().sum(-1)
            if a == 0:
                return ((q**b) * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
            if b == 0:
                return ((p**a) * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
            if a + b == 0:
                return ((q**a / p**a).log() + (q**a / p**a) ** -1 - 1).sum(-1) / a**2
            mixed = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
            return -mixed.sum(-1) / (a * b)
        case fastkd.Mix():
            rows = [weight * textbook(part, student, teacher) for part, weight in divergence.parts]
            return torch.stack(rows).sum(0)
    raise AssertionError(divergence)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_against_the_textbook(divergence: Divergence) -> None:
    student, teacher = (x.double() for x in cases.logits("far", 6, 31))
    labels = cases.labels(6, 31)
    student.requires_grad_()
    soft_scale, hard_scale = torch.rand(2, 6, dtype=torch.float64)
    t2 = 1.0 if isinstance(divergence, fastkd.MSE) else T * T
    soft, hard = textbook(divergence, student, teacher), F.cross_entropy(student, labels, reduction="none")
    (0.5 * t2 * soft_scale @ soft + 0.5 * hard_scale @ hard).backward()

    grad = torch.empty_like(student)
    spec = cases.spec(divergence, 31, T, soft_weight=0.5 * t2)
    soft_rows, hard_rows = reference.kd_rows(student.detach(), teacher, labels, soft_scale, hard_scale, spec, grad)
    torch.testing.assert_close(soft_rows, soft.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hard_rows, hard.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, student.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_gradcheck(divergence: Divergence) -> None:
    fastkd.use_backend("reference")
    student, teacher = (x.double() for x in cases.logits("far", 3, 7))
    student.requires_grad_()
    for reduction in ("mean", "none"):
        kd = fastkd.KDLoss(T, divergence=divergence, reduction=reduction)
        assert torch.autograd.gradcheck(lambda s, kd=kd: kd(s, teacher, torch.tensor([1, -100, 3])), student)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_zero_at_a_match_and_positive_elsewhere(divergence: Divergence) -> None:
    student, teacher = (x.double() for x in cases.logits("far", 5, 40))
    spec = cases.spec(divergence, 40)
    one = torch.ones(5, dtype=torch.float64)
    at_match, _ = reference.kd_rows(teacher, teacher, None, one, None, spec, None)
    elsewhere, _ = reference.kd_rows(student, teacher, None, one, None, spec, None)
    assert at_match.abs().max() < 1e-12
    assert elsewhere.min() > 1e-3


@pytest.mark.parametrize(
    ("limit", "near"),
    [
        (fastkd.ForwardKL(), fastkd.AlphaBeta(alpha=1, beta=1e-6)),
        (fastkd.ReverseKL(), fastkd.AlphaBeta(alpha=1e-6, beta=1)),
        (fastkd.AlphaBeta(alpha=0, beta=0.5), fastkd.AlphaBeta(alpha=1e-6, beta=0.5)),
        (fastkd.AlphaBeta(alpha=0.5, beta=0), fastkd.AlphaBeta(alpha=0.5, beta=1e-6)),
        (fastkd.AlphaBeta(alpha=0.5, beta=-0.5), fastkd.AlphaBeta(alpha=0.5, beta=-0.5 + 1e-6)),
        (fastkd.ForwardKL(), fastkd.SkewKL(lam=1e-9)),
        (fastkd.ReverseKL(), fastkd.SkewReverseKL(lam=1e-9)),
    ],
    ids=str,
)
def test_limits_are_continuous(limit: Divergence, near: Divergence) -> None:
    student, teacher = (x.double() for x in cases.logits("flat", 4, 30))
    student = student * 50
    fastkd.use_backend("reference")

    def loss(divergence: Divergence) -> Tensor:
        result = fastkd.kd_loss(student, teacher, divergence=divergence, hard_weight=0, reduction="none")
        assert isinstance(result, Tensor)
        return result

    torch.testing.assert_close(loss(limit), loss(near), rtol=1e-4, atol=1e-7)


def test_temperature_table() -> None:
    """softmax([5, 3, 1, .5, −1]) and its entropy, worked out by hand from the definition."""
    logits = [5.0, 3.0, 1.0, 0.5, -1.0]
    for temperature in (0.5, 1.0, 2.0, 5.0, 10.0):
        weights = [math.exp(z / temperature) for z in logits]
        probabilities = [w / sum(weights) for w in weights]
        entropy = -sum(p * math.log(p) for p in probabilities)
        for name in ("cpu", "reference"):
            with fastkd.use_backend(name):
                row = torch.tensor(logits)
                assert fastkd.log_softmax(row, temperature).exp().tolist() == pytest.approx(probabilities, rel=1e-5)
                assert fastkd.row_statistics(row, None, temperature).entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert fastkd.log_softmax(torch.tensor(logits)).exp().tolist() == pytest.approx(
        [0.8567, 0.1159, 0.0157, 0.0095, 0.0021], abs=5e-5
    )
    assert fastkd.row_statistics(torch.tensor(logits)).entropy.item() == pytest.approx(0.5049, abs=5e-5)
