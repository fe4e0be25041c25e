"""Does a teacher of which K tokens are known cost no more than cross-entropy alone?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from bench.harness import check
from bench.harness.check import Truth
from bench.harness.contender import FRESH, IN_PLACE, TEMPERATURE, Contender
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals import recipes
from fastkd import SparseTargets

_CROSS_ENTROPY, _CROSS_ENTROPY_IN_PLACE = "cross-entropy", "cross-entropy in place"
SPARSE = Question(
    "sparse",
    Section.LOGITS,
    "Forward KL (T = 2) to a teacher's K likeliest tokens and its mass of the others, and cross-entropy, forward and "
    "backward",
    "Least traffic: read the student, write the gradient: 2·N·V·b bytes.",
    passes=2,
    floor=_CROSS_ENTROPY,
    both_allocators=True,
    gated=True,
)
_BARS = (
    within(FRESH, _CROSS_ENTROPY, 1.15),
    within(IN_PLACE, _CROSS_ENTROPY_IN_PLACE, 1.1),
    faster(FRESH, "eager", 8),
    faster(FRESH, "compile"),
)
CASES = (
    Case(SPARSE, 1024, 50257, torch.float32, _BARS, entries=64, in_quick=True),
    Case(SPARSE, 1024, 50257, torch.float32, _BARS, entries=12),
    Case(SPARSE, 256, 128256, torch.float32, _BARS, entries=64, both_allocators=False),
    Case(SPARSE, 1024, 50257, torch.bfloat16, _BARS, entries=64, both_allocators=False),
)


def bench_sparse(benchmark: Benchmark, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    race(benchmark, _contenders(case), case, quick=quick)


def _targets(teacher: Tensor, entries: int) -> SparseTargets:
    """The likeliest tokens of each row as a cache hands them out: ids ascending, the mass of the others beside them."""
    rows = [_kept(teacher[slab].double(), entries) for slab in check.slabs(*teacher.shape)]
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
    for slab in check.slabs(*student.shape):
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


def _contenders(case: Case) -> list[Contender]:
    """All of one race: fastkd, the recipes, and what fastkd may cost at most."""
    assert case.entries is not None
    batch = check.Batch.random(case.rows, case.vocab, case.dtype)
    student, labels = batch.student, batch.labels
    targets = _targets(batch.teacher, case.entries)
    truth = _truth(student, targets, labels)
    batch.teacher = batch.teacher[:0]
    overwritten = student.detach().clone().requires_grad_()
    low = case.dtype != torch.float32

    def prepare() -> None:
        student.grad = overwritten.grad = None
        overwritten.detach().copy_(student.detach())

    def contender(name: str, loss: Callable[[Tensor], Tensor], logits: Tensor, judged: bool = True) -> Contender:
        def run() -> Tensor:
            value = loss(logits)
            value.backward()
            return value

        def verify(value: object) -> float | None:
            gradients = [(logits.grad, truth.gradient)]
            return check.verified(name, value, truth.loss, gradients, recipes.limit(name, low)) if judged else None

        return Contender(name, run, prepare, verify, compiles=name in recipes.COMPILED)

    def ours(name: str, **settings: bool) -> Contender:
        """The whole loss, or what it may cost at most, cross-entropy alone, which has another gradient."""
        logits, alone = (overwritten if settings else student), name.startswith(_CROSS_ENTROPY)
        kd = fastkd.KDLoss(TEMPERATURE, soft_weight=0, hard_weight=1, **settings) if alone else None
        kd = kd or fastkd.KDLoss(TEMPERATURE, **settings)
        return contender(name, lambda z: kd(z, None if alone else targets, labels), logits, judged=not alone)

    def recipe(name: str) -> Contender:
        loss = recipes.ghost_kd_loss(TEMPERATURE)
        if name == "compile":
            loss = recipes.compiled(loss)
        return contender(name, lambda z: loss(z, targets.ids, targets.logprobs, targets.rest, labels), student)

    return [
        ours(FRESH),
        *(recipe(name) for name in (("eager", "compile") if recipes.can_compile() else ("eager",))),
        # In place nothing is allocated: this pair does not depend on what the ones before left of the memory.
        ours(_CROSS_ENTROPY_IN_PLACE, inplace=True),
        ours(IN_PLACE, inplace=True),
        ours(_CROSS_ENTROPY),
    ]
