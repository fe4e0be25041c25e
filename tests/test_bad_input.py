"""What cannot be meant raises before any work, quotes the value, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastkd

V = 10
STUDENT, TEACHER = torch.randn(2, 3, V), torch.randn(2, 3, V)
LABELS = torch.zeros(2, 3, dtype=torch.long)

SETTINGS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "temperature 0": ({"temperature": 0}, ValueError, "temperature.*0"),
    "temperature negative": ({"temperature": -2.0}, ValueError, r"-2\.0"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "nan"),
    "temperature text": ({"temperature": "2"}, ValueError, "'2'"),
    "teacher temperature": ({"teacher_temperature": -1}, ValueError, "teacher_temperature.*-1"),
    "soft weight": ({"soft_weight": -0.1}, ValueError, r"soft_weight.*-0\.1"),
    "hard weight": ({"hard_weight": float("inf")}, ValueError, "hard_weight.*inf"),
    "both weights 0": ({"soft_weight": 0, "hard_weight": 0}, ValueError, "both 0"),
    "alpha alone": ({"alpha": 0.3}, ValueError, r"alpha=0\.3 alone is ambiguous.*alpha_on"),
    "alpha_on alone": ({"alpha_on": "soft"}, ValueError, "without alpha"),
    "alpha_on unknown": ({"alpha": 0.3, "alpha_on": "both"}, ValueError, "both"),
    "alpha range": ({"alpha": 1.2, "alpha_on": "soft"}, ValueError, r"\[0, 1\].*1\.2"),
    "alpha and weights": ({"alpha": 0.2, "alpha_on": "soft", "soft_weight": 0.7}, ValueError, "not both"),
    "divergence name": ({"divergence": "kl"}, ValueError, "'kl'.*forward_kl"),
    "divergence type": ({"divergence": 3}, TypeError, "got int"),
    "reduction": ({"reduction": "avg"}, ValueError, "'avg'"),
    "in place with none": ({"inplace": True, "reduction": "none"}, ValueError, "inplace"),
    "memory budget": ({"memory_budget": -5}, ValueError, "-5"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str) -> None:
    settings, error, message = SETTINGS[case]
    with pytest.raises(error, match=message):
        fastkd.KDLoss(**settings)  # type: ignore[arg-type]


CALLS: dict[str, tuple[Callable[[fastkd.KDLoss], object], type[Exception], str]] = {
    "no labels": (lambda kd: kd(STUDENT, TEACHER), ValueError, r"labels are needed for hard_weight=0\.5"),
    "no teacher": (lambda kd: kd(STUDENT, None, LABELS), ValueError, r"teacher is needed for soft_weight=0\.5"),
    "not a tensor": (
        lambda kd: kd([1.0], TEACHER, LABELS),
        TypeError,
        "student must be a torch.Tensor of logits or a fastkd.Projection, got list",
    ),
    "integer logits": (lambda kd: kd(STUDENT.long(), TEACHER, LABELS), TypeError, "int64"),
    "scalar logits": (lambda kd: kd(STUDENT[0, 0, 0], TEACHER, LABELS), ValueError, "vocab"),
    "leading shape": (lambda kd: kd(STUDENT, TEACHER[:1], LABELS), ValueError, r"\(1, 3\).*\(2, 3, 10\)"),
    "vocabulary": (lambda kd: kd(STUDENT, TEACHER[..., :8], LABELS), ValueError, "10 .*8.*vocab_size"),
    "labels shape": (lambda kd: kd(STUDENT, TEACHER, LABELS[:, :2]), ValueError, r"labels.*\(2, 2\)"),
    "labels dtype": (lambda kd: kd(STUDENT, TEACHER, LABELS.float()), TypeError, "labels must be integers.*float32"),
    "label too large": (lambda kd: kd(STUDENT, TEACHER, LABELS + V), ValueError, r"labels contains 10 .*\[0, 10\)"),
    "label negative": (lambda kd: kd(STUDENT, TEACHER, LABELS - 3), ValueError, "labels contains -3"),
    "weights shape": (
        lambda kd: kd(STUDENT, TEACHER, LABELS, weights=torch.ones(2)),
        ValueError,
        r"weights.*\(2,\)",
    ),
    "num_items negative": (lambda kd: kd(STUDENT, TEACHER, LABELS, num_items=-1), ValueError, "num_items.*-1"),
    "num_items shape": (
        lambda kd: kd(STUDENT, TEACHER, LABELS, num_items=torch.ones(2)),
        ValueError,
        r"num_items.*\(2,\)",
    ),
    "device": (lambda kd: kd(STUDENT, TEACHER.to("meta"), LABELS), ValueError, "teacher is on meta"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str, backend: str) -> None:
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call(fastkd.KDLoss(2.0))


def test_vocab_size(backend: str) -> None:
    for vocab_size, error in ((0, ValueError), (V + 1, ValueError), (3.5, TypeError)):
        with pytest.raises(error, match="vocab_size"):
            fastkd.KDLoss(vocab_size=vocab_size)(STUDENT, TEACHER, LABELS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels contains 9 .*\[0, 8\)"):
        fastkd.KDLoss(vocab_size=8)(STUDENT, TEACHER, LABELS + 9)


def test_num_items_needs_the_mean(backend: str) -> None:
    with pytest.raises(ValueError, match=r"num_items.*'sum'"):
        fastkd.KDLoss(reduction="sum")(STUDENT, TEACHER, LABELS, num_items=3)


def test_shift_and_batchmean_need_dimensions(backend: str) -> None:
    row = torch.randn(V)
    with pytest.raises(ValueError, match="shift"):
        fastkd.KDLoss(shift=True)(row, row, torch.tensor(1))
    with pytest.raises(ValueError, match="batchmean"):
        fastkd.KDLoss(reduction="batchmean")(row, row, torch.tensor(1))


def test_nothing_is_overwritten_when_a_call_fails(backend: str) -> None:
    student = STUDENT.clone().requires_grad_()
    for labels in (LABELS + V, LABELS[:, :2]):
        with pytest.raises(ValueError, match="labels"):
            fastkd.KDLoss(inplace=True)(student, TEACHER, labels)
    assert torch.equal(student, STUDENT)
    assert student._version == 0


def test_in_place_needs_rows_of_its_own(backend: str) -> None:
    row = torch.randn(1, 1, V, requires_grad=True)
    with pytest.raises(ValueError, match="overlap"):
        fastkd.KDLoss(inplace=True)((row * 1).expand(2, 3, V), TEACHER, LABELS)
    strided = torch.randn(2, 3, 2 * V, requires_grad=True)
    with pytest.raises(ValueError, match="strides"):
        fastkd.KDLoss(inplace=True)((strided * 1)[..., ::2], TEACHER, LABELS)


def test_statistics_refuse_too() -> None:
    for function in (fastkd.log_softmax, fastkd.row_statistics):
        with pytest.raises(TypeError, match="int64"):
            function(LABELS)
        with pytest.raises(ValueError, match=r"temperature.*0"):
            function(STUDENT, temperature=0)
    with pytest.raises(ValueError, match="labels"):
        fastkd.row_statistics(STUDENT, LABELS[:1])
