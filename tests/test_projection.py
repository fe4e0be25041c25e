"""Losses from hidden states: the numbers, the arithmetic spent, and the call with `Projection` sources."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import heads
from fastkd.call import call_for
from fastkd.divergences import TABLE, Divergence
from fastkd.plan import _LEAST_CHUNK
from fastkd.sources import Source
from tests import cases, compare

N, V, H, H_TEACHER = 23, 1100, 16, 24
WHOLE, FEW, TILES = None, 260_000, 215_000  # budgets, as the plans below confirm


@pytest.fixture(autouse=True)
def _few_tokens_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of as few tokens as are tested here would be too slow to be planned."""
    monkeypatch.setitem(_LEAST_CHUNK, "cpu", 16)


def test_the_budgets_here_select_what_they_are_for() -> None:
    plans = [fastkd.plan(N, V, H, H_TEACHER, memory_budget=budget) for budget in (WHOLE, FEW, TILES)]
    assert [plan.strategy for plan in plans] == ["chunks", "chunks", "tiles"]
    assert plans[0].chunk == N
    assert plans[1].chunk < N
    assert plans[2].tile < V


def operands(
    family: str = "far", rows: int = N, vocab: int = V, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(hidden, weight, bias) of student and teacher, whose logits are distributed like the family's in `cases`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale = {"far": 3.0, "near_equal": 3.0, "peaked": 15.0, "flat": 0.01, "offset": 3.0}[family]
    width = H if family == "near_equal" else H_TEACHER
    teacher = normal(rows, width), normal(vocab, width) * scale / width**0.5, normal(vocab)
    student: tuple[Tensor, ...] = normal(rows, H), normal(vocab, H) * scale / H**0.5, normal(vocab)
    if family == "near_equal":
        student = teacher[0] + 3e-3 * normal(rows, H), teacher[1], teacher[2]
    if family == "offset":
        student, teacher = (*student[:2], student[2] + 1e4), (*teacher[:2], teacher[2] - 1e4)
    return tuple(x.to(dtype) for x in student), tuple(x.to(dtype) for x in teacher)


class Outcome:
    """A loss and the gradients of everything it was made from."""

    def __init__(self, loss: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> None:
        self.loss = loss.detach()
        self.gradients = torch.autograd.grad(loss, leaves, upstream)


def leaves_of(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def from_projections(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    student_as: str = "projection",
    teacher_as: str = "projection",
    student_head: dict[str, float] | None = None,
    teacher_head: dict[str, float] | None = None,
    call: dict[str, Any] | None = None,
    upstream: Tensor | None = None,
    **settings: Any,
) -> Outcome:
    """The loss with each side a projection, or the logits that it stands for."""
    leaves = leaves_of(student)
    sources: list[Source] = [
        fastkd.Projection(*leaves, **(student_head or {})),
        fastkd.Projection(*teacher, **(teacher_head or {})),
    ]
    for i, form in enumerate((student_as, teacher_as)):
        if form == "logits":
            sources[i] = sources[i].logits()  # type: ignore[union-attr]
    return Outcome(fastkd.KDLoss(**settings)(*sources, labels, **(call or {})), leaves, upstream)


def truth_and_eager(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor, **options: Any) -> Any:
    """The same from logits tensors on the eager reference: float64 from the same numbers, and fp32."""
    with fastkd.use_backend("reference"):
        return [
            from_projections(
                tuple(x.to(dtype) for x in student),
                tuple(x.to(dtype) for x in teacher),
                labels,
                **{**options, "student_as": "logits", "teacher_as": "logits"},
            )
            for dtype in (torch.float64, torch.float32)
        ]


def judge(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    *,
    run: Callable[..., Outcome] = from_projections,
    certain_rows: float = 0.0,
    **options: Any,
) -> Outcome:
    """The numerics contract for the loss and every gradient."""
    budget = options.pop("memory_budget", None)
    ours = run(student, teacher, labels, memory_budget=budget, **options)
    truth, eager = truth_and_eager(student, teacher, labels, **options)
    compare.assert_value(ours.loss, truth.loss, eager.loss)
    names = ("hidden", "weight", "bias")[: len(student)]
    for name, a, b, c in zip(names, ours.gradients, eager.gradients, truth.gradients, strict=True):
        compare.assert_gradient(a, b.to(a.dtype), c, f"d {name}", certain_rows)
    return ours


# --- numerics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["far", "near_equal", "peaked", "flat", "offset"])
@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_numerics_of_every_divergence(divergence: Divergence, family: str) -> None:
    """Projections on both sides, in whole rows and in tiles."""
    student, teacher = operands(family)
    labels = cases.labels(N, V, ignored=(3, 4, 11))
    for budget in (WHOLE, TILES):
        judge(student, teacher, labels, divergence=divergence, memory_budget=budget, certain_rows=2.0)


@pytest.mark.parametrize("budget", [WHOLE, FEW, TILES])
@pytest.mark.parametrize(("student_as", "teacher_as"), [("projection", "logits"), ("logits", "projection")])
@pytest.mark.parametrize("divergence", TABLE)
def test_numerics_of_mixed_sources(divergence: str, student_as: str, teacher_as: str, budget: int | None) -> None:
    for family in ("far", "near_equal"):
        for ignored in ((), (0, 7, 8)):
            judge(
                *operands(family),
                cases.labels(N, V, ignored=ignored),
                divergence=divergence,
                student_as=student_as,
                teacher_as=teacher_as,
                memory_budget=budget,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [WHOLE, FEW, TILES])
def test_low_precision_operands(dtype: torch.dtype, budget: int | None) -> None:
    """Gradients have one rounding to the parameters' dtype; the truth is float64 on the same 16-bit numbers."""
    student, teacher = operands("far", dtype=dtype)
    ours = judge(student, teacher, cases.labels(N, V, ignored=(2,)), memory_budget=budget)
    assert [g.dtype for g in ours.gradients] == [dtype] * 3


def test_fp16_gradients_leave_the_range_of_fp16_only_after_scaling() -> None:
    """Sums over tokens too large for fp16 before the upstream gradient, and too small."""
    student, teacher = operands("far", dtype=torch.float16)
    labels = torch.full((N,), 7)
    large = {"reduction": "sum", "hard_weight": 5e4, "upstream": torch.tensor(1e-3)}
    small = {"call": {"num_items": 1e7}, "upstream": torch.tensor(1e7)}
    for options in (large, small):
        ours = from_projections(student, teacher, labels, **options)
        truth, _ = truth_and_eager(student, teacher, labels, **options)
        for a, c in zip(ours.gradients, truth.gradients, strict=True):
            assert a.dtype == torch.float16
            assert compare.relative_error(a, c) < 1e-3


def test_rounded_logits_ruin_the_gradient_near_a_match_and_ours_are_not_rounded() -> None:
    student, teacher = operands("near_equal", dtype=torch.bfloat16)
    student = (
        student[0].float().add(1e-2 * torch.randn(N, H, generator=torch.Generator().manual_seed(1))),
        *student[1:],
    )
    student = tuple(x.bfloat16() for x in student)
    labels = cases.labels(N, V)
    settings = {"soft_weight": 1.0, "hard_weight": 0.0}
    truth, _ = truth_and_eager(student, teacher, labels, **settings)
    ours = from_projections(student, teacher, labels, **settings)
    rounded = from_projections(student, teacher, labels, student_as="logits", teacher_as="logits", **settings)
    for ours_, rounded_, truth_ in zip(ours.gradients, rounded.gradients, truth.gradients, strict=True):
        assert compare.relative_error(ours_, truth_) <= 1e-2
        assert compare.relative_error(rounded_, truth_) >= 4e-2
    # … although the losses look alike.
    assert rounded.loss.item() == pytest.approx(truth.loss.item(), rel=0.2)


@pytest.mark.parametrize("budget", [WHOLE, FEW, TILES])
@pytest.mark.parametrize(
    ("student_head", "teacher_head"),
    [({"softcap": 5.0}, {}), ({}, {"softcap": 4.0, "logit_scale": 0.3}), ({"logit_scale": 2.5, "softcap": 7.0},) * 2],
)
def test_softcap_and_logit_scale(student_head: Any, teacher_head: Any, budget: int | None) -> None:
    labels = cases.labels(N, V, ignored=(1,))
    for divergence in ("forward_kl", "jsd", "mse"):
        judge(
            *operands(),
            labels,
            divergence=divergence,
            student_head=student_head,
            teacher_head=teacher_head,
            memory_budget=budget,
        )


def test_mixed_dtypes_of_hidden_and_weight() -> None:
    """As mixed precision leaves them: each gradient in its own tensor's dtype, the products in neither's rounding."""
    (hidden, weight, bias), teacher = operands()
    student = hidden.bfloat16(), weight, bias.half()
    labels = cases.labels(N, V)
    ours = from_projections(student, teacher, labels)
    assert [g.dtype for g in ours.gradients] == [torch.bfloat16, torch.float32, torch.float16]
    truth, _ = truth_and_eager(student, teacher, labels)
    for gradient, exact, limit in zip(ours.gradients, truth.gradients, (3e-3, 1e-6, 5e-4), strict=True):
        assert compare.relative_error(gradient, exact) < limit


def test_float64_on_the_reference() -> None:
    student, teacher = (tuple(x.double() for x in side) for side in operands())
    labels = cases.labels(N, V)
    ours = from_projections(student, teacher, labels)
    truth, _ = truth_and_eager(student, teacher, labels)
    for a, b in zip(ours.gradients, truth.gradients, strict=True):
        assert a.dtype == torch.float64
        assert compare.relative_error(a, b) < 1e-13


def test_vocabularies_padded_to_different_sizes() -> None:
    (hidden, weight, bias), (hidden_t, weight_t, bias_t) = operands()
    labels = cases.labels(N, V - 60)
    pad = torch.full((40, H_TEACHER), 9.0)
    teacher = hidden_t, torch.cat((weight_t, pad)), torch.cat((bias_t, torch.full((40,), 50.0)))
    for budget in (WHOLE, TILES):
        leaves = leaves_of((hidden, weight, bias))
        kd = fastkd.KDLoss(vocab_size=V - 60, memory_budget=budget)
        ours = Outcome(kd(fastkd.Projection(*leaves), fastkd.Projection(*teacher), labels), leaves)
        cut = slice(0, V - 60)
        expected = judge(
            (hidden, weight[cut], bias[cut]), (hidden_t, weight_t[cut], bias_t[cut]), labels, memory_budget=budget
        )
        assert torch.equal(ours.loss, expected.loss)
        assert (ours.gradients[1][V - 60 :] == 0).all()
        assert (ours.gradients[2][V - 60 :] == 0).all()
        for a, b in zip(ours.gradients, expected.gradients, strict=True):
            assert compare.relative_error(a[: len(b)], b) < 1e-6


def test_infinite_biases_mask_tokens() -> None:
    """A bias of −inf: probability 0 on that side, gradient 0 there."""
    (hidden, weight, bias), (hidden_t, weight_t, bias_t) = operands()
    bias[::3] = bias_t[::3] = -torch.inf
    labels = cases.labels(N, V) // 3 * 3 + 1
    for budget in (WHOLE, TILES):
        ours = from_projections((hidden, weight, bias), (hidden_t, weight_t, bias_t), labels, memory_budget=budget)
        keep = torch.arange(V) % 3 != 0
        moved = labels - labels // 3 - 1
        judge((hidden, weight[keep], bias[keep]), (hidden_t, weight_t[keep], bias_t[keep]), moved, memory_budget=budget)
        assert ours.loss.isfinite()
        assert (ours.gradients[1][~keep] == 0).all()
        assert ours.gradients[0].isfinite().all()


# --- chunks and tiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "mse"])
def test_the_budget_changes_nothing_but_the_order_of_sums(divergence: str) -> None:
    student, teacher = operands()
    labels = cases.labels(N, V, ignored=(5,))
    truth, _ = truth_and_eager(student, teacher, labels, divergence=divergence)
    strategies = set()
    for budget in (190_000, 200_000, 240_000, 250_000, 260_000, 320_000, 400_000, 1 << 20, 1 << 30):
        plan = fastkd.plan(N - 1, V, H, H_TEACHER, memory_budget=budget, divergence=divergence)
        strategies.add((plan.strategy, plan.chunk, plan.tile))
        ours = from_projections(student, teacher, labels, divergence=divergence, memory_budget=budget)
        torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=0)
        for a, b in zip(ours.gradients, truth.gradients, strict=True):
            assert compare.relative_error(a, b) < 1e-6
    assert len(strategies) >= 3


def test_twice_the_same_bits() -> None:
    for budget in (FEW, TILES):
        runs = [from_projections(*operands(), cases.labels(N, V), memory_budget=budget) for _ in range(2)]
        assert torch.equal(runs[0].loss, runs[1].loss)
        assert all(torch.equal(a, b) for a, b in zip(runs[0].gradients, runs[1].gradients, strict=True))


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """The FLOPs of every matrix product of the heads."""
    spent: list[int] = []
    product = heads._product

    def counted(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        spent.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        product(a, b, out, accumulate)

    heads._product = counted
    try:
        yield spent
    finally:
        heads._product = product


@pytest.mark.parametrize("budget", [WHOLE, FEW, TILES])
def test_arithmetic_is_what_the_plan_says_and_no_more(budget: int | None) -> None:
    """6NVH + 2NVH' in chunks, H the student's; and nothing for masked tokens."""
    student, teacher = operands()
    masked = (0, 1, 2, 9, 22)
    with counting() as spent:
        from_projections(student, teacher, cases.labels(N, V, ignored=masked), memory_budget=budget)
    plan = fastkd.plan(N - len(masked), V, H, H_TEACHER, memory_budget=budget)
    assert sum(spent) == plan.flops
    if plan.strategy == "chunks":
        assert plan.flops == (N - len(masked)) * V * (6 * H + 2 * H_TEACHER)


@pytest.mark.parametrize(("frozen", "products"), [("hidden", 2), ("weight", 2), ("all", 1)])
def test_frozen_parts_cost_nothing(frozen: str, products: int) -> None:
    (hidden, weight, _), (hidden_t, weight_t, _) = operands()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    with counting() as spent:
        loss = fastkd.kd_loss(
            fastkd.Projection(hidden, weight), fastkd.Projection(hidden_t, weight_t), cases.labels(N, V)
        )
    assert sum(spent) == 2 * N * V * (products * H + H_TEACHER)
    assert loss.requires_grad == (frozen != "all")
    if frozen != "all":
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_no_soft_term_no_teacher() -> None:
    student, teacher = operands()
    with counting() as spent:
        from_projections(student, teacher, cases.labels(N, V), soft_weight=0.0)
    assert sum(spent) == 6 * N * V * H


# --- the call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [WHOLE, TILES])
@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"reduction": "sum", "temperature": 1.0}, {}),
        ({"reduction": "batchmean", "temperature": 3.5}, {}),
        ({"shift": True}, {}),
        ({"shift": True, "mask_soft": False}, {"weights": True}),
        ({"mask_soft": False, "teacher_temperature": 1.5}, {}),
        ({}, {"num_items": 100.0}),
        ({}, {"num_items": torch.tensor(77)}),
        ({"soft_weight": 1.0, "hard_weight": 0.0, "scale_t2": False}, {"weights": True}),
        ({"soft_weight": 0.0, "hard_weight": 1.0}, {}),
    ],
    ids=str,
)
def test_every_setting_as_for_logits(settings: Any, call: Any, budget: int | None) -> None:
    (hidden, weight, bias), (hidden_t, weight_t, bias_t) = operands(rows=24)
    student, teacher = (hidden.view(4, 6, H), weight, bias), (hidden_t.view(4, 6, H_TEACHER), weight_t, bias_t)
    labels = cases.labels(24, V, ignored=(0, 5, 13)).view(4, 6)
    if "weights" in call:
        call = {**call, "weights": torch.rand(4, 6, generator=torch.Generator().manual_seed(3))}
    judge(student, teacher, labels, call=call, memory_budget=budget, **settings)


@pytest.mark.parametrize("budget", [WHOLE, TILES])
@pytest.mark.parametrize("student_as", ["projection", "logits"])
def test_reduction_none_with_any_upstream(student_as: str, budget: int | None) -> None:
    (hidden, weight, bias), teacher = operands(rows=24)
    labels = cases.labels(24, V, ignored=(4,)).view(4, 6)
    student = hidden.view(4, 6, H), weight, bias
    teacher = teacher[0].view(4, 6, -1), *teacher[1:]
    for settings in ({"reduction": "none"}, {"reduction": "none", "shift": True}):
        shape = (4, 5) if "shift" in settings else (4, 6)
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        ours = from_projections(
            student, teacher, labels, student_as, upstream=upstream, memory_budget=budget, **settings
        )
        truth, eager = truth_and_eager(student, teacher, labels, upstream=upstream, **settings)
        compare.assert_value(ours.loss, truth.loss, eager.loss)
        for a, b, c in zip(ours.gradients, eager.gradients, truth.gradients, strict=True):
            compare.assert_gradient(a, b, c)


def test_parts() -> None:
    student, teacher = operands()
    labels = cases.labels(N, V, ignored=(2,))
    kd = fastkd.KDLoss(2.0, soft_weight=0.3, hard_weight=0.6, return_parts=True)
    parts = kd(fastkd.Projection(*student), fastkd.Projection(*teacher), labels)
    expected = kd(fastkd.Projection(*student).logits(), fastkd.Projection(*teacher).logits(), labels)
    for a, b in zip(parts, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_a_second_backward_and_an_upstream_gradient() -> None:
    student, teacher = operands()
    leaves = leaves_of(student)
    loss = fastkd.kd_loss(fastkd.Projection(*leaves), fastkd.Projection(*teacher), cases.labels(N, V))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, leaves, torch.tensor(-2.5), retain_graph=True)
    third = torch.autograd.grad(3 * loss, leaves)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, -2.5 * b)
        torch.testing.assert_close(d, 3 * b)


def test_double_backward_raises() -> None:
    student, teacher = operands()
    leaves = leaves_of(student)
    loss = fastkd.kd_loss(fastkd.Projection(*leaves), fastkd.Projection(*teacher), cases.labels(N, V))
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("student_as", ["projection", "logits"])
def test_nothing_unmasked(rows: int, student_as: str) -> None:
    student, teacher = operands(rows=rows)
    ours = from_projections(student, teacher, torch.full((rows,), -100), student_as)
    assert ours.loss == 0
    assert [g.shape for g in ours.gradients] == [x.shape for x in student]
    assert all((g == 0).all() for g in ours.gradients)


def test_nan_is_not_hidden() -> None:
    student, teacher = operands()
    student[0][3, 2] = torch.nan
    for budget in (WHOLE, TILES):
        ours = from_projections(student, teacher, cases.labels(N, V), memory_budget=budget)
        assert ours.loss.isnan()
        assert all(g.isnan().any() for g in ours.gradients)


@pytest.mark.parametrize("budget", [WHOLE, TILES])
@pytest.mark.parametrize("layout", ["matrix", "slice"])
def test_in_place_on_student_logits_beside_a_teacher_projection(layout: str, budget: int | None) -> None:
    """The gradient replaces the logits: 0 in masked rows and padding, and nothing outside the slice is touched."""
    _, teacher = operands(rows=24)
    logits = cases.logits("far", 24, V + 8)[0]
    labels = cases.labels(24, V, ignored=(0, 9)).view(4, 6)
    memory = torch.full((4, 9, V + 8), 7.0) if layout == "slice" else torch.empty(4, 6, V + 8)
    view = memory[:, :6]
    view.copy_(logits.view(4, 6, -1))
    side = fastkd.Projection(teacher[0].view(4, 6, -1), *teacher[1:])
    results = []
    for inplace in (False, True):
        leaf = view.detach().requires_grad_() if inplace else view.clone().requires_grad_()
        loss = fastkd.kd_loss(leaf, side, labels, vocab_size=V, inplace=inplace, memory_budget=budget)
        loss.backward()
        results.append((loss.detach(), leaf.grad.clone()))
        if inplace:
            assert torch.equal(leaf.grad, view)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)
    assert (results[1][1].view(24, -1)[[0, 9]] == 0).all()
    assert (results[1][1][..., V:] == 0).all()
    assert results[1][1].abs().max() > 0
    if layout == "slice":
        assert (memory[:, 6:] == 7).all()


def test_ragged_micro_batches_equal_one_batch() -> None:
    """Gradient accumulation with the number of tokens of the whole step, in bf16 parameters' fp32 gradients too."""
    (hidden, weight, bias), teacher = operands(rows=40)
    labels = cases.labels(40, V, ignored=(0, 1, 2, 17, 39))
    whole = from_projections((hidden, weight, bias), teacher, labels)
    leaves = leaves_of((hidden, weight, bias))
    total = torch.zeros(())
    for part in (slice(0, 3), slice(3, 20), slice(20, 21), slice(21, 40)):
        loss = fastkd.kd_loss(
            fastkd.Projection(leaves[0][part], *leaves[1:]),
            fastkd.Projection(teacher[0][part], *teacher[1:]),
            labels[part],
            num_items=torch.tensor(35),
        )
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.loss)
    for leaf, gradient in zip(leaves, whole.gradients, strict=True):
        assert compare.relative_error(leaf.grad, gradient) < 1e-6


def test_tied_weights_add_up() -> None:
    """One matrix as embedding and as head."""
    table = (0.3 * torch.randn(V, H, generator=torch.Generator().manual_seed(0))).requires_grad_()
    tokens, labels = cases.labels(N, V, seed=4), cases.labels(N, V)
    _, teacher = operands()

    def loss(projection: bool) -> Tensor:
        hidden = torch.tanh(F.embedding(tokens, table))
        student: Source = fastkd.Projection(hidden, table)
        side: Source = fastkd.Projection(*teacher)
        if not projection:
            student, side = student.logits(), side.logits()  # type: ignore[union-attr]
        return fastkd.kd_loss(student, side, labels)

    ours, expected = (torch.autograd.grad(loss(projection), table)[0] for projection in (True, False))
    assert compare.relative_error(ours, expected) < 1e-6


def test_the_hard_term_is_torchs_linear_cross_entropy() -> None:
    linear_cross_entropy = getattr(F, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    (hidden, weight, bias), _ = operands()
    labels = cases.labels(N, V, ignored=(2, 3))
    outcomes = []
    for ours in (True, False):
        leaves = leaves_of((hidden, weight, bias))
        if ours:
            loss = fastkd.kd_loss(fastkd.Projection(*leaves), None, labels, soft_weight=0.0, hard_weight=1.0)
        else:
            loss = linear_cross_entropy(leaves[0], leaves[1], labels, linear_bias=leaves[2])
        outcomes.append(Outcome(loss, leaves))
    torch.testing.assert_close(outcomes[0].loss, outcomes[1].loss, rtol=2e-6, atol=0)
    for a, b in zip(outcomes[0].gradients, outcomes[1].gradients, strict=True):
        assert compare.relative_error(a, b) < 2e-6


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = operands()
    sides = leaves_of(student), leaves_of(teacher)
    fastkd.kd_loss(fastkd.Projection(*sides[0]), fastkd.Projection(*sides[1]), cases.labels(N, V)).backward()
    assert all(x.grad is not None for x in sides[0])
    assert all(x.grad is None for x in sides[1])


def test_strided_operands() -> None:
    """Slices and transposes of larger tensors."""
    (hidden, weight, bias), (hidden_t, weight_t, bias_t) = operands(rows=24)
    labels = cases.labels(24, V).view(4, 6)
    wide = torch.zeros(6, 4, 2 * H)
    wide[..., ::2] = hidden.view(4, 6, H).transpose(0, 1)
    columns = weight.t().contiguous().t()
    odd = fastkd.Projection(wide.transpose(0, 1)[..., ::2], columns, bias)
    plain = fastkd.Projection(hidden.view(4, 6, H), weight, bias)
    teacher = fastkd.Projection(hidden_t.view(4, 6, -1), weight_t, bias_t)
    torch.testing.assert_close(fastkd.kd_loss(odd, teacher, labels), fastkd.kd_loss(plain, teacher, labels))
    leaf = columns.detach().requires_grad_()
    fastkd.kd_loss(fastkd.Projection(odd.hidden, leaf, bias), teacher, labels).backward()
    other = weight.detach().requires_grad_()
    fastkd.kd_loss(fastkd.Projection(plain.hidden, other, bias), teacher, labels).backward()
    assert compare.relative_error(leaf.grad, other.grad) < 1e-6


# --- with the rest of PyTorch -----------------------------------------------------------------------------------


def test_autocast_rounds_nothing_on_the_cpu() -> None:
    student, teacher = operands("near_equal")
    labels = cases.labels(N, V)
    plain = from_projections(student, teacher, labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = from_projections(student, teacher, labels)
    assert torch.equal(ours.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours.gradients, plain.gradients, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_full_graph(reduction: str) -> None:
    torch._dynamo.reset()
    student, teacher = operands()
    labels = cases.labels(N, V, ignored=(3,))
    kd = fastkd.KDLoss(2.0, reduction=reduction)

    def step(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kd(fastkd.Projection(torch.tanh(h), w, b, softcap=9.0), fastkd.Projection(*teacher), labels).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = (
        Outcome(f(*leaves), leaves) for f, leaves in ((step, leaves_of(student)), (compiled, leaves_of(student)))
    )
    torch.testing.assert_close(actual.loss, expected.loss)
    for a, b in zip(actual.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize("op", ["kd_loss", "kd_rows"])
@pytest.mark.parametrize("student_as", ["projection", "logits"])
def test_opcheck(op: str, student_as: str) -> None:
    student, teacher = operands(rows=4, vocab=70)
    source: Source = fastkd.Projection(*leaves_of(student), softcap=6.0, logit_scale=0.5)
    if student_as == "logits":
        source = fastkd.Projection(*student).logits().requires_grad_()
    scale = torch.full((4,), 0.25)
    spec = cases.spec(fastkd.JSD(), 70)
    arguments = call_for(source, fastkd.Projection(*teacher), cases.labels(4, 70), scale, scale, spec)
    if op == "kd_loss":
        arguments = (*arguments, [True, student_as != "logits", student_as != "logits"])
    torch.library.opcheck(getattr(torch.ops.fastkd, op).default, arguments)


# --- bad input --------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT = torch.zeros(3, H), torch.zeros(V, H)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "list": (lambda: fastkd.Projection([1.0], WEIGHT), TypeError, "Projection hidden must be a torch.Tensor, got list"),
    "integers": (lambda: fastkd.Projection(HIDDEN.long(), WEIGHT), TypeError, "got torch.int64"),
    "weight is transposed": (
        lambda: fastkd.Projection(HIDDEN, WEIGHT.t()),
        ValueError,
        rf"hidden \(3, {H}\) must end in the {V} columns of weight \({H}, {V}\)",
    ),
    "weight is a vector": (lambda: fastkd.Projection(HIDDEN, WEIGHT[0]), ValueError, r"\[vocab, hidden\]"),
    "bias": (lambda: fastkd.Projection(HIDDEN, WEIGHT, WEIGHT[:5, 0]), ValueError, rf"bias must have shape \[{V}\]"),
    "device": (lambda: fastkd.Projection(HIDDEN, WEIGHT.to("meta")), ValueError, "weight is on meta"),
    "float64 and float32": (lambda: fastkd.Projection(HIDDEN.double(), WEIGHT), TypeError, "all be float64 or none"),
    "softcap": (lambda: fastkd.Projection(HIDDEN, WEIGHT, softcap=0.0), ValueError, "softcap must be .* got 0.0"),
    "scale": (lambda: fastkd.Projection(HIDDEN, WEIGHT, logit_scale=-1), ValueError, "logit_scale must be .* got -1"),
    "leading shapes": (
        lambda: fastkd.kd_loss(fastkd.Projection(HIDDEN, WEIGHT), fastkd.Projection(HIDDEN[:2], WEIGHT), None),
        ValueError,
        r"teacher has leading shape \(2,\)",
    ),
    "vocabularies": (
        lambda: fastkd.kd_loss(fastkd.Projection(HIDDEN, WEIGHT), fastkd.Projection(HIDDEN, WEIGHT[1:]), None),
        ValueError,
        rf"student has {V} vocabulary columns and teacher {V - 1}",
    ),
    "label": (
        lambda: fastkd.kd_loss(
            fastkd.Projection(HIDDEN, WEIGHT), fastkd.Projection(HIDDEN, WEIGHT), torch.tensor([0, V, 1])
        ),
        ValueError,
        rf"labels contains {V} \(token 1 of 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_budget_too_small_names_the_least() -> None:
    student, teacher = operands()
    with pytest.raises(ValueError, match="too small") as caught:
        from_projections(student, teacher, cases.labels(N, V), memory_budget=10_000)
    assert "memory_budget=10000" in str(caught.value)
    least = int(str(caught.value).split(" need ")[1].split()[0])
    from_projections(student, teacher, cases.labels(N, V), memory_budget=least)
    with pytest.raises(ValueError, match="too small"):
        from_projections(student, teacher, cases.labels(N, V), memory_budget=least - 1)
