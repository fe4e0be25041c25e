"""The Triton loss kernels on numbers at the edges, interpreted on CPU tensors. As `test_numerics_edges`."""

from __future__ import annotations

import math
from itertools import cycle

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence
from fastkd.kernels import gpu
from fastkd.sparse import sparse_rows
from tests import cases, compare, edges
from tests.contract import check
from tests.sparse_targets import judge as judge_sparse
from tests.sparse_targets import kept
from tests.triton_interpreter import interpreted
from tests.triton_judge import judge


@pytest.mark.parametrize(
    ("divergence", "place"), list(zip(edges.KINDS, cycle(edges.PLACES[1:3]), strict=False)), ids=str
)
def test_where_a_row_lies_changes_nothing(divergence: Divergence, place: float) -> None:
    with interpreted():
        edges.judge_place(gpu.kd_rows, divergence, place, 300)


@pytest.mark.parametrize("temperature", [edges.TEMPERATURES[0], 1e-3, edges.TEMPERATURES[-1]])
@pytest.mark.parametrize("divergence", edges.TEMPERED, ids=str)
def test_temperatures_from_1e_30_to_1e6(divergence: Divergence, temperature: float) -> None:
    if divergence.name == "alpha_beta" and temperature < 0.1:
        pytest.skip("its powers of p / q are infinite there")
    with interpreted():
        check(gpu.kd_rows, *cases.logits("far", 2, 700), divergence, temperature)


@pytest.mark.parametrize(
    ("divergence", "temperature"), list(zip(edges.TEMPERED, cycle([1.0, 3.7]), strict=False)), ids=str
)
def test_confident_rows_that_disagree(divergence: Divergence, temperature: float) -> None:
    """Each side is sure of a token of its own; whole rows and tiles, and the teacher's likeliest tokens alone."""
    if divergence.name == "alpha_beta" and divergence.parameters in ((0.5, -0.5), (0.0, 0.0), (0.5, 0.0)):
        pytest.skip("the gradient's norm is that of a few columns with huge powers of p / q")
    student, teacher, moderate = edges.confident(divergence, 6, 0)
    certain = 0.0 if moderate else temperature
    for widths in ((), (500, 500)):
        judge(student, teacher, divergence, temperature=temperature, hard=False, widths=widths, certain_rows=certain)
    if moderate:
        targets = kept(teacher, 9, temperature=temperature)
        with interpreted():
            judge_sparse(gpu.kd_rows, student, targets, divergence, temperature, hard=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "divergence", [x for x in edges.TEMPERED if x.normalised and "forward_kl" not in x.name], ids=str
)
def test_16_bit_rows_that_differ_in_one_token(divergence: Divergence, dtype: torch.dtype) -> None:
    """Elsewhere p / q is one number near 1. The gradient in fp32 shows digits that 16 bits would hide.

    The other divergences, and with them sums that have forward KL, take q − p plainly there, and have the digits of the
    contract alone.
    """
    teacher = 3 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    teacher[:, 7] = -6.0
    student = teacher.to(dtype)
    student[:, 7] += 0.125
    grads = [torch.empty(2, 1000, dtype=wide) for wide in (torch.float32, torch.float64)]
    spec, scale = cases.spec(divergence, 1000, 2.0), torch.ones(2)
    with interpreted():
        gpu.kd_rows(student, teacher.to(dtype), None, scale, None, spec, grads[0])
    wide = (student.double(), teacher.to(dtype).double())
    reference.kd_rows(*wide, None, scale.double(), None, spec, grads[1])
    assert compare.relative_error(*grads) < 2e-5


@pytest.mark.parametrize("temperature", [1.0, 3.7])
@pytest.mark.parametrize("divergence", edges.MIXED, ids=str)
def test_digits_of_confident_rows(divergence: Divergence, temperature: float) -> None:
    with interpreted():
        edges.judge_confident(gpu.kd_rows, divergence, temperature)


@pytest.mark.parametrize("family", ["far", "near_equal", "peaked"])
@pytest.mark.parametrize(("alpha", "beta"), edges.ALPHA_BETA)
def test_alpha_beta_at_and_near_its_limits(alpha: float, beta: float, family: str) -> None:
    with interpreted():
        edges.judge_alpha_beta(gpu.kd_rows, alpha, beta, family)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.3])
def test_a_rest_that_underflows_beside_the_tokens_that_are_kept(temperature: float) -> None:
    """A student that is sure of the only token kept: its rest is e^-1000, and the teacher's one percent."""
    vocab, one = 1500, torch.ones(2)
    student, grad = torch.zeros(2, vocab), torch.empty(2, vocab)
    student[:, 0] = 1000.0
    targets = fastkd.SparseTargets(
        torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), math.log(0.99)), "ghost", temperature
    )
    spec = cases.spec(fastkd.ForwardKL(), vocab, temperature, soft_weight=1.0)
    with interpreted():
        soft, _ = gpu.kd_rows(student, sparse_rows(targets, None, vocab, torch.float32), None, one, None, spec, grad)
    log_rest = math.log(vocab - 1) - 1000 / temperature
    expected = 0.99 * math.log(0.99) + 0.01 * (math.log(0.01) - log_rest)
    assert soft.tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert grad[:, 0].tolist() == pytest.approx([0.01 / temperature] * 2, rel=1e-4)
    assert grad[:, 1:].sum(-1).tolist() == pytest.approx([-0.01 / temperature] * 2, rel=1e-4)
