"""Numbers at the edges: rows far from zero, extreme temperatures, confident rows, alpha-beta near its limits."""

from __future__ import annotations

import decimal
import math

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import _native, reference
from fastkd.backend import select
from fastkd.divergences import Divergence
from tests import cases, compare

ROWS, VOCAB = 4, 1500
TEMPERED = tuple(divergence for divergence in cases.DIVERGENCES if divergence.tempered)
LOWEST = torch.finfo(torch.float32).min


def run(
    module: object,
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float = 2.0,
    hard: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(student)
    scale = torch.ones(len(student), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    labels = cases.labels(*student.shape) if hard else None
    spec = cases.spec(divergence, student.shape[1], temperature)
    soft, cross_entropy = module.kd_rows(  # type: ignore[attr-defined]
        student, teacher, labels, scale, scale if hard else None, spec, grad
    )
    return soft, cross_entropy, grad


def check(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float = 2.0,
    hard: bool = True,
    certain_rows: float = 0.0,
) -> None:
    """The numerics contract."""
    truth = run(reference, student.double(), teacher.double(), divergence, temperature, hard)
    eager = run(reference, student, teacher, divergence, temperature, hard)
    ours = run(_native, student, teacher, divergence, temperature, hard)
    for value in (0, 1):
        compare.assert_value(ours[value], truth[value], eager[value])
    compare.assert_gradient(ours[2], eager[2], truth[2], certain_rows=certain_rows)


@pytest.mark.parametrize("place", [-1e10, -1e30, LOWEST, 1e30])
@pytest.mark.parametrize("divergence", TEMPERED, ids=str)
def test_where_a_row_lies_changes_nothing(divergence: Divergence, place: float, backend: str) -> None:
    """Rows that are one number throughout, on either side and on both: as zeros."""
    module = select(torch.empty(1))
    _, other = cases.logits("far", 2, VOCAB)
    row, zeros = torch.full((2, VOCAB), place), torch.zeros(2, VOCAB)
    for temperature in (2.0, 1.3):
        for ours, expected in (
            ((row, other), (zeros, other)),
            ((other, row), (other, zeros)),
            ((row, row), (zeros, zeros)),
        ):
            values, truth = (run(module, *pair, divergence, temperature) for pair in (ours, expected))
            assert all(x.isfinite().all() for x in values)
            for a, b in zip(values, truth, strict=True):
                compare.assert_value(a, b.double())


@pytest.mark.parametrize("place", [-1e10, -1e30, LOWEST, 1e30])
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
    student, teacher = torch.full((1, 3000), LOWEST), torch.zeros(1, 3000)
    student[:, :1100] = teacher[:, :1100] = -math.inf
    student[:, 2500:] = -math.inf
    soft, _, grad = run(_native, student, teacher, fastkd.ReverseKL(), hard=False)
    assert soft.item() == pytest.approx(math.log(1900 / 1400), rel=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e-9, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("divergence", TEMPERED, ids=str)
def test_temperatures_from_1e_30_to_1e6(divergence: Divergence, temperature: float) -> None:
    if divergence.name == "alpha_beta" and temperature < 0.1:
        pytest.skip("its powers of p / q are infinite there")
    check(*cases.logits("far", ROWS, VOCAB), divergence, temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.7])
@pytest.mark.parametrize("divergence", TEMPERED, ids=str)
def test_confident_rows_that_disagree(divergence: Divergence, temperature: float) -> None:
    """Each side is sure of a token of its own: gradients are far smaller than the terms they are differences of."""
    if divergence.name == "alpha_beta" and divergence.parameters in ((0.5, -0.5), (0.0, 0.0), (0.5, 0.0)):
        pytest.skip("the gradient's norm is that of a few columns with huge powers of p / q")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (25 * torch.randn(ROWS, 1000, generator=generator) for _ in range(2))
        # The other slopes are no bounded multiple of q: in a row without gradient they have the rounding of one.
        certain = 0.0 if divergence.name in ("jsd", "skew_kl", "skew_reverse_kl", "tvd") else temperature
        check(student, teacher, divergence, temperature, hard=False, certain_rows=certain)


def exact_alpha_beta(log_p: float, log_q: float, alpha: float, beta: float) -> tuple[float, float]:
    """Term and derivative by log q, by Cichocki's formula in 80 digits; limits are met to 25 of them."""
    with decimal.localcontext(decimal.Context(prec=80)):
        a, b, tiny = decimal.Decimal(alpha), decimal.Decimal(beta), decimal.Decimal(10) ** -25
        a, b = a or tiny, b or 2 * tiny
        b = b if a + b else b + tiny
        total, p, q = a + b, decimal.Decimal(log_p), decimal.Decimal(log_q)
        mixed, p_power, q_power = (a * p + b * q).exp(), (total * p).exp(), (total * q).exp()
        term = (a / total * p_power + b / total * q_power - mixed) / (a * b)
        return float(term), float((q_power - mixed) / a)


@pytest.mark.parametrize("family", ["far", "near_equal", "peaked"])
@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        (1e-5, -1e-5),
        (1e-8, -1e-8),
        (1e-3, -0.999e-3),
        (0.3, -0.30001),
        (1e-6, 0.5),
        (-1e-6, 0.5),
        (0.5, 1e-7),
        (1e-5, 1e-5),
        (1.0, 1e-5),
        (0.2, 0.7),
        (2.0, -1.0),
        (-0.5, 1.5),
        (0.0, 0.5),
        (0.5, 0.0),
        (0.5, -0.5),
        (0.0, 0.0),
    ],
)
def test_alpha_beta_at_and_near_its_limits(alpha: float, beta: float, family: str) -> None:
    """Judged by the definition in 80 digits; the reference too, since it carries out the divisions as kernels do."""
    vocab, temperature = 60, 2.0
    student, teacher = cases.logits(family, 1, vocab)
    log_q, log_p = (torch.log_softmax(x.double()[0] / temperature, -1) for x in (student, teacher))
    cells = [exact_alpha_beta(*logs, alpha, beta) for logs in zip(log_p.tolist(), log_q.tolist(), strict=True)]
    term, slope = torch.tensor(cells, dtype=torch.float64).T
    value, gradient = term.sum()[None], (slope - log_q.exp() * slope.sum())[None] / temperature
    outcomes = []
    for module, dtype in ((reference, torch.float64), (reference, torch.float32), (_native, torch.float32)):
        grad, scale = torch.empty(1, vocab, dtype=dtype), torch.ones(1, dtype=dtype)
        spec = cases.spec(fastkd.AlphaBeta(alpha, beta), vocab, temperature, soft_weight=1.0)
        soft, _ = module.kd_rows(student.to(dtype), teacher.to(dtype), None, scale, None, spec, grad)  # type: ignore[attr-defined]
        outcomes.append((soft, grad))
    truth, eager, ours = outcomes
    assert compare.relative_error(truth[0], value) < compare.DOUBLE
    assert compare.relative_error(truth[1], gradient) < compare.DOUBLE
    assert compare.relative_error(eager[0], value) < compare.EAGER
    assert compare.relative_error(eager[1], gradient) < compare.EAGER
    compare.assert_value(ours[0], value, eager[0])
    compare.assert_gradient(ours[1], eager[1], gradient)


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
