"""A teacher of which each row keeps K tokens: the numbers on every backend, what the kinds mean, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import _native, chunks, reference, sparse
from fastkd.call import call_for
from fastkd.divergences import TABLE, Divergence
from fastkd.plan import Plan, plan_for
from fastkd.sources import Source
from fastkd.sparse import sparse_rows
from tests import cases, compare

ROWS, VOCAB = 4, 5003  # odd, several blocks and a tail
TEMPERED = tuple(divergence for divergence in cases.DIVERGENCES if divergence.tempered)


def kept(
    teacher: Tensor, entries: int, kind: str = "ghost", temperature: float = 2.0, shuffled: bool = False
) -> fastkd.SparseTargets:
    """The `entries` likeliest tokens of each row, with the mass of all others where the kind knows it."""
    logprobs = torch.log_softmax(teacher.double() / temperature, -1)
    top, ids = logprobs.topk(entries)
    if shuffled:
        order = torch.randperm(entries, generator=torch.Generator().manual_seed(2))
        top, ids = top[..., order], ids[..., order]
    rest = torch.logsumexp(logprobs.scatter(-1, ids, -math.inf), -1)
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    return fastkd.SparseTargets(ids, top.to(dtype), kind, temperature, rest=rest.to(dtype) if kind == "ghost" else None)


def judge(
    compute: Callable[..., tuple[Tensor, Tensor]],
    student: Tensor,
    targets: fastkd.SparseTargets,
    divergence: Divergence,
    temperature: float = 2.0,
    hard: bool = True,
) -> None:
    """Hold `compute`, which is `Backend.kd_rows` of some backend, to the numerics contract."""
    rows, vocab = student.shape
    labels = cases.labels(rows, vocab)
    labels[0] = targets.ids[0, 0]  # a label among the tokens that are kept
    spec = cases.spec(divergence, vocab, temperature)
    outcomes = []
    for backend, dtype in (
        (reference.kd_rows, torch.float64),
        (reference.kd_rows, torch.float32),
        (compute, student.dtype),
    ):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.full((rows, vocab), torch.nan, dtype=dtype)
        scale = torch.full((rows,), 1 / rows, dtype=wide)
        teacher = sparse_rows(targets, None, vocab, wide)
        values = backend(
            student.to(dtype), teacher, labels if hard else None, scale, scale if hard else None, spec, grad
        )
        outcomes.append((*values, grad))
    truth, eager, ours = outcomes
    compare.assert_value(ours[0], truth[0], eager[0], "soft loss")
    compare.assert_value(ours[1], truth[1], eager[1], "hard loss")
    compare.assert_gradient(ours[2], eager[2].to(student.dtype), truth[2])


@pytest.mark.parametrize(
    ("dtype", "entries"),
    [*((torch.float32, entries) for entries in (1, 12, 64)), (torch.bfloat16, 12), (torch.float16, 12)],
    ids=str,
)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", TEMPERED, ids=str)
def test_contract(divergence: Divergence, family: str, dtype: torch.dtype, entries: int) -> None:
    if family == "offset" and dtype != torch.float32:
        pytest.skip("an offset of 1e4 leaves nothing of the logits in 8 or 11 bits")
    if family == "peaked" and dtype == torch.float16 and divergence == fastkd.AlphaBeta(0.5, -0.5):
        pytest.skip("the gradient, a power of p/q, is beyond what float16 can hold")
    student, teacher = cases.logits(family, ROWS, VOCAB, dtype)
    judge(_native.kd_rows, student, kept(teacher, entries), divergence)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("family", ["near_equal", "peaked", "offset"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_temperatures(divergence: str, family: str, temperature: float) -> None:
    student, teacher = cases.logits(family, ROWS, VOCAB)
    targets = kept(teacher, 12, temperature=temperature)
    judge(_native.kd_rows, student, targets, TABLE[divergence](), temperature)
    judge(_native.kd_rows, student, targets, TABLE[divergence](), temperature, hard=False)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("entries", [1, 16, 17])
def test_sizes(vocab: int, entries: int) -> None:
    student, teacher = cases.logits("far", ROWS, vocab)
    judge(_native.kd_rows, student, kept(teacher, min(entries, vocab), shuffled=True), fastkd.ForwardKL())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_nothing_cancels_where_the_tokens_hold_nearly_everything(divergence: str) -> None:
    """Both rests hold 1e-13: one less the others would be 0, and its gradient lost."""
    student, teacher = cases.logits("far", ROWS, VOCAB)
    ids = torch.arange(7, 7 + 8).expand(ROWS, 8)
    student, teacher = (x.scatter_add(1, ids, torch.full((ROWS, 8), 80.0)) for x in (student, teacher))
    logprobs = torch.log_softmax(teacher.double() / 2, -1)
    rest = torch.logsumexp(logprobs.scatter(-1, ids, -math.inf), -1)
    assert (rest < math.log(1e-11)).all()
    targets = fastkd.SparseTargets(ids, logprobs.gather(-1, ids).float(), "ghost", 2.0, rest=rest.float())
    spec, scale = cases.spec(TABLE[divergence](), VOCAB), torch.ones(ROWS)
    gradients = []
    for backend, dtype in ((_native, torch.float32), (reference, torch.float64)):
        grad = torch.empty(ROWS, VOCAB, dtype=dtype)
        teacher_rows = sparse_rows(targets, None, VOCAB, dtype)
        backend.kd_rows(student.to(dtype), teacher_rows, None, scale.to(dtype), None, spec, grad)  # type: ignore[attr-defined]
        gradients.append(grad.scatter(1, ids, 0.0))
    ours, truth = gradients
    assert truth.abs().max() > 0
    assert compare.relative_error(ours, truth) < 1e-5


def test_the_whole_vocabulary_is_dense_distillation() -> None:
    student, teacher = cases.logits("far", ROWS, 300)
    labels = cases.labels(ROWS, 300)
    for kind in ("ghost", "renormalize", "sampled"):
        entropy = torch.distributions.Categorical(logits=teacher / 2).entropy() if kind == "sampled" else None
        everything = kept(teacher, 300)
        targets = fastkd.SparseTargets(everything.ids, everything.logprobs, kind, 2.0, entropy=entropy)
        divergences = TEMPERED if kind == "ghost" else TEMPERED[:1]
        for divergence in divergences:
            z = student.clone().requires_grad_()
            loss = fastkd.kd_loss(z, targets, labels, divergence=divergence)
            (ours,) = torch.autograd.grad(loss, z)
            dense = fastkd.kd_loss(z, teacher, labels, divergence=divergence)
            (truth,) = torch.autograd.grad(dense, z)
            assert loss.item() == pytest.approx(dense.item(), rel=2e-5), divergence
            assert compare.relative_error(ours, truth) < 2e-5, divergence


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

    monkeypatch.setattr(chunks, "plan_for", recorded)
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


@pytest.mark.parametrize("op", ["kd_loss", "kd_rows"])
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


IDS, LOGPROBS = torch.tensor([[1, 2], [0, 3]]), torch.full((2, 2), -2.0)
STUDENT = torch.zeros(2, 5)


def targets_of(**changes: Any) -> fastkd.SparseTargets:
    return fastkd.SparseTargets(**({"ids": IDS, "logprobs": LOGPROBS, "kind": "ghost", "temperature": 2.0} | changes))


def soft_loss(targets: Any, **settings: Any) -> Any:
    return fastkd.kd_loss(STUDENT, targets, **({"soft_weight": 1.0, "hard_weight": 0.0} | settings))


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ids are floats": (lambda: targets_of(ids=IDS.float()), TypeError, "ids must be integers"),
    "logprobs are integers": (lambda: targets_of(logprobs=IDS), TypeError, "logprobs must be float32"),
    "kind": (lambda: targets_of(kind="top"), ValueError, "kind must be one of .*ghost.* got 'top'"),
    "temperature": (lambda: targets_of(temperature=0), ValueError, "temperature must be a finite number > 0, got 0"),
    "shapes": (lambda: targets_of(ids=IDS[:, :1]), ValueError, r"same shape .* got \(2, 1\) and \(2, 2\)"),
    "no entries": (lambda: targets_of(ids=IDS[:, :0], logprobs=LOGPROBS[:, :0]), ValueError, "K > 0"),
    "rest of sampled": (
        lambda: targets_of(kind="sampled", rest=torch.zeros(2)),
        ValueError,
        "rest belongs to kind='ghost', but kind is 'sampled'",
    ),
    "entropy of ghost": (lambda: targets_of(entropy=torch.zeros(2)), ValueError, "entropy belongs to kind='sampled'"),
    "shape of rest": (lambda: targets_of(rest=torch.zeros(3)), ValueError, r"rest must have the shape \(2,\)"),
    "device": (lambda: targets_of(logprobs=LOGPROBS.to("meta")), ValueError, "logprobs is on meta, but ids is on cpu"),
    "another temperature": (
        lambda: soft_loss(targets_of(), temperature=3.0),
        ValueError,
        "made at temperature 2.0, but this loss takes the teacher at 3.0",
    ),
    "another teacher temperature": (
        lambda: soft_loss(targets_of(), teacher_temperature=1.0),
        ValueError,
        "takes the teacher at 1.0",
    ),
    "reverse KL of a sample": (
        lambda: soft_loss(targets_of(kind="sampled"), divergence="reverse_kl"),
        ValueError,
        r"ReverseKL\(\) needs",
    ),
    "raw logits": (lambda: soft_loss(targets_of(), divergence="mse"), ValueError, "compares raw logits"),
    "tokens": (lambda: soft_loss(targets_of(ids=IDS[:1], logprobs=LOGPROBS[:1])), ValueError, r"leading shape \(1,\)"),
    "id beyond": (
        lambda: soft_loss(targets_of(ids=IDS + 2)),
        ValueError,
        r"ids contains 5 outside \[0, 5\) \(token 1 of 2\)",
    ),
    "negative id": (lambda: soft_loss(targets_of(ids=IDS - 1)), ValueError, r"ids contains -1 outside"),
    "twice": (
        lambda: soft_loss(targets_of(ids=torch.tensor([[1, 2], [3, 3]]))),
        ValueError,
        r"ids contains 3 twice \(token 1 of 2\)",
    ),
    "too much": (lambda: soft_loss(targets_of(logprobs=LOGPROBS + 2)), ValueError, "sum to 2, not to at most 1"),
    "too little": (
        lambda: soft_loss(targets_of(rest=torch.full((2,), -2.0))),
        ValueError,
        "sum to 0.406, not to 1",
    ),
    "as the student": (
        lambda: fastkd.kd_loss(targets_of(), STUDENT, soft_weight=1, hard_weight=0),
        TypeError,
        "student must be a torch.Tensor of logits or a fastkd.Projection, got SparseTargets",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    attempt, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attempt()


@pytest.mark.parametrize("kind", ["ghost", "renormalize", "sampled"])
def test_a_nan_of_the_teacher_is_not_hidden(kind: str, backend: str) -> None:
    logprobs = LOGPROBS.clone()
    logprobs[1, 0] = math.nan
    z = STUDENT.clone().requires_grad_()
    rows = fastkd.kd_loss(z, targets_of(kind=kind, logprobs=logprobs), soft_weight=1, hard_weight=0, reduction="none")
    assert rows.isnan().tolist() == [False, True]
    (grad,) = torch.autograd.grad(rows.sum(), z)
    assert grad[1].isnan().any()
    assert grad[0].isfinite().all()
    assert grad[0].abs().max() > 0


def test_rows_that_do_not_count_may_hold_anything() -> None:
    ids = torch.tensor([[1, 2], [77, 77]])
    loss = fastkd.kd_loss(STUDENT, targets_of(ids=ids), torch.tensor([1, -100]))
    assert loss.isfinite()


def test_unchecked_ids_give_nan_and_no_stray_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking at the ids would wait for the device."""
    monkeypatch.setattr(sparse, "_checked", lambda ids: False)
    student, teacher = cases.logits("far", 3, 300)
    good = kept(teacher, 5, shuffled=True)
    ids = good.ids.clone()
    ids[1, 2] = 10**9
    z = student.clone().requires_grad_()
    rows = fastkd.kd_loss(
        z, fastkd.SparseTargets(ids, good.logprobs, "ghost", 2.0), soft_weight=1, hard_weight=0, reduction="none"
    )
    expected = fastkd.kd_loss(student, good, soft_weight=1, hard_weight=0, reduction="none")
    assert rows[1].isnan()
    assert torch.allclose(rows[[0, 2]], expected[[0, 2]], rtol=1e-5)
    (grad,) = torch.autograd.grad(rows.sum(), z)
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()
