"""The numerics contract: every divergence, every family of distributions, every dtype, against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence
from fastkd.kernels import cpu
from fastkd.kernels.cpu import library
from tests import cases, compare
from tests.contract import check, run

ROWS, VOCAB = 6, 5003  # odd, several blocks and a tail
#: What eager errs at least, within 1e-4 of a match: the documents say about 1 %.
EAGER_NEAR_MATCH = 1e-3


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_contract(divergence: Divergence, family: str, dtype: torch.dtype) -> None:
    if family == "offset" and dtype != torch.float32:
        pytest.skip("an offset of 1e4 leaves nothing of the logits in 8 or 11 bits")
    if family == "peaked" and dtype == torch.float16 and divergence == fastkd.AlphaBeta(0.5, -0.5):
        pytest.skip("the gradient, a power of p/q, is beyond what float16 can hold")
    check(cpu.kd_rows, *cases.logits(family, ROWS, VOCAB, dtype), divergence, 2.0, hard=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("family", ["near_equal", "peaked", "offset"])
@pytest.mark.parametrize("divergence", cases.DIVERGENCES[:9], ids=str)
def test_temperatures(divergence: Divergence, family: str, temperature: float) -> None:
    check(cpu.kd_rows, *cases.logits(family, ROWS, VOCAB), divergence, temperature, hard=True)


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_soft_term_alone(divergence: Divergence, family: str) -> None:
    check(cpu.kd_rows, *cases.logits(family, ROWS, VOCAB), divergence, 2.0, hard=False)


@pytest.mark.parametrize(
    ("divergence", "limit"),
    [
        *((divergence, 1e-6) for divergence in cases.DIVERGENCES if divergence.name in ("jsd", "skew_kl")),
        *((divergence, 1e-6) for divergence in cases.DIVERGENCES if divergence.name == "skew_reverse_kl"),
        (cases.DIVERGENCES[0], 1e-6),  # forward KL
        (cases.DIVERGENCES[1], 1e-3),  # reverse KL, whose value is summed from rounded exponents
        *((divergence, 1e-2) for divergence in cases.DIVERGENCES if divergence.name == "alpha_beta"),
        (fastkd.Mix({fastkd.ForwardKL(): 0.5, fastkd.JSD(beta=0.1): 2.0, fastkd.SkewReverseKL(): 1.0}), 1e-6),
    ],
    ids=str,
)
def test_near_match_keeps_relative_precision(divergence: Divergence, limit: float) -> None:
    """What computing log q − log p from the logits' difference buys where the student is within 1e-4 of the teacher.

    Eager is 0.5–5 % off there. Total variation and alpha-beta work with rounded normalisers and share more of eager's
    cancellation.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(ROWS, VOCAB, generator=generator)
    student = teacher + 1e-4 * torch.randn(ROWS, VOCAB, generator=generator)
    truth = run(reference.kd_rows, student.double(), teacher.double(), divergence, 2.0, False)[2]
    ours = run(cpu.kd_rows, student, teacher, divergence, 2.0, False)[2]
    eager = run(reference.kd_rows, student, teacher, divergence, 2.0, False)[2]
    assert compare.relative_error(ours, truth) < limit
    assert compare.relative_error(eager, truth) > max(compare.relative_error(ours, truth), EAGER_NEAR_MATCH)


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), fastkd.SymmetricKL(weight=0.9)], ids=str)
def test_near_match_but_for_some_tokens(divergence: Divergence, temperature: float) -> None:
    """Vectors of columns that are near and others in one row, whole and of −inf; in place the same bits."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(ROWS, VOCAB, generator=generator)
    student = teacher + 1e-3 * torch.randn(ROWS, VOCAB, generator=generator)
    student[:, 40:1500:40] += 2.0
    student[:, 2000:2500] -= 3.0
    student[1:, 3000:3100] = teacher[1:, 3000:3100] = -torch.inf
    check(cpu.kd_rows, student, teacher, divergence, temperature, hard=True)
    expected = run(cpu.kd_rows, student, teacher, divergence, temperature, True)
    scale, labels = torch.ones(ROWS), cases.labels(ROWS, VOCAB)
    spec = cases.spec(divergence, VOCAB, temperature)
    values = cpu.kd_rows(student, teacher, labels, scale, scale, spec, student)
    assert all(torch.equal(a, b) for a, b in zip((*values, student), expected, strict=True))


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_different_temperatures_and_dtypes(divergence: Divergence) -> None:
    student, teacher = cases.logits("far", ROWS, VOCAB)
    student = student.bfloat16()
    scale, labels = torch.ones(ROWS), cases.labels(ROWS, VOCAB)
    spec = cases.spec(divergence, VOCAB, 2.0, teacher_temperature=3.0)
    outcomes = []
    for backend, inputs in (
        (cpu, (student, teacher)),
        (reference, (student, teacher)),
        (reference, (student.double(), teacher.double())),
    ):
        grad = torch.empty_like(inputs[0])
        outcomes.append((*backend.kd_rows(*inputs, labels, scale, scale, spec, grad), grad))  # type: ignore[attr-defined]
    ours, eager, truth = outcomes
    compare.assert_value(ours[0], truth[0], eager[0])
    undecided = cases.undecided(student, teacher, spec)
    compare.assert_gradient(ours[2], eager[2], truth[2], undecided=undecided)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_masked_vocabulary(divergence: Divergence) -> None:
    """−inf in the same columns of both sides, whole blocks of it included: probability 0, gradient 0, no NaN."""
    student, teacher = cases.logits("far", ROWS, VOCAB)
    masked = torch.zeros(VOCAB, dtype=torch.bool)
    masked[100:3200] = masked[-3:] = True
    student[:, masked] = teacher[:, masked] = -torch.inf
    scale = torch.ones(ROWS)
    spec = cases.spec(divergence, VOCAB)
    outcomes = []
    for backend, dtype in ((cpu, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        grad = torch.full((ROWS, VOCAB), torch.nan, dtype=dtype)
        soft, _ = backend.kd_rows(student.to(dtype), teacher.to(dtype), None, scale, None, spec, grad)  # type: ignore[attr-defined]
        assert soft.isfinite().all()
        assert (grad[:, masked] == 0).all()
        outcomes.append((soft, grad))
    ours, eager, truth = outcomes
    compare.assert_value(ours[0], truth[0], eager[0])
    compare.assert_gradient(ours[1], eager[1], truth[1])
    keep = ~masked
    if divergence.name != "mse":  # whose mean counts every column
        spec = cases.spec(divergence, int(keep.sum()))
        dense, _ = cpu.kd_rows(student[:, keep], teacher[:, keep], None, scale, None, spec, None)
        compare.assert_value(ours[0], dense.double())


def test_one_sided_infinities() -> None:
    """p > 0 beside q = 0 makes forward KL infinite, q > 0 beside p = 0 the reverse; bounded ones stay finite."""
    student, teacher = cases.logits("far", 2, 100)
    student[0, 7] = -torch.inf
    teacher[1, 9] = -torch.inf
    scale = torch.ones(2)
    for divergence in cases.DIVERGENCES[:9]:
        spec = cases.spec(divergence, 100)
        truth, _ = reference.kd_rows(student.double(), teacher.double(), None, scale.double(), None, spec, None)
        ours, _ = cpu.kd_rows(student, teacher, None, scale, None, spec, torch.empty_like(student))
        compare.assert_value(ours, truth, what=divergence.name)
    forward, _ = cpu.kd_rows(student, teacher, None, scale, None, cases.spec(cases.DIVERGENCES[0], 100), None)
    assert forward[0] == torch.inf
    assert forward[1].isfinite()


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_is_never_hidden(divergence: Divergence, side: str) -> None:
    for column in (0, 700, 1023, 1024, 1999):
        student, teacher = cases.logits("far", 2, 2000)
        (student if side == "student" else teacher)[1, column] = torch.nan
        labels = cases.labels(2, 2000)
        scale = torch.ones(2)
        grad = torch.empty_like(student)
        soft, hard = cpu.kd_rows(student, teacher, labels, scale, scale, cases.spec(divergence, 2000), grad)
        assert soft[1].isnan()
        assert soft[0].isfinite()
        assert hard[1].isnan() == (side == "student")
        assert grad[1].isnan().any()
        assert grad[0].isfinite().all()


def test_narrow_instruction_set_keeps_the_contract() -> None:
    """The AVX2 kernels on a processor that would pick wider ones: the same contract in a process of its own."""
    if "v4" not in library.status()[1]:
        pytest.skip("this processor's kernels are the narrow ones already")
    selection = "test_contract and (near_equal or offset) and not bfloat16"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selection]
    result = subprocess.run(
        command, env={**os.environ, "FASTKD_ISA": "v3"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
