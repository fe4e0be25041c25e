"""Losses from hidden states: the numbers, for every mix of sources, and the arithmetic spent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.divergences import Divergence
from fastkd.projection import sides
from tests import cases, compare
from tests.memory import printed
from tests.projections import (
    FEW,
    H_TEACHER,
    TILES,
    WHOLE,
    H,
    N,
    Outcome,
    V,
    from_projections,
    judge,
    leaves_of,
    operands,
    truth_and_eager,
)

pytestmark = pytest.mark.usefixtures("few_tokens_stand_for_many")


def test_the_budgets_here_select_what_they_are_for() -> None:
    plans = [fastkd.plan(N, V, H, H_TEACHER, memory_budget=budget) for budget in (WHOLE, FEW, TILES)]
    assert [plan.strategy for plan in plans] == ["chunks", "chunks", "tiles"]
    assert plans[0].chunk == N
    assert plans[1].chunk < N
    assert plans[2].tile < V


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
@pytest.mark.parametrize("divergence", cases.NAMES)
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


MANY_TILES = """
import sys, torch
from tests import cases
from tests.projections import judge
generator = torch.Generator().manual_seed(3)
student, teacher = ([torch.randn(n, 32, generator=generator) for n in (64, 50257)] for _ in range(2))
labels = cases.labels(64, 50257)
print(judge(student, teacher, labels, divergence=sys.argv[1], memory_budget=1 << 20).loss.item())
"""


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_a_real_vocabulary_in_tiles_reads_each_column_once(divergence: str) -> None:
    """In a process of its own: a sweep that left its tile would crash it, or count its neighbours' memory."""
    assert fastkd.plan(64, 50257, 32, 32, memory_budget=1 << 20, divergence=divergence).strategy == "tiles"
    (loss,) = printed(MANY_TILES, divergence)
    assert loss > 0


def test_twice_the_same_bits() -> None:
    for budget in (FEW, TILES):
        runs = [from_projections(*operands(), cases.labels(N, V), memory_budget=budget) for _ in range(2)]
        assert torch.equal(runs[0].loss, runs[1].loss)
        assert all(torch.equal(a, b) for a, b in zip(runs[0].gradients, runs[1].gradients, strict=True))


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """The FLOPs of every matrix product of the heads."""
    spent: list[int] = []
    product = sides.product

    def counted(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        spent.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        product(a, b, out, accumulate)

    sides.product = counted
    try:
        yield spent
    finally:
        sides.product = product


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
