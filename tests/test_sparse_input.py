"""Sparse targets that cannot be meant, and values that are nobody's fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastkd
from fastkd import arguments
from fastkd.backend import select
from fastkd.sparse import sparse_rows
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


def in_order(kind: str, with_rest: bool, with_entropy: bool) -> fastkd.SparseTargets:
    """Six rows of 40 tokens, ids ascending, one with an entry that is not there and one without any."""
    teacher = torch.randn(6, 500, generator=torch.Generator().manual_seed(3)) * 2
    logprobs = torch.log_softmax(teacher, -1)
    ids = logprobs.topk(40).indices.sort(-1).values
    rest = torch.logsumexp(logprobs.scatter(-1, ids, -math.inf), -1)
    known = logprobs.gather(-1, ids)
    known[1, -1] = known[2] = -math.inf
    rest[2] = 0
    return fastkd.SparseTargets(
        ids, known, kind, 2.0, rest=rest if with_rest else None, entropy=torch.rand(6) if with_entropy else None
    )


needs_cpu = pytest.mark.skipif(not fastkd.backends()["cpu"].available, reason="no native library")


@needs_cpu
@pytest.mark.parametrize(
    ("kind", "with_rest", "with_entropy"),
    [("ghost", True, False), ("ghost", False, False), ("renormalize", False, False), ("sampled", False, True)],
)
def test_native_rows_are_those_of_pytorch(kind: str, with_rest: bool, with_entropy: bool) -> None:
    targets, native = in_order(kind, with_rest, with_entropy), select(torch.zeros(1))
    found = native.sparse_rows(targets, None, 500, 0.05, 1e-6)  # type: ignore[attr-defined]
    wanted = sparse_rows(targets, None, 500, torch.float64)
    for ours, theirs in zip(found[:4], wanted[:4], strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=2e-6, atol=2e-7)


@needs_cpu
@pytest.mark.parametrize(
    "spoil",
    [
        lambda ids, logprobs: ids.copy_(ids.flip(-1)),
        lambda ids, logprobs: ids[3, 5:7].fill_(int(ids[3, 5])),
        lambda ids, logprobs: ids[3, -1:].fill_(500),
        lambda ids, logprobs: ids[3, :1].fill_(-1),
        lambda ids, logprobs: logprobs[3].add_(0.1),
        lambda ids, logprobs: logprobs[3].sub_(9),
        lambda ids, logprobs: logprobs[3, :1].fill_(math.inf),
        lambda ids, logprobs: logprobs[3, :1].fill_(-math.inf),
    ],
    ids=["descending", "twice", "beyond", "negative", "too much", "too little", "infinite", "absent first"],
)
def test_rows_in_disorder_are_left_to_pytorch(spoil: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    targets, native = in_order("ghost", True, False), select(torch.zeros(1))
    live = torch.ones(6)
    spoil(targets.ids, targets.logprobs)
    assert native.sparse_rows(targets, live, 500, 0.05, 1e-6) is None  # type: ignore[attr-defined]
    live.zero_()  # what does not count may hold anything
    assert native.sparse_rows(targets, live, 500, 0.05, 1e-6) is not None  # type: ignore[attr-defined]
