"""`live`: the number of tokens that count, known on the host, so that a GPU leaves the others out and nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import arguments, live, losses
from fastkd.call import Call
from fastkd.kernels import cpu
from fastkd.projection import loop
from fastkd.projection.plan import Plan, plan_for
from tests import cases, compare
from tests.as_on_gpus import run_on_meta, sixteen_bit_products
from tests.projections import H_TEACHER, H, V, from_projections, leaves_of, operands, truth_and_eager
from tests.sparse_targets import kept

pytestmark = pytest.mark.usefixtures("few_tokens_stand_for_many")

BATCH, LENGTH = 5, 30
N = BATCH * LENGTH
MASKED = (*range(40), 41, 77, 90, 91, N - 1)
#: Settings, whether weights are given of which some are 0, and how many tokens count.
COUNTS: list[tuple[dict[str, Any], bool, int]] = [
    ({}, False, N - len(MASKED)),
    ({"reduction": "none"}, False, N - len(MASKED)),
    ({}, True, N - len(MASKED) - 2),
    ({"shift": True}, False, N - len(MASKED) - 2),
    ({"mask_soft": False}, False, N),
    ({"mask_soft": False, "shift": True}, False, N - BATCH),
    ({"mask_soft": False, "soft_weight": 0.0}, False, N - len(MASKED)),
]


def inputs(weighted: bool) -> tuple[Tensor, Tensor | None]:
    """Labels and weights `[BATCH, LENGTH]`."""
    labels = cases.labels(N, V, ignored=MASKED).view(BATCH, LENGTH)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.5
    weights[[3, 50, 120]] = 0  # the first is masked anyway
    return labels, weights.view(BATCH, LENGTH) if weighted else None


def folded(side: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return side[0].view(BATCH, LENGTH, -1), *side[1:]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    made: list[Plan] = []

    def recorded(*given: Any, **options: Any) -> Plan:
        made.append(plan_for(*given, **options))
        return made[-1]

    monkeypatch.setattr(loop, "plan_for", recorded)
    return made


# --- the number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["projection", "logits"])
@pytest.mark.parametrize(("settings", "weighted", "count"), COUNTS, ids=str)
def test_the_right_number_changes_nothing_on_the_cpu_and_a_wrong_one_raises(
    settings: dict[str, Any], weighted: bool, count: int, source: str
) -> None:
    student, teacher = (folded(side) for side in operands("far", rows=N))
    labels, weights = inputs(weighted)
    upstream = torch.randn(BATCH, LENGTH) if "reduction" in settings else None
    options: dict[str, Any] = {"student_as": source, "teacher_as": source, "upstream": upstream, **settings}
    found = [
        from_projections(student, teacher, labels, call={"weights": weights, "live": number}, **options)
        for number in (None, count)
    ]
    assert torch.equal(found[0].loss, found[1].loss)
    assert all(torch.equal(a, b) for a, b in zip(found[0].gradients, found[1].gradients, strict=True))
    for wrong in (count - 1, count + 1 if count < N else 0):
        with pytest.raises(ValueError, match=f"live={wrong}, but {count} tokens count"):
            from_projections(student, teacher, labels, call={"weights": weights, "live": wrong}, **options)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (-1, ValueError, "live must be >= 0, got -1"),
        (2.5, TypeError, "live must be an int, got 2.5"),
        (True, TypeError, "live must be an int, got True"),
        (N + 1, ValueError, f"live={N + 1}, but there are {N} tokens"),
    ],
)
def test_what_is_no_number_of_tokens(number: Any, error: Any, message: str) -> None:
    student, teacher = operands(rows=N)
    with pytest.raises(error, match=message):
        fastkd.kd_loss(fastkd.Projection(*student), fastkd.Projection(*teacher), cases.labels(N, V), live=number)


def test_a_wrong_number_where_nobody_looks_makes_everything_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (folded(side) for side in operands("far", rows=N))
    labels, _ = inputs(False)
    right = N - len(MASKED)
    monkeypatch.setattr(arguments, "is_checked", lambda values: False)
    monkeypatch.setattr(loop, "_tells", lambda call: False)
    for settings in ({}, {"mask_soft": False, "soft_weight": 0.0}, {"reduction": "sum"}):
        for number in (0, right - 1, right + 1, right):
            found = from_projections(student, teacher, labels, call={"live": number}, **settings)
            for value in (found.loss, *found.gradients):
                assert value.isnan().any() == (number != right)
    parts = fastkd.KDLoss(return_parts=True)(fastkd.Projection(*student), fastkd.Projection(*teacher), labels, live=0)
    assert all(part.isnan() for part in parts)


def test_debugging_raises_where_nobody_else_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        device = torch.device("cuda")

    assert arguments.is_checked(torch.zeros(1))
    monkeypatch.setattr(arguments, "Tensor", Elsewhere)
    assert not arguments.is_checked(Elsewhere())  # type: ignore[arg-type]
    monkeypatch.setenv("FASTKD_DEBUG", "1")
    assert arguments.is_checked(Elsewhere())  # type: ignore[arg-type]


# --- what is left out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 600_000, 250_000])
@pytest.mark.parametrize(("settings", "weighted", "count"), COUNTS, ids=str)
def test_only_tokens_that_count_meet_a_product(
    settings: dict[str, Any], weighted: bool, count: int, budget: int | None, plans: list[Plan], monkeypatch: Any
) -> None:
    student, teacher = (folded(side) for side in operands("far", rows=N, dtype=torch.bfloat16))
    labels, weights = inputs(weighted)
    shape = (BATCH, LENGTH - settings.get("shift", False))
    upstream = torch.linspace(-1, 2, shape[0] * shape[1]).view(shape) if "reduction" in settings else None
    call = {"weights": weights}
    truth, _ = truth_and_eager(student, teacher, labels, call=call, upstream=upstream, **settings)
    products = sixteen_bit_products(monkeypatch, torch.bfloat16, cpu)
    options: dict[str, Any] = {"upstream": upstream, "memory_budget": budget, **settings}
    ours = from_projections(student, teacher, labels, call={**call, "live": count}, **options)
    spent = sum(2 * m * k * n for m, k, n in products)
    assert {plan.tokens for plan in plans} == {count}
    if budget is None and "reduction" not in settings:
        assert spent == 2 * count * V * (3 * H + (H_TEACHER if settings.get("soft_weight", 1) else 0))
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-4, atol=1e-5)
    for a, c in zip(ours.gradients, truth.gradients, strict=True):
        assert compare.relative_error(a, c) < 4e-3


def test_beside_a_sparse_teacher_and_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = operands("far", rows=N)
    labels = cases.labels(N, V, ignored=MASKED)
    logits = fastkd.Projection(*teacher).logits()
    for other in (kept(logits, 20, "ghost"), logits):
        leaves = leaves_of(student)
        expected = fastkd.kd_loss(fastkd.Projection(*leaves), other, labels)
        with monkeypatch.context() as patch:
            sixteen_bit_products(patch, torch.float32, cpu)
            found = fastkd.kd_loss(
                fastkd.Projection(*leaves), other, labels, live=N - len(MASKED), memory_budget=600_000
            )
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_student_logits_that_are_no_matrix_beside_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher = operands("far", rows=N)
    memory = torch.randn(BATCH, LENGTH + 3, V)
    labels, _ = inputs(False)
    other = fastkd.Projection(*folded(teacher))
    found = []
    for number in (None, N - len(MASKED)):
        leaf = memory.clone().requires_grad_()
        with monkeypatch.context() as patch:
            if number is not None:
                sixteen_bit_products(patch, torch.float32, cpu)
            fastkd.kd_loss(leaf[:, :LENGTH], other, labels, live=number).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().max() > 0


def test_fewer_than_said_spoil_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the host, `live` may be too large: weights on the device may be 0. What follows has no scale."""
    student, teacher = operands("far", rows=N)
    labels = cases.labels(N, V, ignored=MASKED)
    expected = from_projections(student, teacher, labels)
    made = loop._live_rows
    sixteen_bit_products(monkeypatch, torch.float32, cpu)
    monkeypatch.setattr(loop, "_live_rows", lambda call, columns: made(call._replace(live=N - 10), columns))
    found = from_projections(student, teacher, labels)
    torch.testing.assert_close(found.loss, expected.loss)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("number", [0, 1, 4000, 8192])
def test_memory_and_waiting(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: no value is read, and what is gathered is planned."""
    plan, most = run_on_meta(
        monkeypatch, 8192, 50257, (2048, 4096), change=lambda call: call._replace(live=number), memory_budget=1 << 30
    )
    assert plan.tokens == max(number, 1)
    planned = plan.peak_bytes + 2 * (8192 - plan.tokens) * 2048  # d hidden is of all tokens
    assert 0.95 * planned <= most <= 1.05 * planned


# --- counted on the host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "weighted", "count"), COUNTS, ids=str)
def test_labels_on_the_host_are_counted_there(
    settings: dict[str, Any], weighted: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states elsewhere: on the meta device, which stands for a GPU."""
    labels, weights = inputs(weighted)
    calls: list[Call] = []

    def run(self: fastkd.KDLoss, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(call)
        return (torch.zeros(N, device="meta"),) * 3

    monkeypatch.setattr(arguments, "holds_values", lambda name, value: None)
    monkeypatch.setattr(fastkd.KDLoss, "_run", run)
    monkeypatch.setattr(losses, "autocast_dtype", lambda device: None)
    student, teacher = (
        fastkd.Projection(torch.empty(BATCH, LENGTH, width, device="meta"), torch.empty(V, width, device="meta"))
        for width in (H, H_TEACHER)
    )
    kd = fastkd.KDLoss(**settings)
    kd(student, teacher, labels, weights=weights)
    (call,) = calls
    # Where every token counts in the soft term, labels say nothing.
    assert call.live == (None if settings.get("mask_soft") is False and "soft_weight" not in settings else count)
    assert {x.device.type for x in call.tensors if x is not None} == {"meta"}
    kd(student, teacher, labels, weights=weights, live=count)
    assert calls[1].live == count
    with pytest.raises(ValueError, match=f"live=7, but {count} tokens count"):
        kd(student, teacher, labels, weights=weights, live=7)
    with pytest.raises(ValueError, match="labels is on cpu, but the student is on meta"):
        kd(torch.empty(BATCH, LENGTH, V, device="meta"), None, labels)


def test_labels_are_not_moved_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        live.moved(torch.zeros(3), torch.device("cuda"))


# --- torch.compile ----------------------------------------------------------------------------------------------


def test_another_number_compiles_nothing_again() -> None:
    student, teacher = operands(rows=N)
    compiled = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(labels: Tensor, number: int) -> Any:
        return fastkd.kd_loss(fastkd.Projection(*student), fastkd.Projection(*teacher), labels, live=number)

    for masked in ((), (1, 2), (3, 5, 6), (7, 8, 9, 10)):
        labels = cases.labels(N, V, ignored=masked)
        expected = fastkd.kd_loss(fastkd.Projection(*student), fastkd.Projection(*teacher), labels)
        torch.testing.assert_close(step(labels, N - len(masked)), expected)
    assert compiled <= 2  # the second makes the number a symbol
    assert step(cases.labels(N, V), 3).isnan()
