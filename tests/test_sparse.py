"""What the kinds of sparse targets mean, in every way a loss is called."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.call import call_for
from fastkd.projection import loop
from fastkd.projection.plan import Plan, plan_for
from fastkd.sources import Source
from tests import cases, compare
from tests.sparse_targets import ROWS, kept


def textbook(student: Tensor, targets: fastkd.SparseTargets, labels: Tensor, reduction: str) -> Tensor:
    """Forward KL on K tokens in ordinary autograd, written the usual way, and cross-entropy; T = 2."""
    log_q = torch.log_softmax(student / 2, -1).gather(-1, targets.ids)
    p = targets.logprobs.exp()
    if targets.kind == "renormalize":
        p = p / p.sum(-1, keepdim=True)
    soft = (p * (p.log() - log_q)).sum(-1) if targets.kind != "sampled" else -(p * log_q).sum(-1)
    if targets.kind == "ghost":
        rest_p, rest_q = 1 - p.sum(-1), 1 - log_q.exp().sum(-1)
        soft = soft + rest_p * (rest_p / rest_q).log()
    hard = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    rows = torch.where(labels == -100, 0.0, 0.5 * 4 * soft + 0.5 * hard)
    return rows if reduction == "none" else rows.sum() / (labels != -100).sum()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["ghost", "renormalize", "sampled"])
def test_the_reference_agrees_with_autograd(kind: str, reduction: str) -> None:
    fastkd.use_backend("reference")
    student, teacher = (x.double() for x in cases.logits("far", 6, 40))
    labels = cases.labels(6, 40, ignored=(2,))
    targets = kept(teacher, 7, kind)
    upstream = torch.rand(6, dtype=torch.float64) if reduction == "none" else None
    student.requires_grad_()
    ours = fastkd.kd_loss(student, targets, labels, reduction=reduction)
    theirs = textbook(student, targets, labels, reduction)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    gradients = [torch.autograd.grad(loss, student, upstream)[0] for loss in (ours, theirs)]
    assert compare.relative_error(*gradients) < 1e-12


H = 16
#: Budget → the strategy it leads to and whether all tokens fit.
BUDGETS = {None: ("chunks", True), 180_000: ("chunks", False), 140_000: ("tiles", False)}


def outcome(
    student: tuple[Tensor, ...], targets: fastkd.SparseTargets, labels: Tensor, dtype: torch.dtype, **settings: Any
) -> tuple[Tensor, ...]:
    leaves = [x.to(dtype).clone().requires_grad_() for x in student]
    source: Source = fastkd.Projection(*leaves)
    if dtype == torch.float64:
        source = source.logits()  # type: ignore[union-attr]
        targets = fastkd.SparseTargets(
            targets.ids, targets.logprobs.double(), targets.kind, targets.temperature, entropy=targets.entropy
        )
    loss = fastkd.kd_loss(source, targets, labels, **settings)
    upstream = torch.arange(1.0, loss.numel() + 1).to(loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("kind", "divergence"), [("ghost", "forward_kl"), ("ghost", "jsd"), ("sampled", "forward_kl")])
def test_projections(
    kind: str,
    divergence: str,
    reduction: str,
    budget: int | None,
    monkeypatch: pytest.MonkeyPatch,
    few_tokens_stand_for_many: None,
) -> None:
    """A student whose logits are never formed, whole rows and tiles alike, masked tokens left out."""
    plans: list[Plan] = []

    def recorded(*arguments: Any, **options: Any) -> Plan:
        plans.append(plan_for(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(loop, "plan_for", recorded)
    generator = torch.Generator().manual_seed(0)
    student = tuple(torch.randn(*shape, generator=generator) for shape in ((40, H), (1100, H), (1100,)))
    targets = kept(3 * torch.randn(40, 1100, generator=generator), 7, kind)
    targets = fastkd.SparseTargets(targets.ids, targets.logprobs, kind, 2.0)
    labels = cases.labels(40, 1100, ignored=(3, 20))
    settings = {"reduction": reduction, "divergence": divergence}
    ours = outcome(student, targets, labels, torch.float32, memory_budget=budget, **settings)
    assert {(plan.strategy, plan.chunk == 38) for plan in plans} == {BUDGETS[budget]}
    assert all(plan.flops <= 2 * 38 * 1100 * H * (3 if plan.strategy == "chunks" else 4) for plan in plans)
    with fastkd.use_backend("reference"):
        truth = outcome(student, targets, labels, torch.float64, **settings)
        eager = outcome(student, targets, labels, torch.float32, **settings)
    compare.assert_value(ours[0], truth[0], eager[0])
    for a, b, c in zip(ours[1:], eager[1:], truth[1:], strict=True):
        compare.assert_gradient(a, b, c)


def test_shift_weights_and_masks_as_with_logits() -> None:
    """Everything per token is in two scales before a kernel runs; the sequence dimension moves with the logits."""
    student, teacher = (x.view(2, 5, 60) for x in cases.logits("far", 10, 60))
    labels = cases.labels(10, 60, ignored=(3,)).view(2, 5)
    weights = torch.rand(2, 5)
    settings = {"shift": True, "weights": weights, "num_items": 5.0, "return_parts": True}
    ours = fastkd.kd_loss(student, kept(teacher, 60), labels, **settings)
    dense = fastkd.kd_loss(student, teacher, labels, **settings)
    for a, b in zip(ours, dense, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5)


def test_padded_vocabularies() -> None:
    student, teacher = cases.logits("far", ROWS, 60)
    z = student.clone().requires_grad_()
    loss = fastkd.kd_loss(z, kept(teacher[:, :50], 5), soft_weight=1, hard_weight=0, vocab_size=50)
    (grad,) = torch.autograd.grad(loss, z)
    assert (grad[:, 50:] == 0).all()
    narrow = student[:, :50].clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        fastkd.kd_loss(narrow, kept(teacher[:, :50], 5), soft_weight=1, hard_weight=0), narrow
    )
    assert torch.equal(grad[:, :50], expected)


def test_in_place(backend: str) -> None:
    student, teacher = cases.logits("far", ROWS, 2100)
    labels, targets = cases.labels(ROWS, 2100), kept(teacher, 9)
    gradients = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        logits = leaf * 1
        other = (logits * logits).sum()
        fastkd.kd_loss(logits, targets, labels, inplace=inplace).backward(retain_graph=True)
        gradients.append(leaf.grad)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                other.backward()
    assert torch.equal(*gradients)


def test_second_backward_and_the_same_bits_twice(backend: str) -> None:
    student, teacher = cases.logits("far", ROWS, 2100)
    student.requires_grad_()
    loss = fastkd.kd_loss(student, kept(teacher, 9), cases.labels(ROWS, 2100))
    first = torch.autograd.grad(2 * loss, student, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(2 * loss, student)[0], first)


def test_absent_entries(backend: str) -> None:
    """-inf marks them: a row may keep fewer than K, or none, whatever the ids there say."""
    student, teacher = cases.logits("far", 3, 70)
    few = kept(teacher, 4)
    wide_ids = torch.full((3, 9), -1)
    wide_logprobs = torch.full((3, 9), -math.inf)
    wide_ids[:, 2:6], wide_logprobs[:, 2:6] = few.ids, few.logprobs
    results = []
    for ids, logprobs in ((few.ids, few.logprobs), (wide_ids, wide_logprobs)):
        z = student.clone().requires_grad_()
        loss = fastkd.kd_loss(z, fastkd.SparseTargets(ids, logprobs, "ghost", 2.0), soft_weight=1, hard_weight=0)
        results.append((loss, torch.autograd.grad(loss, z)[0]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    assert compare.relative_error(results[0][1], results[1][1]) < 1e-6
    z = student.clone().requires_grad_()
    nothing = fastkd.SparseTargets(wide_ids, torch.full((3, 9), -math.inf), "ghost", 2.0)
    loss = fastkd.kd_loss(z, nothing, soft_weight=1, hard_weight=0)
    assert loss == 0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_infinities_and_nan(backend: str) -> None:
    student, teacher = cases.logits("far", 4, 300)
    targets = kept(teacher, 5)
    student[0, targets.ids[0, 0]] = -math.inf  # p > 0, q = 0
    student[1, int(teacher[1].argmin())] = -math.inf  # one of the rest: a masked token
    student[2, int(teacher[2].argmin())] = math.nan
    z = student.clone().requires_grad_()
    rows = fastkd.kd_loss(z, targets, soft_weight=1, hard_weight=0, reduction="none")
    assert rows[0] == math.inf
    assert rows[1].isfinite()
    assert rows[2].isnan()
    assert rows[3].isfinite()
    (grad,) = torch.autograd.grad(rows.sum(), z)
    assert grad[1].isfinite().all()
    assert grad[2].isnan().any()
    assert grad[3].isfinite().all()


def test_sampled_targets_are_unbiased() -> None:
    """Over many draws of K tokens, value and gradient tend to those of the whole row."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = 2 * torch.randn(1, 50, generator=generator), torch.randn(1, 50, generator=generator)
    p = torch.softmax(teacher / 2, -1)
    draws, per_draw = 20_000, 12
    counts = torch.zeros(draws, 50).scatter_add_(
        1,
        torch.multinomial(p.expand(draws, 50), per_draw, replacement=True, generator=generator),
        torch.ones(draws, per_draw),
    )
    weights, ids = counts.topk(per_draw)
    entropy = torch.distributions.Categorical(p).entropy().expand(draws)
    targets = fastkd.SparseTargets(ids, (weights / per_draw).log(), "sampled", 2.0, entropy=entropy)
    z = student.expand(draws, 50).clone().requires_grad_()
    estimate = fastkd.kd_loss(z, targets, soft_weight=1, hard_weight=0)
    whole = student.clone().requires_grad_()
    dense = fastkd.kd_loss(whole, teacher, soft_weight=1, hard_weight=0)
    assert estimate.item() == pytest.approx(dense.item(), abs=0.02)
    mean = torch.autograd.grad(estimate, z)[0].sum(0, keepdim=True)
    (truth,) = torch.autograd.grad(dense, whole)
    assert compare.relative_error(mean, truth) < 0.03
    one_draw = torch.autograd.grad(
        fastkd.kd_loss(
            (one := student.clone().requires_grad_()),
            fastkd.SparseTargets(ids[:1], targets.logprobs[:1], "sampled", 2.0),
            soft_weight=1,
            hard_weight=0,
        ),
        one,
    )[0]
    assert compare.relative_error(one_draw, truth) > 0.1  # the average is what converges


def test_rounded_probabilities_are_scaled_to_sum_to_one() -> None:
    """A cache rounds each: the value at a match stays 0 and the gradient sums to 0."""
    student, _ = cases.logits("far", ROWS, 200)
    exact = kept(student, 8)
    rough = fastkd.SparseTargets(exact.ids, exact.logprobs + 0.01, "ghost", 2.0, rest=exact.rest + 0.01)
    assert fastkd.kd_loss(student, rough, soft_weight=1, hard_weight=0).abs() < 1e-5


@pytest.mark.parametrize("op", ["kd_loss", "kd_loss_per_row"])
def test_opcheck(op: str) -> None:
    student, teacher = cases.logits("far", ROWS, 70)
    scale = torch.full((ROWS,), 0.25)
    arguments: tuple[Any, ...] = call_for(
        student.requires_grad_(), kept(teacher, 5), cases.labels(ROWS, 70), scale, scale, cases.spec(fastkd.JSD(), 70)
    )
    if op == "kd_loss":
        arguments = (*arguments, [True, False, False])
    torch.library.opcheck(getattr(torch.ops.fastkd, op).default, arguments)


def test_compiles_as_one_graph() -> None:
    student, teacher = cases.logits("far", ROWS, 70)
    labels, targets = cases.labels(ROWS, 70), kept(teacher, 5)
    kd = fastkd.KDLoss()

    def step(z: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return kd(2 * z, fastkd.SparseTargets(ids, logprobs, "ghost", 2.0), labels)  # type: ignore[return-value]

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True)):
        z = student.clone().requires_grad_()
        function(z, targets.ids, targets.logprobs).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_moves_as_one() -> None:
    targets = kept(cases.logits("far", ROWS, 70)[1], 5)
    assert targets.to("meta").device.type == "meta"
    assert targets.to("meta").rest.device.type == "meta"  # type: ignore[union-attr]
    assert torch.equal(targets.detach().ids, targets.ids)
