"""fastkd and its rivals on one batch, each ready to be run, checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastkd
from bench import check, rivals
from bench.check import Batch, Truth
from bench.names import FRESH, IN_PLACE, LOSS_ONLY
from fastkd.divergences import Divergence

__all__ = ["TEMPERATURE", "Contender", "add_floors", "kd_contender", "kd_contenders"]

TEMPERATURE = 2.0


def _nothing() -> None:
    pass


@dataclass
class Contender:
    """`run` is timed. `prepare`, before each run, is not: it drops gradients, refills overwritten logits."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], None] = _nothing
    #: What a run returned → its error against float64; raises AssertionError where that is too large.
    verify: Callable[[object], float | None] = field(default=lambda _: None)


def kd_contender(name: str, batch: Batch, divergence: Divergence, truth: Truth | None = None) -> Contender:
    """The contender called `name`; without a truth it cannot be verified."""
    limit = check.limit(name, low=batch.student.dtype != torch.float32)
    recipe = rivals.kd_loss_fp32 if name.endswith("fp32") else rivals.kd_loss
    if name == IN_PLACE:
        loss: rivals.Loss = fastkd.KDLoss(TEMPERATURE, divergence=divergence, inplace=True)
    elif name in (FRESH, LOSS_ONLY):
        loss = fastkd.KDLoss(TEMPERATURE, divergence=divergence)
    elif name.startswith("compile"):
        loss = rivals.compiled(recipe(divergence, TEMPERATURE))
    else:
        loss = recipe(divergence, TEMPERATURE)

    student = batch.student
    if name == IN_PLACE:
        student = student.detach().clone().requires_grad_()

    def prepare() -> None:
        student.grad = None
        if name == IN_PLACE:
            student.detach().copy_(batch.student)

    def run() -> Tensor:
        if name == LOSS_ONLY:
            with torch.no_grad():
                return loss(student, batch.teacher, batch.labels)
        value = loss(student, batch.teacher, batch.labels)
        value.backward()
        return value

    def verify(value: object) -> float:
        assert truth is not None
        return check.verified(name, value, truth.loss, [(student.grad, truth.gradient)], limit)

    return Contender(name, run, prepare, verify)


def kd_contenders(batch: Batch, divergence: Divergence) -> list[Contender]:
    """All of one race: fastkd first, then the recipes in every precision that differs, then the floors."""
    check.recipe_is_right(divergence, TEMPERATURE)
    truth = check.kd_truth(batch, divergence, TEMPERATURE)
    names = [FRESH, IN_PLACE, "eager", "compile"]
    if batch.student.dtype != torch.float32:
        names += ["eager fp32", "compile fp32"]
    runnable = [name for name in names if rivals.can_compile() or not name.startswith("compile")]
    return [
        *(kd_contender(name, batch, divergence, truth) for name in runnable),
        *add_floors(batch.student.detach(), batch.teacher),
    ]


def add_floors(first: Tensor, second: Tensor) -> list[Contender]:
    """torch.add: two reads and a write of `[N, V]`, into fresh memory and into memory touched before."""
    out = torch.empty_like(first).fill_(1)
    return [
        Contender("add", lambda: torch.add(first, second)),
        Contender("add out=", lambda: torch.add(first, second, out=out)),
    ]
