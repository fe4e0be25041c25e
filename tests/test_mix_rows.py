"""The primitive behind a mixture of teachers: one row of logits for the probabilities of several."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastkd import reference
from fastkd.backend import Backend, select
from tests import cases, compare


def mixed(teachers: list[Tensor], weights: list[float], temperature: float, scale: Tensor | None = None) -> Tensor:
    """log p of what the backend writes, in float64; written into a view that has columns beside it."""
    around = torch.full((len(teachers[0]), teachers[0].shape[-1] + 5), 7.0)
    out = around[:, 2:-3]
    chosen: Backend = select(teachers[0])
    chosen.mix_rows(teachers, weights, temperature, scale, out)
    assert (around[:, :2] == 7).all()
    assert (around[:, -3:] == 7).all()
    return torch.log_softmax(out.double() / temperature, -1)


def by_the_formula(teachers: list[Tensor], weights: list[float], temperature: float, dtype: torch.dtype) -> Tensor:
    rows = [
        torch.log_softmax(z.to(dtype) / temperature, -1) + math.log(w) for z, w in zip(teachers, weights, strict=True)
    ]
    return torch.logsumexp(torch.stack(rows), 0)


def teachers_of(family: str, count: int, vocab: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [cases.logits(family, 4, vocab, dtype, seed=seed)[1] for seed in range(count)]


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("vocab", [1, 15, 1025])
@pytest.mark.parametrize(("weights", "temperature"), [([0.3, 0.7], 2.0), ([0.2, 1e-6, 0.799999], 1.0), ([1.0], 0.7)])
def test_log_probabilities(backend: str, family: str, vocab: int, weights: list[float], temperature: float) -> None:
    teachers = teachers_of(family, len(weights), vocab)
    truth, eager = (by_the_formula(teachers, weights, temperature, t) for t in (torch.float64, torch.float32))
    found = mixed(teachers, weights, temperature)
    compare.assert_gradient(found.exp(), eager.exp().double(), truth.exp(), "probabilities")
    compare.assert_value(found, truth, eager, "log p")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dtypes_mix_too(backend: str, dtype: torch.dtype) -> None:
    teachers = [*teachers_of("far", 1, 2050, dtype), *teachers_of("peaked", 2, 2050)[1:]]
    truth = by_the_formula(teachers, [0.5, 0.5], 1.5, torch.float64)
    compare.assert_value(mixed(teachers, [0.5, 0.5], 1.5), truth, None, "log p")


def test_in_place_over_any_teacher(backend: str) -> None:
    for place in range(3):
        teachers = [teacher.clone() for teacher in teachers_of("far", 3, 2051)]
        expected = by_the_formula(teachers, [0.2, 0.3, 0.5], 2.0, torch.float64)
        select(teachers[0]).mix_rows(teachers, [0.2, 0.3, 0.5], 2.0, None, teachers[place])
        compare.assert_value(torch.log_softmax(teachers[place].double() / 2, -1), expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e6])
def test_any_temperature(backend: str, temperature: float) -> None:
    teachers = teachers_of("far", 2, 1500)
    truth, eager = (by_the_formula(teachers, [0.4, 0.6], temperature, t) for t in (torch.float64, torch.float32))
    found = mixed(teachers, [0.4, 0.6], temperature)
    compare.assert_gradient(found.exp(), eager.exp().double(), truth.exp(), "probabilities")


def test_tails_do_not_underflow(backend: str) -> None:
    """A probability of e^-400 is 0 in fp32, its logarithm is not, and neither teacher's mass there is lost."""
    teachers = [torch.zeros(1, 40), torch.zeros(1, 40)]
    teachers[0][0, :2] = torch.tensor([0.0, -400.0])
    teachers[0][0, 2:] = teachers[1][0, 2:] = -900.0
    teachers[1][0, :2] = torch.tensor([0.0, -400.5])
    truth = by_the_formula(teachers, [0.25, 0.75], 1.0, torch.float64)
    assert truth[0, 1] < -400
    compare.assert_value(mixed(teachers, [0.25, 0.75], 1.0), truth)


def test_tokens_and_rows_without_probability(backend: str) -> None:
    teachers = teachers_of("far", 2, 1100)
    teachers[0][:, 3:500] = -torch.inf  # of one teacher only
    teachers[1][:, 400:600] = -torch.inf
    teachers[0][2, 7] = torch.nan
    teachers[1][3] = -torch.inf
    found = mixed(teachers, [0.5, 0.5], 1.0)
    assert (found[:2, 400:500] == -torch.inf).all()
    assert (found[:2, :400].isfinite() & found[:2, 500:].isfinite()[:, :1]).all()
    compare.assert_value(found[:2], by_the_formula(teachers, [0.5, 0.5], 1.0, torch.float64)[:2])
    assert found[2:].isnan().all()


def test_rows_that_do_not_count_are_not_read(backend: str) -> None:
    teachers = teachers_of("far", 2, 900)
    expected = mixed(teachers, [0.5, 0.5], 1.0)
    teachers[0][1] = torch.nan
    found = mixed(teachers, [0.5, 0.5], 1.0, torch.tensor([1.0, 0.0, 2.0, 1.0]))
    others = torch.tensor([0, 2, 3])
    assert torch.equal(found[others], expected[others])
    if backend == "cpu":
        assert not found[1].isnan().any()


def test_rows_at_any_stride(backend: str) -> None:
    """Views of wider rows, every other one, on many rows and two threads."""
    torch.set_num_threads(2)
    memory = torch.randn(2, 120, 701)
    teachers = [memory[0, ::2, 1:], memory[1, 1::2, :-1]]
    compare.assert_value(mixed(teachers, [0.1, 0.9], 1.0), by_the_formula(teachers, [0.1, 0.9], 1.0, torch.float64))


def test_no_rows(backend: str) -> None:
    assert mixed([torch.empty(0, 5)] * 2, [0.5, 0.5], 1.0).shape == (0, 5)


def test_reference_in_float64() -> None:
    teachers = [teacher.double() for teacher in teachers_of("peaked", 3, 300)]
    out, weights = torch.empty(4, 300, dtype=torch.float64), [0.2, 0.3, 0.5]
    reference.mix_rows(teachers, weights, 3.0, None, out)
    p = sum(w * torch.softmax(z / 3, -1) for z, w in zip(teachers, weights, strict=True))
    torch.testing.assert_close(torch.softmax(out / 3, -1), p, rtol=compare.DOUBLE, atol=0)
