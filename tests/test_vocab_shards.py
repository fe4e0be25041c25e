"""A vocabulary that is spread over ranks: the loss and gradients of one process, the same bits on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.divergences import TABLE
from tests import compare, shards
from tests.processes import run

WORLDS = (2, 4)
#: Relative, of values and gradients, against one process: sums in another order.
SAME = 1e-6
#: A projection's budgets: whole rows at once, and tiles of a rank's columns.
BUDGETS = {"logits": (None,), "projection": (None, 230_000)}
REDUCTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mean": ({}, {}),
    "none": ({"reduction": "none"}, {}),
    "num_items": ({}, {"num_items": 37.0}),
}


def close(found: Any, wanted: Any, what: str) -> None:
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = compare.relative_error(a, b)
        assert error <= SAME, f"{what}, {number}: {error:.2e}"


def here(wanted: tuple[Tensor, ...], form: str, own: slice) -> tuple[Tensor, ...]:
    """What of one process's gradients a rank has."""
    return (wanted[0][:, own],) if form == "logits" else (wanted[0], wanted[1][own], wanted[2][own])


def equals_one_process(rank: int, world: int, names: list[str]) -> list[Tensor]:
    batch, losses = shards.Batch.of(), []
    for name in names:
        divergence = TABLE[name]()
        for kind in ("dense", "sparse", "absent"):
            if kind == "sparse" and not divergence.tempered:
                continue
            for form, budgets in BUDGETS.items():
                for reduction, (settings, call) in REDUCTIONS.items():
                    settings = {**settings, "divergence": divergence}
                    whole = shards.outcome(
                        batch, shards.student(batch, form), shards.teacher(batch, form, kind), call, **settings
                    )
                    for uneven in (False, True):
                        for budget in budgets:
                            at = shards.cut(rank, world, uneven)
                            leaves, source = shards.student(batch, form, at.own)
                            taught = shards.teacher(batch, form, kind, at.own)
                            if kind == "dense":
                                taught = fastkd.VocabShard(taught, at.first, shards.V)
                            loss, gradients = shards.outcome(
                                batch,
                                (leaves, fastkd.VocabShard(source, at.first, shards.V)),
                                taught,
                                call,
                                memory_budget=budget,
                                **settings,
                            )
                            what = f"{name} {kind} {form} {reduction} uneven={uneven} budget={budget}"
                            close([loss], [whole[0]], what)
                            close(gradients, here(whole[1], form, at.own), what)
                            losses.append(loss.reshape(-1))
    return losses


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("names", [list(TABLE)[i::4] for i in range(4)], ids=lambda names: names[0])
def test_equals_one_process(world: int, names: list[str]) -> None:
    first, *others = run(world, equals_one_process, world, names)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "ranks disagree"
