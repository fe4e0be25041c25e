"""Losses on logits in main memory by one native call: the bits of the general way, and what that way is left."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import at_once
from fastkd.kernels.cpu import at_once as native
from tests import cases

SHAPE, VOCAB = (2, 5), 300
pytestmark = pytest.mark.skipif(not fastkd.backends()["cpu"].available, reason="no native library")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the library computed, of each call of it."""
    outcomes: list[bool] = []
    original = native.kd_loss
    monkeypatch.setattr(native, "kd_loss", lambda *a: (outcomes.append(original(*a)), outcomes[-1])[1])
    return outcomes


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A patch in which all calls go the general way."""
    with monkeypatch.context() as patch:
        yield patch


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = (x.view(*SHAPE, VOCAB).to(dtype) for x in cases.logits("far", 10, VOCAB))
    weights = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    return student, teacher, cases.labels(10, VOCAB, ignored=(1, 7)).view(SHAPE), weights


def outcome(kd: fastkd.KDLoss, student: Tensor, *others: Tensor | None, **more: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = kd(leaf, *others, **more)
    (grad,) = torch.autograd.grad((loss * 0.75).sum(), leaf)
    return loss.detach(), grad


SETTINGS = [
    {"reduction": reduction, "shift": shift, "mask_soft": mask_soft}
    for reduction, shift, mask_soft in itertools.product(
        ("mean", "sum", "batchmean", "none"), (False, True), (True, False)
    )
]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_bits_as_the_general_way(
    settings: dict[str, Any], weighted: bool, computed: list[bool], general: pytest.MonkeyPatch
) -> None:
    for divergence, dtype in itertools.product(cases.NAMES, (torch.float32, torch.bfloat16)):
        student, teacher, labels, weights = batch(dtype)
        more: dict[str, Any] = {"weights": weights if weighted else None}
        if settings["reduction"] == "mean":
            more["num_items"] = 7 if weighted else torch.tensor(3.5)
        kd = fastkd.KDLoss(1.5, divergence=divergence, **settings)
        computed.clear()
        loss, grad = outcome(kd, student, teacher, labels, **more)
        assert computed
        assert all(computed)
        with general.context() as patch:
            patch.setattr(at_once, "loss", lambda *_: None)
            expected, expected_grad = outcome(kd, student, teacher, labels, **more)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, expected_grad)
        assert grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [{}, {"vocab_size": 211}, {"reduction": "sum", "shift": True}], ids=str)
def test_in_place_too(more: dict[str, Any], dtype: torch.dtype, computed: list[bool]) -> None:
    student, teacher, labels, weights = batch(dtype)
    labels = labels.clamp(max=210)
    expected = outcome(fastkd.KDLoss(2.0, **more), student, teacher, labels, weights=weights)
    computed.clear()
    place = student.clone().requires_grad_()
    loss = fastkd.KDLoss(2.0, inplace=True, **more)(place, teacher, labels, weights=weights)
    assert computed == [True]
    (grad,) = torch.autograd.grad(loss * 0.75, place)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    assert grad.data_ptr() == place.data_ptr()


def test_in_place_what_is_read_beside_the_gradient_is_looked_at_closely(computed: list[bool]) -> None:
    """Rows of one matrix in turn: their memory interleaves, and does not overlap. Then the same memory twice."""
    student, teacher, labels, _ = batch()
    both = torch.stack((student.view(10, VOCAB), teacher.view(10, VOCAB)), 1)
    expected = outcome(fastkd.KDLoss(2.0), student.view(10, VOCAB), teacher.view(10, VOCAB), labels.view(10))
    computed.clear()
    kd, leaf = fastkd.KDLoss(2.0, inplace=True), both[:, 0].detach().requires_grad_()
    (grad,) = torch.autograd.grad(kd(leaf, both[:, 1], labels.view(10)) * 0.75, leaf)
    assert torch.equal(grad, expected[1])
    with pytest.raises(ValueError, match="over the teacher, which shares memory"):
        kd(student.requires_grad_(), student.detach(), labels)
    assert computed == []
    with torch.autograd.graph.save_on_cpu():
        kd(student, teacher, labels).backward()
    assert computed == []


@pytest.mark.parametrize("terms", [{"soft_weight": 0.0}, {"hard_weight": 0.0}, {"vocab_size": 211}], ids=str)
def test_terms_and_columns_that_do_not_count(
    terms: dict[str, Any], computed: list[bool], general: pytest.MonkeyPatch
) -> None:
    student, teacher, labels, _ = batch()
    labels = labels.clamp(max=210)
    kd = fastkd.KDLoss(2.0, **terms)
    given = [(teacher, labels), (None, labels) if "soft_weight" in terms else (teacher[..., :250], labels)]
    given = given if "hard_weight" not in terms else [(teacher, None), (teacher, labels)]
    given = (
        given if "hard_weight" in terms or "soft_weight" in terms else [(teacher, labels), (teacher[..., :250], labels)]
    )
    for others in given:
        found = outcome(kd, student, *others)
        assert computed.pop()
        with general.context() as patch:
            patch.setattr(at_once, "loss", lambda *_: None)
            expected = outcome(kd, student, *others)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_rows_that_lie_apart(computed: list[bool]) -> None:
    student, teacher, labels, _ = batch()
    wide = torch.randn(2, 5, 2 * VOCAB)
    wide[..., :VOCAB] = teacher
    kd = fastkd.KDLoss(2.0)
    for strided in (wide[..., :VOCAB], teacher.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(outcome(kd, student, strided, labels)[1], outcome(kd, student, teacher, labels)[1])
    assert computed == [True] * 4


WRONG = {
    "label": ({"labels": torch.full(SHAPE, VOCAB)}, "labels contains 300"),
    "weight": ({"weights": torch.full(SHAPE, -1.0)}, "weights must be finite and >= 0, got -1"),
    "nan weight": ({"weights": torch.full(SHAPE, torch.nan)}, "weights must be finite"),
    "num_items": ({"num_items": -1.0}, "num_items must be a finite number"),
    "no columns": ({"teacher": torch.tensor(1.0)}, r"teacher logits must have shape \[\.\.\., vocab\]"),
    "shape": ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has leading shape"),
    "type": ({"teacher": [1.0]}, "teacher must be a torch.Tensor"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_wrong_has_the_error_of_the_general_way(wrong: dict[str, Any], message: str, reduction: str) -> None:
    student, teacher, labels, weights = batch()
    given: dict[str, Any] = {"teacher": teacher, "labels": labels, "weights": weights, **wrong}
    if "num_items" in wrong and reduction == "none":
        message = "num_items replaces"
    leaf = student.requires_grad_()
    with pytest.raises((TypeError, ValueError), match=message):
        fastkd.KDLoss(2.0, reduction=reduction)(leaf, **given)  # type: ignore[arg-type]


def test_a_student_without_columns_has_the_error_of_the_general_way() -> None:
    with pytest.raises(ValueError, match=r"student logits must have shape .*, got \(\)"):
        fastkd.KDLoss(2.0, hard_weight=0.0)(torch.tensor(1.0), torch.tensor(1.0))


def test_a_masked_label_may_be_any(computed: list[bool]) -> None:
    student, teacher, labels, _ = batch()
    kd = fastkd.KDLoss(2.0, ignore_index=10**6)
    labels[labels == -100] = 10**6
    assert outcome(kd, student, teacher, labels)[0].isfinite()
    assert computed == [True]


def test_what_watches_a_call_sees_the_operators(computed: list[bool]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    student, teacher, labels, _ = batch()
    kd = fastkd.KDLoss(2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kd(student, teacher, labels)
    assert "fastkd::kd_loss" in {event.name for event in profile.events()}
    with FlopCounterMode(display=False):
        kd(student, teacher, labels)
    with fastkd.use_backend("reference"):
        kd(student, teacher, labels)
    torch.vmap(lambda z: kd(z, teacher, labels))(torch.stack((student, student)))
    assert computed == []


def test_gradients_that_are_refused_or_warned_of() -> None:
    student, teacher, labels, weights = batch()
    leaf = student.clone().requires_grad_()
    with pytest.raises(ValueError, match="weights requires a gradient"):
        fastkd.kd_loss(leaf, teacher, labels, weights=weights.requires_grad_())
    loss = fastkd.kd_loss(leaf, teacher, labels)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.filterwarnings("ignore:fastkd. the teacher requires a gradient")
def test_a_student_as_its_own_teacher_is_left_to_the_general_way(computed: list[bool]) -> None:
    student, _, labels, _ = batch()
    leaf = student.requires_grad_()
    fastkd.kd_loss(leaf, leaf, labels)  # which warns, once in a process
    assert computed == []


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_may_come_back_with_other_strides(reduction: Any) -> None:
    student, teacher, labels, _ = batch()
    wide = [torch.cat((x, x.flip(-1)), -1)[..., :VOCAB] for x in (student, teacher)]
    assert not wide[0].is_contiguous()
    kd, grads = fastkd.KDLoss(2.0, reduction=reduction), []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        leaf = wide[0].detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = kd(leaf, wide[1], labels).sum()
        grads += torch.autograd.grad(loss, leaf)
    assert torch.equal(grads[0], grads[1])


def test_a_second_backward_is_right_and_no_gradient_is_shared(computed: list[bool]) -> None:
    student, teacher, labels, _ = batch()
    for reduction in ("mean", "none"):
        leaf = student.clone().requires_grad_()
        loss = fastkd.KDLoss(2.0, reduction=reduction)(leaf, teacher, labels).sum()  # type: ignore[arg-type]
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(2 * loss, leaf)
        torch.testing.assert_close(second, 2 * kept)
    assert all(computed)


def test_settings_that_change_are_seen(computed: list[bool]) -> None:
    student, teacher, labels, _ = batch()
    kd = fastkd.KDLoss(2.0)
    kd(student, teacher, labels)
    kd.temperature = 3.0
    assert torch.equal(kd(student, teacher, labels), fastkd.KDLoss(3.0)(student, teacher, labels))
    kd.temperature = -1.0
    with pytest.raises(ValueError, match="temperature"):
        kd(student, teacher, labels)
    assert computed == [True] * 3


def test_a_loss_is_copied_and_pickled_without_addresses() -> None:
    student, teacher, labels, _ = batch()
    kd = fastkd.KDLoss(2.0)
    expected = kd(student, teacher, labels)
    assert kd.templates
    for other in (copy.deepcopy(kd), pickle.loads(pickle.dumps(kd))):
        assert not other.templates
        assert torch.equal(other(student, teacher, labels), expected)


def test_forms_are_forgotten_before_they_are_many() -> None:
    kd = fastkd.KDLoss(2.0)
    for rows in range(1, 400):
        kd(torch.zeros(rows, 3), torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.int64))
    assert len(kd.templates) <= 256
