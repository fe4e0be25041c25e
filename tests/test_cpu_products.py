"""Products of bfloat16 operands on CPUs: both ways are right, the race picks the faster one, the variable fixes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd.kernels.cpu import products
from fastkd.projection import loop
from fastkd.projection.plan import Plan, plan_for
from fastkd.terms.rows_apart import Comparison, distance
from tests import cases, compare
from tests.memory import printed
from tests.projections import H, N, V, from_projections, judge, operands, truth_and_eager
from tests.test_plan import MEMORY, MIB

BF16 = torch.bfloat16
#: A gradient's error, relative to that of rounding the true one.
BAR = 1.1
needs_mkl = pytest.mark.skipif(products._gemm() is None, reason="this PyTorch exports no product that keeps fp32")
WAYS = ["fp32", pytest.param("mkl", marks=needs_mkl)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTKD_CPU_PRODUCTS", request.param)
    return str(request.param)


@pytest.fixture
def mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CPU_PRODUCTS", "mkl")


# --- one product ------------------------------------------------------------------------------------------------


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


#: Each makes `[rows, columns]` that lies in memory in another way.
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": _numbers,
    "columns": lambda rows, columns: _numbers(columns, rows).t(),
    "rows apart": lambda rows, columns: _numbers(rows, columns + 5)[:, 2 : 2 + columns],
    "columns apart": lambda rows, columns: _numbers(columns, rows + 3)[:, :rows].t(),
    "neither": lambda rows, columns: _numbers(2 * rows, 3 * columns)[::2, ::3],
    "one row again and again": lambda rows, columns: _numbers(1, columns).expand(rows, columns),
    "one column again and again": lambda rows, columns: _numbers(rows, 1).expand(rows, columns),
}


@needs_mkl
@pytest.mark.parametrize("shape", [(7, 33, 12), (1, 5, 9), (6, 1, 4), (3, 8, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_a_product_of_any_layouts(left: str, right: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = LAYOUTS[left](m, k), LAYOUTS[right](k, n)
    truth = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    around = torch.full((m, n + 2), torch.nan)
    out = around[:, 1:-1]
    products.multiply(a, b, out)  # over a NaN, which would stay in a sum
    assert ((out.double() - truth).abs() <= 1e-6 * size).all()
    products.multiply(a, b, out, accumulate=True)
    assert ((out.double() - 2 * truth).abs() <= 2e-6 * size).all()
    assert around[:, [0, -1]].isnan().all()


@needs_mkl
@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (_numbers(2, 3), _numbers(4, 2), torch.empty(2, 2), r"\(2, 3\) times \(4, 2\)"),
        (_numbers(2, 3), _numbers(3, 2), torch.empty(2, 3), r"into \(2, 3\)"),
        (_numbers(2, 3).float(), _numbers(3, 2), torch.empty(2, 2), "float32 and torch.bfloat16"),
        (_numbers(2, 3), _numbers(3, 2), torch.empty(2, 2, dtype=BF16), "result is torch.bfloat16"),
        (_numbers(2, 3), _numbers(3, 2), torch.empty(2, 2).t(), "to rows, not to columns"),
        (_numbers(2, 3), _numbers(3, 2), torch.empty(4, 4)[::2, ::2], "cannot be written"),
    ],
)
def test_nothing_is_written_out_of_bounds(a: Tensor, b: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        products.multiply(a, b, out)


def test_two_pieces_are_the_gradient() -> None:
    gradient = torch.randn(50, 70) * torch.logspace(-30, 3, 70)
    truth = gradient.double()
    high, low = products.pieces(gradient)
    assert high.dtype == low.dtype == BF16
    assert ((high.double() + low.double() - truth).abs() <= 2.0**-16 * truth.abs()).all()


# --- losses -----------------------------------------------------------------------------------------------------

ROWS, MASKED = 64, [0, 9, 63]
#: Budgets under which the logits of all tokens are held, of some of them, and tiles, without softcap and with it.
BUDGETS = {"whole": (None, None), "some": (640_000, 640_000), "tiles": (280_000, 320_000)}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    made: list[Plan] = []

    def recorded(*arguments: Any, **options: Any) -> Plan:
        made.append(plan_for(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(loop, "plan_for", recorded)
    return made


HEADS: list[Any] = [{}, {"softcap": 6.0, "logit_scale": 0.7}]


def _within_the_bar(actual: Tensor, truth: Tensor) -> bool:
    return compare.relative_error(actual, truth) <= BAR * compare.relative_error(truth.to(BF16), truth)


@pytest.mark.parametrize("held", BUDGETS)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.usefixtures("few_tokens_stand_for_many")
def test_losses_and_gradients(way: str, divergence: str, head: Any, held: str, plans: list[Plan]) -> None:
    """Over chunks and tiles, with a bias and masked rows: errors are those of rounding the result."""
    student, teacher = operands("far", rows=ROWS, dtype=BF16)
    options: dict[str, Any] = {"student_head": head, "teacher_head": head, "divergence": divergence}
    labels = cases.labels(ROWS, V, ignored=MASKED)
    ours = judge(student, teacher, labels, memory_budget=BUDGETS[held][bool(head)], **options)
    truth, _ = truth_and_eager(student, teacher, labels, **options)
    for actual, exact in zip(ours.gradients, truth.gradients, strict=True):
        assert actual.dtype == BF16
        assert _within_the_bar(actual, exact)
    assert (ours.gradients[0][MASKED] == 0).all()
    assert (plans[0].strategy == "tiles") == (held == "tiles")
    assert (plans[0].chunk == ROWS - len(MASKED)) == (held == "whole")


@pytest.mark.usefixtures("mkl")
@needs_mkl
def test_a_gradient_rounded_to_one_piece_would_not_meet_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (tuple(x for x in side[:2]) for side in operands("far", rows=64, dtype=BF16))
    truth, _ = truth_and_eager(student, teacher, labels := cases.labels(64, V))
    monkeypatch.setattr(products, "pieces", lambda gradient: (gradient.to(BF16),))
    ours = from_projections(student, teacher, labels)
    assert not any(map(_within_the_bar, ours.gradients, truth.gradients))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand(way: str, frozen: int) -> None:
    (hidden, weight, _), (above, head, _) = operands("far", dtype=BF16)
    leaves = [hidden.clone().requires_grad_(frozen != 0), weight.clone().requires_grad_(frozen != 1)]
    labels = cases.labels(N, V)
    fastkd.kd_loss(fastkd.Projection(*leaves), fastkd.Projection(above, head), labels).backward()
    truth, _ = truth_and_eager((hidden, weight), (above, head), labels)
    assert leaves[frozen].grad is None
    assert _within_the_bar(leaves[1 - frozen].grad, truth.gradients[1 - frozen])


def test_hidden_states_and_heads_of_any_layout(way: str) -> None:
    (hidden, weight, _), (above, head, _) = operands("far", dtype=BF16)
    odd = torch.empty(N, 2 * H, dtype=BF16)[:, ::2].copy_(hidden), weight.t().contiguous().t()
    labels = cases.labels(N, V)
    ours, plain = (from_projections(one, (above, head), labels) for one in (odd, (hidden, weight)))
    torch.testing.assert_close(ours.loss, plain.loss)
    leaf = odd[1].requires_grad_()
    fastkd.kd_loss(fastkd.Projection(odd[0], leaf), fastkd.Projection(above, head), labels).backward()
    assert compare.relative_error(leaf.grad, plain.gradients[1]) < 1e-3


@needs_mkl
@pytest.mark.usefixtures("mkl")
def test_autocast_rounds_operands_and_nothing_else() -> None:
    """Parameters in fp32: their gradients are fp32's at the rounded operands, to the 16 bits of the pieces."""
    student, teacher = (tuple(side[:2]) for side in operands("far"))
    rounded = [tuple(x.to(BF16).float() for x in side) for side in (student, teacher)]
    labels = cases.labels(N, V)
    truth, _ = truth_and_eager(*rounded, labels)
    with torch.autocast("cpu", BF16):
        ours = from_projections(student, teacher, labels)
    compare.assert_value(ours.loss, truth.loss)
    for actual, exact in zip(ours.gradients, truth.gradients, strict=True):
        assert actual.dtype == torch.float32
        assert compare.relative_error(actual, exact) < 2.0**-16


def test_twice_the_same_bits(way: str) -> None:
    runs = [from_projections(*operands(dtype=BF16), cases.labels(N, V), memory_budget=260_000) for _ in range(2)]
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert all(map(torch.equal, runs[0].gradients, runs[1].gradients))


def test_fp16_and_fp32_are_multiplied_in_fp32(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("only bfloat16 goes to oneMKL")

    monkeypatch.setattr(products, "multiply", refused)
    for dtype in (torch.float16, torch.float32):
        judge(*operands(dtype=dtype), cases.labels(N, V))


def test_rows_through_a_projector(way: str) -> None:
    student, projector, teacher = _numbers(150, 24), _numbers(32, 24), _numbers(150, 32)
    counted = torch.ones(150, dtype=torch.bool)
    found = []
    for dtype in (BF16, torch.float64):
        leaves = [one.to(dtype).requires_grad_() for one in (student, projector)]
        value = distance(leaves[0], [teacher.to(dtype)], None, counted, Comparison("mse", True), leaves[1])
        found.append((value, torch.autograd.grad(value, leaves)))
    (value, gradients), (truth, exact) = found
    compare.assert_value(value, truth)
    assert all(map(_within_the_bar, gradients, exact))


@needs_mkl
@pytest.mark.parametrize("mib", [100, 24])
def test_predicted_memory_is_measured_memory(mib: int, mkl: None) -> None:
    measured, predicted = printed(MEMORY, "bfloat16", str(mib * MIB))
    assert 0.85 * predicted <= measured <= 1.1 * predicted


# --- the choice -------------------------------------------------------------------------------------------------


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A processor with units and nothing raced yet; the seconds of each contender are those of the dictionary."""
    seconds: dict[str, Any] = {"_in_fp32": 1.0, "_by_mkl": 1.0, "_layer_in_fp32": 1.0, "_layer_in_bf16": 1.0, "runs": 0}

    def taken(run: Callable[[Any], None], head: Any) -> float:
        if run.__name__ in ("_in_fp32", "_by_mkl"):
            run(head)
        seconds["runs"] += 1
        return float(seconds[run.__name__])

    monkeypatch.setattr(products, "_has_units", lambda: True)
    monkeypatch.setattr(products, "_found", {})
    monkeypatch.setattr(products, "_seconds", taken)
    monkeypatch.delenv("FASTKD_CPU_PRODUCTS", raising=False)
    return seconds


@needs_mkl
@pytest.mark.parametrize(("mkl_takes", "way"), [(0.5, "mkl"), (0.86, "mkl"), (0.9, "fp32"), (1.5, "fp32"), (9, "fp32")])
def test_the_faster_way_is_taken_where_it_is_clearly_faster(mkl_takes: float, way: str, races: dict[str, Any]) -> None:
    races["_by_mkl"] = mkl_takes
    assert products.multiplies(BF16) == (way == "mkl")
    assert f"bf16 products: {way} (mkl is {1 / mkl_takes:.2f} times as fast)" in fastkd.backends()["cpu"].detail
    runs = races["runs"]
    races["_by_mkl"] = 1 / mkl_takes
    assert products.multiplies(BF16) == (way == "mkl")  # for good: sums are in one order throughout a process
    assert races["runs"] == runs


@needs_mkl
def test_a_way_that_is_wrong_is_not_taken(races: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    races["_by_mkl"] = 0.1
    multiply = products.multiply

    def wrong(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        multiply(a, b, out, accumulate)
        out.mul_(1 + 1e-3)

    monkeypatch.setattr(products, "multiply", wrong)
    assert not products.multiplies(BF16)
    assert "relative error" in products.detail()


def test_no_race_without_units_or_without_a_contender(races: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_gemm", lambda: None)
    assert f"fp32 (PyTorch {torch.__version__} exports no cblas_gemm_bf16bf16f32)" in products.detail()
    products._found.clear()
    monkeypatch.setattr(products, "_has_units", lambda: False)
    assert products.detail() == "bf16 products: fp32 (no bf16 units)"
    assert not products.multiplies(BF16)
    assert not products.gains_in_torch()
    assert races["runs"] == 0


def test_fp32_alone_starts_no_race(races: dict[str, Any]) -> None:
    from_projections(*operands(), cases.labels(N, V))
    assert races["runs"] == 0


@needs_mkl
def test_a_race_minds_nothing_that_the_caller_has_set(races: dict[str, Any]) -> None:
    races["_by_mkl"] = 0.5
    state = torch.get_rng_state()
    with torch.autocast("cpu", BF16), torch.device("meta"), FakeTensorMode():
        assert products.multiplies(BF16)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("narrow", "gains"), [(0.5, True), (0.95, False), (20, False)])
def test_the_layers_of_models_are_raced_too(narrow: float, gains: bool, races: dict[str, Any]) -> None:
    races["_layer_in_bf16"] = narrow
    assert products.gains_in_torch() is gains


def test_the_contenders_compute_what_they_are_raced_for() -> None:
    gain, apart = products._raced(products._layer_in_fp32, products._layer_in_fp32)
    assert gain > 0
    assert apart == 0


def test_the_variable_is_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = fastkd.Projection(torch.randn(3, 4, requires_grad=True), torch.randn(9, 4))
    for name, error, message in (
        ("fast", ValueError, r"FASTKD_CPU_PRODUCTS='fast': choose one of auto, fp32, mkl"),
        ("mkl", RuntimeError, r"'mkl', but PyTorch .* exports no cblas_gemm_bf16bf16f32"),
    ):
        monkeypatch.setenv("FASTKD_CPU_PRODUCTS", name)
        monkeypatch.setattr(products, "_gemm", lambda: None)
        asked: list[Callable[[], object]] = [
            lambda: fastkd.kd_loss(projection, None, torch.zeros(3, dtype=torch.int64), soft_weight=0.0),
            lambda: fastkd.plan(8, 100, 4, 4, dtype=BF16),
            fastkd.backends,
        ]
        for ask in asked:
            with pytest.raises(error, match=message):
                ask()


def test_the_variable_names_the_way(way: str) -> None:
    assert f"bf16 products: {way} (FASTKD_CPU_PRODUCTS)" in fastkd.backends()["cpu"].detail
    assert products.multiplies(BF16) == (way == "mkl")
