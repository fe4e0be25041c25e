"""Sparse targets that cannot be meant, and values that are nobody's fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastkd
from fastkd import arguments
from tests import cases
from tests.sparse_targets import kept

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


def test_rows_that_do_not_count_may_hold_anything(backend: str) -> None:
    ids = torch.tensor([[1, 2], [-5, 77]])
    loss = fastkd.kd_loss(STUDENT, targets_of(ids=ids), torch.tensor([1, -100]))
    assert loss.isfinite()


def test_unchecked_ids_give_nan_and_no_stray_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking at the ids would wait for the device."""
    monkeypatch.setattr(arguments, "is_checked", lambda values: False)
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
