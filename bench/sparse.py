"""fastkd and its rivals beside a teacher of which each row keeps K tokens, ready to be run, checked and timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from bench import check, rivals
from bench.cases import CROSS_ENTROPY, FRESH, Case
from bench.check import Truth
from bench.contenders import TEMPERATURE, Contender
from fastkd import SparseTargets

__all__ = ["sparse_contenders"]


def _targets(teacher: Tensor, entries: int) -> SparseTargets:
    """The likeliest tokens of each row as a cache hands them out: ids ascending, the mass of the others beside them."""
    rows = [_kept(teacher[slab].double(), entries) for slab in check.slabs(len(teacher))]
    ids, logprobs, rest = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return SparseTargets(ids, logprobs, "ghost", TEMPERATURE, rest=rest)


def _kept(teacher: Tensor, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(teacher / TEMPERATURE, -1)
    ids = logprobs.topk(entries).indices.sort(-1).values
    rest = torch.logsumexp(logprobs.scatter(-1, ids, -torch.inf), -1)
    return ids, logprobs.gather(-1, ids).float(), rest.float()


def _truth(student: Tensor, targets: SparseTargets, labels: Tensor) -> Truth:
    """As `check.kd_truth`."""
    loss, gradient = 0.0, torch.empty(student.shape)
    for slab in check.slabs(len(student)):
        logits = student.detach()[slab].double().requires_grad_()
        part = SparseTargets(
            targets.ids[slab],
            targets.logprobs[slab].double(),
            targets.kind,
            TEMPERATURE,
            rest=targets.rest[slab].double() if targets.rest is not None else None,
        )
        with fastkd.use_backend("reference"):
            value = fastkd.kd_loss(logits, part, labels[slab], temperature=TEMPERATURE, num_items=len(student))
        assert isinstance(value, Tensor)
        (gradient[slab],) = torch.autograd.grad(value, logits)
        loss += value.item()
    return Truth(loss, gradient)


def sparse_contenders(case: Case) -> list[Contender]:
    """All of one race: fastkd, what it may cost at most, and the recipes. Cross-entropy alone has another gradient."""
    assert case.entries is not None
    batch = check.Batch.random(case.rows, case.vocab, case.dtype)
    student, labels = batch.student, batch.labels
    targets = _targets(batch.teacher, case.entries)
    truth = _truth(student, targets, labels)
    batch.teacher = batch.teacher[:0]
    kd, hard = fastkd.KDLoss(TEMPERATURE), fastkd.KDLoss(soft_weight=0, hard_weight=1)
    low = case.dtype != torch.float32

    def prepare() -> None:
        student.grad = None

    def contender(name: str, loss: Callable[[], Tensor], judged: bool = True) -> Contender:
        def run() -> Tensor:
            value = loss()
            value.backward()
            return value

        def verify(value: object) -> float | None:
            return check.verified(name, value, truth.loss, [(student.grad, truth.gradient)], low) if judged else None

        return Contender(name, run, prepare, verify)

    def recipe(name: str) -> Contender:
        loss = rivals.ghost_kd_loss(TEMPERATURE)
        if name == "compile":
            loss = rivals.compiled(loss)
        return contender(name, lambda: loss(student, targets.ids, targets.logprobs, targets.rest, labels))

    return [
        contender(FRESH, lambda: kd(student, targets, labels)),
        *(recipe(name) for name in (("eager", "compile") if rivals.can_compile() else ("eager",))),
        # Last, so that its turn comes right before fastkd's and both find memory in the same state.
        contender(CROSS_ENTROPY, lambda: hard(student, None, labels), judged=False),
    ]
