"""Properties that hold for any shape, mask, offset and setting (hypothesis)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastkd
from tests import cases, compare

COMMON = settings(max_examples=60, deadline=None, derandomize=True)

#: What rounding leaves where a gradient is exactly 0, as in a vocabulary of one token: fp32 of numbers up to 1.
ROUNDING = 1e-7

divergences = st.sampled_from(cases.DIVERGENCES)
vocabularies = st.one_of(st.integers(1, 80), st.sampled_from([1023, 1024, 1025, 1500]))
seeds = st.integers(0, 1000)


def gradient(kd: fastkd.KDLoss, student: Tensor, *arguments: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = kd(leaf, *arguments, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@COMMON
@given(divergences, vocabularies, st.integers(1, 7), st.floats(0.3, 8), st.data())
def test_native_agrees_with_the_reference(
    divergence: fastkd.divergences.Divergence, vocab: int, rows: int, temperature: float, data: st.DataObject
) -> None:
    student, teacher = cases.logits("far", rows, vocab, seed=data.draw(seeds))
    ignored = data.draw(st.sets(st.integers(0, rows - 1)))
    labels = cases.labels(rows, vocab, ignored=tuple(ignored))
    kd = fastkd.KDLoss(
        temperature,
        divergence=divergence,
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"])),
        soft_weight=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        hard_weight=data.draw(st.sampled_from([0.3, 1.0])),
        mask_soft=data.draw(st.booleans()),
    )
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(data.draw(seeds)))
    with fastkd.use_backend("reference"):
        truth = gradient(kd, student.double(), teacher.double(), labels, weights=weights.double())
        eager = gradient(kd, student, teacher, labels, weights=weights)
    ours = gradient(kd, student, teacher, labels, weights=weights)
    compare.assert_value(ours[0], truth[0], eager[0])
    compare.assert_gradient(ours[1], eager[1], truth[1], certain_rows=max(temperature, 1.0))


@COMMON
@given(divergences, vocabularies, seeds, st.sampled_from([-1e4, -300.0, 37.5, 1e4]))
def test_a_common_offset_changes_nothing(
    divergence: fastkd.divergences.Divergence, vocab: int, seed: int, offset: float
) -> None:
    """Logits on a grid that survives the offset exactly, so that only the arithmetic could differ."""
    if divergence.name == "mse":
        return  # measures the offset itself
    student, teacher = (torch.round(x * 64) / 64 for x in cases.logits("far", 3, vocab, seed=seed))
    labels = cases.labels(3, vocab)
    kd = fastkd.KDLoss(2.0, divergence=divergence)
    plain = gradient(kd, student, teacher, labels)
    moved = gradient(kd, student + offset, teacher - offset, labels)
    assert torch.equal(student + offset - offset, student)
    compare.assert_value(moved[0], plain[0].double())
    assert (moved[1] - plain[1]).norm() <= 5e-6 * plain[1].norm() + ROUNDING


@COMMON
@given(divergences, vocabularies, seeds, st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_masked_tokens_do_not_exist(
    divergence: fastkd.divergences.Divergence, vocab: int, seed: int, masked: set[int]
) -> None:
    """The loss of a batch with masked tokens is that of the batch without them; their gradient is exactly 0."""
    student, teacher = cases.logits("far", 6, vocab, seed=seed)
    labels = cases.labels(6, vocab, ignored=tuple(masked))
    kept = labels != -100
    kd = fastkd.KDLoss(2.0, divergence=divergence)
    loss, grad = gradient(kd, student, teacher, labels)
    small_loss, small_grad = gradient(kd, student[kept], teacher[kept], labels[kept])
    torch.testing.assert_close(loss, small_loss, rtol=1e-6, atol=1e-7)
    assert torch.equal(grad[kept], small_grad)
    assert (grad[~kept] == 0).all()


@COMMON
@given(divergences, vocabularies, seeds)
def test_gradient_sums_to_zero(divergence: fastkd.divergences.Divergence, vocab: int, seed: int) -> None:
    """Softmax ignores a common offset, so every row's gradient is orthogonal to it."""
    if divergence.name == "mse":
        return
    student, teacher = cases.logits("far", 3, vocab, seed=seed)
    _, grad = gradient(fastkd.KDLoss(2.0, divergence=divergence), student, teacher, cases.labels(3, vocab))
    assert (grad.double().sum(-1).abs() <= 1e-5 * grad.double().abs().sum(-1) + ROUNDING).all()


@COMMON
@given(vocabularies, seeds, st.permutations(range(5)))
def test_rows_are_independent(vocab: int, seed: int, order: list[int]) -> None:
    student, teacher = cases.logits("far", 5, vocab, seed=seed)
    labels = cases.labels(5, vocab)
    kd = fastkd.KDLoss(1.5, divergence="jsd", reduction="none")
    loss, grad = gradient(kd, student, teacher, labels)
    moved_loss, moved_grad = gradient(kd, student[order], teacher[order], labels[order])
    assert torch.equal(moved_loss, loss[order])
    assert torch.equal(moved_grad, grad[order])
