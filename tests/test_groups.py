"""Chunks of tokens whose 16-bit gradients wait for one product: the same numbers, fewer products, planned memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastkd
from fastkd.kernels import cpu
from fastkd.projection import loop
from fastkd.projection.plan import Plan, plan_for
from fastkd.rows import Wants
from tests import cases, compare
from tests.as_on_gpus import run_on_meta, sixteen_bit_products
from tests.projections import H, V, from_projections, operands, truth_and_eager

pytestmark = pytest.mark.usefixtures("few_tokens_stand_for_many")

N = 150
#: A budget for whole rows in groups of several chunks, and one for tiles in such groups, without softcap and with it.
GROUPS, TILES = 600_000, {False: 250_000, True: 300_000}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    made: list[Plan] = []

    def recorded(*arguments: Any, **options: Any) -> Plan:
        made.append(plan_for(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(loop, "plan_for", recorded)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["chunks", "tiles"])
@pytest.mark.parametrize("head", [{}, {"softcap": 6.0, "logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_numerics(
    divergence: str,
    head: Any,
    strategy: str,
    dtype: torch.dtype,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against float64, from the same 16-bit operands; groups and chunks that do not divide the tokens."""
    student, teacher = operands("far", rows=N, dtype=dtype)
    labels = cases.labels(N, V, ignored=(0, 9, 77, N - 1))
    options: dict[str, Any] = {"student_head": head, "teacher_head": head, "divergence": divergence}
    budget = GROUPS if strategy == "chunks" else TILES["softcap" in head]
    truth, eager = truth_and_eager(student, teacher, labels, **options)
    with monkeypatch.context() as patch:
        sixteen_bit_products(patch, dtype, cpu)
        ours = from_projections(student, teacher, labels, memory_budget=budget, **options)
    (plan,) = plans
    assert plan.strategy == strategy
    assert plan.chunk < plan.group < N
    compare.assert_value(ours.loss, truth.loss, eager.loss)
    for a, c in zip(ours.gradients, truth.gradients, strict=True):
        assert a.dtype == dtype
        assert compare.relative_error(a, c) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert (ours.gradients[0][[0, 9, 77, N - 1]] == 0).all()


def test_a_row_has_its_own_value_and_gradient(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `reduction="none"`, and a teacher that is a tensor: no row is taken for another of its group."""
    student, teacher = operands("far", rows=N, dtype=torch.bfloat16)
    labels, upstream = cases.labels(N, V), torch.linspace(-1, 2, N)
    options: dict[str, Any] = {"reduction": "none", "upstream": upstream, "teacher_as": "logits"}
    truth, _ = truth_and_eager(student, teacher, labels, **options)
    sixteen_bit_products(monkeypatch, torch.bfloat16, cpu)
    ours = from_projections(student, teacher, labels, memory_budget=GROUPS, **options)
    assert plans[-1].chunk < plans[-1].group < N
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-2, atol=1e-3)  # the teacher's logits are bf16
    assert compare.relative_error(ours.gradients[0], truth.gradients[0]) < 1e-2


def test_the_head_gradient_is_written_once_for_a_group(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = operands("far", rows=N, dtype=torch.bfloat16)
    products = sixteen_bit_products(monkeypatch, torch.bfloat16, cpu)
    from_projections(student, teacher, cases.labels(N, V), memory_budget=GROUPS)
    (plan,) = plans
    groups, chunks = -(-N // plan.group), sum(-(-min(plan.group, N - g) // plan.chunk) for g in range(0, N, plan.group))
    assert 1 < groups < chunks
    assert sum(2 * m * k * n for m, k, n in products) == plan.flops
    assert [(m, n) for m, _, n in products].count((V, H)) == groups
    assert len(products) == 2 * chunks + 2 * groups


@pytest.mark.parametrize(
    ("frozen", "operand"), [("weight", torch.bfloat16), (None, torch.float32)], ids=["frozen head", "fp32"]
)
def test_where_nothing_is_saved_a_group_is_a_chunk(
    frozen: str | None, operand: torch.dtype, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    (hidden, weight, _), teacher = operands("far", rows=N, dtype=operand)
    weight.requires_grad_(frozen is None)
    sixteen_bit_products(monkeypatch, operand, cpu)
    projection = fastkd.Projection(hidden.requires_grad_(), weight)
    fastkd.kd_loss(projection, fastkd.Projection(*teacher), cases.labels(N, V), memory_budget=GROUPS).backward()
    assert plans[-1].chunk == plans[-1].group < N


@pytest.mark.parametrize("mib", [None, 16384, 2048, 300, 40])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 30.0},
        {"operand": torch.float32},
        {"wants": Wants(True, False, False)},
        {"dtype": torch.float32},
    ],
    ids=["bf16", "softcap", "fp32 products", "frozen head", "autocast"],
)
def test_the_memory_planned_is_what_is_allocated(
    options: dict[str, Any], mib: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 %, at full size. On the meta device, so it also shows that no value is read on the way."""
    budget = None if mib is None else mib << 20
    plan, most = run_on_meta(monkeypatch, 8192, 128256, (2048, 4096), memory_budget=budget, **options)
    assert 0.95 * plan.peak_bytes <= most <= 1.05 * plan.peak_bytes
    if budget is not None:
        assert plan.working_bytes <= budget


def test_waiting_for_the_device_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool(x.any())):
        monkeypatch.setattr(loop, "_live_rows", lambda call, columns, read=read: read(call.soft_scale))
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            run_on_meta(monkeypatch, 64, 500, (16, 16))
