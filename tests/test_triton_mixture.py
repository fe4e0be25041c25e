"""The mixing of teachers in Triton: interpreted on CPU tensors, and compiled for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

from fastkd.kernels import gpu
from tests import cases, compare
from tests.test_mix_rows import by_the_formula, teachers_of
from tests.triton_interpreter import interpreted
from tools.machine_code import static
from tools.machine_code.offline import TARGETS, compiled, resources


@pytest.mark.parametrize("vocab", [1, 9, 2050])
@pytest.mark.parametrize("family", ["near_equal", "peaked", "offset"])
def test_log_probabilities(family: str, vocab: int) -> None:
    """Each teacher is read twice and one row is written, over the first teacher."""
    teachers, weights = teachers_of(family, 3, vocab), [0.2, 0.3, 0.5]
    truth, eager = (by_the_formula(teachers, weights, 2.0, dtype) for dtype in (torch.float64, torch.float32))
    with interpreted() as trace:
        gpu.mix_rows(teachers, weights, 2.0, None, teachers[0])
    assert all(trace.loads(teacher).unique().tolist() == [2] for teacher in teachers)
    assert trace.stores(teachers[0]).unique().tolist() == [1]
    found = torch.log_softmax(teachers[0].double() / 2, -1)
    compare.assert_gradient(found.exp(), eager.exp().double(), truth.exp(), "probabilities")
    compare.assert_value(found, truth, eager, "log p")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_rows_that_count_of_any_dtype_and_place(dtype: torch.dtype) -> None:
    """Tokens without probability, broken rows, and rows that are aligned in one teacher only."""
    first, second = teachers_of("far", 2, 1100)
    first, second = first.to(dtype)[:, :1097], second[:, 3:]
    first[:, 5:50], second[:, 40:60] = -torch.inf, -torch.inf
    first[3, 9] = torch.nan
    out, scale = torch.full((4, 1099), 7.0)[:, 2:], torch.tensor([1.0, 0.0, 1.0, 1.0])
    with interpreted() as trace:
        gpu.mix_rows([first, second], [0.4, 0.6], 1.0, scale, out)
    assert (out[1] == 7).all()
    assert not trace.loads(first)[1].any()
    truth = by_the_formula([first, second], [0.4, 0.6], 1.0, torch.float64)
    found = torch.log_softmax(out.double(), -1)
    assert (found[0, 40:50] == -torch.inf).all()
    assert found[3].isnan().all()
    compare.assert_value(found[0::2], truth[0::2])


def two_teachers(vocab: int) -> None:
    """As chunks of projections leave them, rows padded to whole vectors, in place."""
    first, second = (torch.empty(2, -(-vocab // 16) * 16)[:, :vocab] for _ in range(2))
    gpu.mix_rows([first, second], [0.5, 0.5], 2.0, torch.ones(2), first)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_budgets(target: str) -> None:
    """No spills, whole vectors, and no more sweeps than two of each teacher and one of the result."""
    case = static.Case("mix_rows", two_teachers, 4, 1, torch.float32, torch.float32)
    assert not case.broken(static.read(case, target, 50257))


def test_three_teachers_of_16_bits_do_not_spill() -> None:
    """At an odd vocabulary, where rows start anywhere."""
    narrow, out = [torch.empty(2, 50257, dtype=torch.bfloat16) for _ in range(3)], torch.empty(2, 50257)
    with compiled(TARGETS["sm_90"]) as kernels:
        gpu.mix_rows(narrow, [0.2, 0.3, 0.5], 2.0, None, out)
    assert resources(kernels[0]).spills == 0
