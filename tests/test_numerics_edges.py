"""Numbers at the edges: rows far from zero, extreme temperatures, confident rows, alpha-beta near its limits."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd.backend import select
from fastkd.divergences import Divergence
from fastkd.kernels import cpu
from tests import cases, edges
from tests.contract import check, run

ROWS, VOCAB = 4, 1500


@pytest.mark.parametrize("place", edges.PLACES)
@pytest.mark.parametrize("divergence", edges.TEMPERED, ids=str)
def test_where_a_row_lies_changes_nothing(divergence: Divergence, place: float, backend: str) -> None:
    edges.judge_place(select(torch.empty(1)).kd_rows, divergence, place, VOCAB)


@pytest.mark.parametrize("place", edges.PLACES)
def test_where_a_row_lies_changes_no_statistics(place: float, backend: str) -> None:
    row, uniform = torch.full((2, VOCAB), place), -math.log(VOCAB)
    statistics = fastkd.row_statistics(row, torch.tensor([3, 1499]), 1.5)
    assert statistics.entropy.tolist() == pytest.approx([-uniform] * 2)
    assert statistics.label_logprob.tolist() == pytest.approx([uniform] * 2)
    assert fastkd.log_softmax(row, 1.5).flatten().tolist() == pytest.approx([uniform] * 2 * VOCAB)
    _, logprobs, rest = select(row).top_k(row, 3, 1.5)
    assert logprobs.flatten().tolist() == pytest.approx([uniform] * 6)
    assert rest.tolist() == pytest.approx([math.log(1 - 3 / VOCAB)] * 2, rel=1e-3)
    _, weights, entropy = select(row).sample(row, 3, 1.5, torch.tensor([0.2, 0.7], dtype=torch.float64))
    assert weights.flatten().tolist() == pytest.approx([-math.log(3)] * 6)
    assert entropy.tolist() == pytest.approx([-uniform] * 2)


def test_a_masked_block_before_a_row_at_the_lowest_number() -> None:
    student, teacher = torch.full((1, 3000), edges.LOWEST), torch.zeros(1, 3000)
    student[:, :1100] = teacher[:, :1100] = -math.inf
    student[:, 2500:] = -math.inf
    soft, _, grad = run(cpu.kd_rows, student, teacher, fastkd.ReverseKL(), hard=False)
    assert soft.item() == pytest.approx(math.log(1900 / 1400), rel=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("temperature", edges.TEMPERATURES)
@pytest.mark.parametrize("divergence", edges.TEMPERED, ids=str)
def test_temperatures_from_1e_30_to_1e6(divergence: Divergence, temperature: float) -> None:
    if divergence.name == "alpha_beta" and temperature < 0.1:
        pytest.skip("its powers of p / q are infinite there")
    check(cpu.kd_rows, *cases.logits("far", ROWS, VOCAB), divergence, temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.7])
@pytest.mark.parametrize("divergence", edges.TEMPERED, ids=str)
def test_confident_rows_that_disagree(divergence: Divergence, temperature: float) -> None:
    """Each side is sure of a token of its own: gradients are far smaller than the terms they are differences of."""
    if divergence.name == "alpha_beta" and divergence.parameters in ((0.5, -0.5), (0.0, 0.0), (0.5, 0.0)):
        pytest.skip("the gradient's norm is that of a few columns with huge powers of p / q")
    for seed in range(5):
        student, teacher, moderate = edges.confident(divergence, ROWS, seed)
        certain = 0.0 if moderate else temperature
        check(cpu.kd_rows, student, teacher, divergence, temperature, hard=False, certain_rows=certain)


@pytest.mark.parametrize("temperature", [1.0, 3.7])
@pytest.mark.parametrize("divergence", edges.MIXED, ids=str)
def test_digits_of_confident_rows(divergence: Divergence, temperature: float) -> None:
    edges.judge_confident(cpu.kd_rows, divergence, temperature)


@pytest.mark.parametrize("family", ["far", "near_equal", "peaked"])
@pytest.mark.parametrize(("alpha", "beta"), edges.ALPHA_BETA)
def test_alpha_beta_at_and_near_its_limits(alpha: float, beta: float, family: str) -> None:
    edges.judge_alpha_beta(cpu.kd_rows, alpha, beta, family)


def test_renormalized_tokens_however_unlikely(backend: str) -> None:
    """Only their shares count: where all have probabilities below 1e-45, as where they have large ones."""
    student, _ = cases.logits("far", ROWS, VOCAB)
    ids = torch.arange(5).expand(ROWS, 5) * 7
    logprobs = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1)) - 4
    losses = []
    for less in (0.0, 104.0, 700.0):
        targets = fastkd.SparseTargets(ids, logprobs - less, "renormalize", 2.0)
        losses.append(fastkd.kd_loss(student, targets, soft_weight=1.0, hard_weight=0.0).item())
    share = torch.log_softmax(logprobs.double(), -1)
    log_q = torch.log_softmax(student.double() / 2, -1).gather(-1, ids)
    assert losses == pytest.approx([4 * (share.exp() * (share - log_q)).sum(-1).mean().item()] * 3, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.3])
def test_a_rest_that_underflows_beside_the_tokens_that_are_kept(temperature: float, backend: str) -> None:
    """A student that is sure of the only token kept: its rest is e^-1000, and the teacher's one percent."""
    student = torch.zeros(2, VOCAB)
    student[:, 0] = 1000.0
    targets = fastkd.SparseTargets(
        torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), math.log(0.99)), "ghost", temperature
    )
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, targets, temperature=temperature, soft_weight=1.0, hard_weight=0.0, scale_t2=False)
    (grad,) = torch.autograd.grad(loss, leaf)
    log_rest = math.log(VOCAB - 1) - 1000 / temperature
    expected = 0.99 * math.log(0.99) + 0.01 * (math.log(0.01) - log_rest)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert grad[:, 0].tolist() == pytest.approx([0.005 / temperature] * 2, rel=1e-4)
    assert grad[:, 1:].sum(-1).tolist() == pytest.approx([-0.005 / temperature] * 2, rel=1e-4)
