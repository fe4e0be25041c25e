"""Losses from hidden states: the call with `Projection` sources, as a user makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.backend import warn_once
from fastkd.call import call_for
from fastkd.sources import Source
from tests import cases, compare
from tests.projections import (
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
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="the teacher requires a gradient"):
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


def test_autocast_rounds_nothing_in_fp32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CPU_PRODUCTS", "fp32")
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


@pytest.mark.parametrize("op", ["kd_loss", "kd_loss_per_row"])
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
