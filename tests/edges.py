"""Numbers at the edges of what floats hold, and the judges of what is computed from them, for every backend."""

from __future__ import annotations

import decimal

import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence
from tests import cases, compare
from tests.contract import Compute, run

TEMPERED = tuple(divergence for divergence in cases.DIVERGENCES if divergence.tempered)
#: What gradients of confident rows may be off, of which eager may have no digit: the documents' figures.
CONFIDENT = {"skew_kl": 1e-6, "skew_reverse_kl": 1e-2, "jsd": 0.1}
MIXED = tuple(divergence for divergence in TEMPERED if divergence.name in CONFIDENT)
#: Of `cases.KINDS`.
KINDS = tuple(divergence for divergence in cases.KINDS if divergence.tempered)
LOWEST = torch.finfo(torch.float32).min
PLACES = (-1e10, -1e30, LOWEST, 1e30)
TEMPERATURES = (1e-30, 1e-12, 1e-9, 1e-3, 1e3, 1e6)
#: α and β at which the divergence's formula divides by 0, or nearly, and some at which it does not.
ALPHA_BETA = (
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
)


def judge_place(compute: Compute, divergence: Divergence, place: float, columns: int) -> None:
    """Rows that are one number throughout, on either side and on both: as zeros."""
    _, other = cases.logits("far", 2, columns)
    row, zeros = torch.full((2, columns), place), torch.zeros(2, columns)
    for temperature in (2.0, 1.3):
        for ours, expected in (
            ((row, other), (zeros, other)),
            ((other, row), (other, zeros)),
            ((row, row), (zeros, zeros)),
        ):
            values, truth = (run(compute, *pair, divergence, temperature) for pair in (ours, expected))
            assert all(x.isfinite().all() for x in values)
            for a, b in zip(values, truth, strict=True):
                compare.assert_value(a, b.double())


def confident(divergence: Divergence, rows: int, seed: int) -> tuple[Tensor, Tensor, bool]:
    """Two sides that are sure of a token each, and whether the divergence's slopes are a moderate multiple of q there.

    Where they are not, a row without gradient has the rounding of one.
    """
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (25 * torch.randn(rows, 1000, generator=generator) for _ in range(2))
    return student, teacher, divergence.name in ("jsd", "skew_kl", "skew_reverse_kl", "tvd")


def judge_confident(compute: Compute, divergence: Divergence, temperature: float) -> None:
    student, teacher, _ = confident(divergence, 6, 0)
    truth = run(reference.kd_rows, student.double(), teacher.double(), divergence, temperature, hard=False)[2]
    ours = run(compute, student, teacher, divergence, temperature, hard=False)[2]
    assert compare.relative_error(ours, truth) < CONFIDENT[divergence.name]


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


def judge_alpha_beta(compute: Compute, alpha: float, beta: float, family: str) -> None:
    """By the definition in 80 digits; the reference too, since it carries out the divisions as kernels do."""
    vocab, temperature = 60, 2.0
    student, teacher = cases.logits(family, 1, vocab)
    log_q, log_p = (torch.log_softmax(x.double()[0] / temperature, -1) for x in (student, teacher))
    cells = [exact_alpha_beta(*logs, alpha, beta) for logs in zip(log_p.tolist(), log_q.tolist(), strict=True)]
    term, slope = torch.tensor(cells, dtype=torch.float64).T
    value, gradient = term.sum()[None], (slope - log_q.exp() * slope.sum())[None] / temperature
    outcomes = []
    for backend, dtype in (
        (reference.kd_rows, torch.float64),
        (reference.kd_rows, torch.float32),
        (compute, torch.float32),
    ):
        grad, scale = torch.empty(1, vocab, dtype=dtype), torch.ones(1, dtype=dtype)
        spec = cases.spec(fastkd.AlphaBeta(alpha, beta), vocab, temperature, soft_weight=1.0)
        soft, _ = backend(student.to(dtype), teacher.to(dtype), None, scale, None, spec, grad)
        outcomes.append((soft, grad))
    truth, eager, ours = outcomes
    assert compare.relative_error(truth[0], value) < compare.DOUBLE
    assert compare.relative_error(truth[1], gradient) < compare.DOUBLE
    assert compare.relative_error(eager[0], value) < compare.EAGER
    assert compare.relative_error(eager[1], gradient) < compare.EAGER
    compare.assert_value(ours[0], value, eager[0])
    compare.assert_gradient(ours[1], eager[1], gradient)
