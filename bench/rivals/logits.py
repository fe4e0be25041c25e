"""fastkd and its rivals on one batch of logits."""

from __future__ import annotations

import torch
from torch import Tensor

import fastkd
from bench.harness import check
from bench.harness.check import Batch, Truth
from bench.harness.contender import FRESH, IN_PLACE, TEMPERATURE, Contender
from bench.rivals import recipes
from fastkd.divergences import Divergence

__all__ = ["A_LOSS_EACH", "LOSS_ONLY", "add_floors", "kd_contender", "kd_contenders"]

LOSS_ONLY = "fastkd loss only"  # forward alone, without a gradient
A_LOSS_EACH = "a loss each"  # a `KDLoss` for each part of a mix


def kd_contender(name: str, batch: Batch, divergence: Divergence, truth: Truth | None = None) -> Contender:
    """The contender called `name`; without a truth it cannot be verified."""
    limit = recipes.limit(name, low=batch.student.dtype != torch.float32)
    recipe = recipes.kd_loss_fp32 if name.endswith("fp32") else recipes.kd_loss
    if name == IN_PLACE:
        loss: recipes.Loss = fastkd.KDLoss(TEMPERATURE, divergence=divergence, inplace=True)
    elif name in (FRESH, LOSS_ONLY):
        loss = fastkd.KDLoss(TEMPERATURE, divergence=divergence)
    elif name == A_LOSS_EACH:
        loss = _a_loss_each(divergence)
    elif name.startswith("compile"):
        loss = recipes.compiled(recipe(divergence, TEMPERATURE))
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

    return Contender(name, run, prepare, verify, compiles=name in recipes.COMPILED)


def _a_loss_each(mix: Divergence) -> recipes.Loss:
    losses = [
        fastkd.KDLoss(TEMPERATURE, soft_weight=0.5 * weight, hard_weight=0.0 if i else 0.5, divergence=part)
        for i, (part, weight) in enumerate(mix.parts)
    ]

    def total(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return torch.stack([loss(student, teacher, labels) for loss in losses]).sum()

    return total


def kd_contenders(batch: Batch, divergence: Divergence) -> list[Contender]:
    """All of one race: fastkd first, then the recipes in every precision that differs, then the floors."""
    recipes.recipe_is_right(divergence, TEMPERATURE)
    truth = check.kd_truth(batch, divergence, TEMPERATURE)
    names = [FRESH, IN_PLACE, *([A_LOSS_EACH] if isinstance(divergence, fastkd.Mix) else []), "eager", "compile"]
    if batch.student.dtype != torch.float32:
        names += ["eager fp32", "compile fp32"]
    runnable = [name for name in names if recipes.can_compile() or not name.startswith("compile")]
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
