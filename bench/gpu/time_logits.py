"""Races on logits: forward KL in every shape, the other divergences in one, and the memory that they take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.bench_memory import ONE_GRADIENT
from bench.gpu import raced, races
from bench.gpu.visit import Visit
from bench.harness import check
from bench.harness.check import Batch
from bench.harness.contender import FRESH, IN_PLACE, TEMPERATURE, Contender
from bench.harness.question import Case
from bench.rivals import recipes
from bench.rivals.logits import add_floors, kd_contender
from fastkd.divergences import ForwardKL, resolve

_PER_LOGIT = 48  # bytes that eager takes at its peak with all that is there beside it, roughly
_LEAST = 5.0  # seconds that a case takes
_SMALL = 512, 128, 256  # by what a dry run divides rows, columns and hidden sizes


def forget_compiled() -> None:
    """What torch.compile made of an earlier case, which takes memory, and counts towards its limit."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def fitted(visit: Visit, case: Case) -> Case:
    """Of fewer rows where memory does not suffice, and of few of a few columns in a dry run."""
    if visit.small:
        rows, vocab, hidden = _SMALL
        widths = case.hidden and tuple(width // hidden for width in case.hidden)
        return replace(case, rows=max(case.rows // rows, 2), vocab=case.vocab // vocab, hidden=widths)
    return replace(case, rows=visit.device.rows_that_fit(case.rows, _PER_LOGIT * case.vocab))


def _contenders(case: Case, batch: Batch) -> Iterator[Contender]:
    """fastkd, then those that the case's bars name; the walk's bars name fastkd itself."""
    forget_compiled()
    divergence = resolve(case.divergence)
    truth = check.kd_truth(batch, divergence, TEMPERATURE)
    named = dict.fromkeys([FRESH, *(name for bar in case.bars for name in (bar.ours, bar.other) if name)])
    for name in named:
        if name == raced.FORWARD_KL:  # which its own race judges
            yield replace(kd_contender(FRESH, batch, ForwardKL()), name=name, verify=lambda _: None)
        elif name == raced.ADD:
            yield from (floor for floor in add_floors(batch.student.detach(), batch.teacher) if floor.name == name)
        elif name.startswith("compile") and not recipes.can_compile():
            continue
        elif not name.startswith(f"{FRESH} ") or name == IN_PLACE:
            yield kd_contender(name, batch, divergence, truth)


def _refresh(batch: Batch) -> None:
    batch.student.detach().normal_(0, 6)
    batch.teacher.normal_(0, 6)


def run(visit: Visit) -> None:
    with torch.device(visit.device.kind):
        for turn in visit.mine(raced.turns(raced.logits()), at_least=0 if visit.small else _LEAST):
            turn = replace(turn, case=(case := fitted(visit, turn.case)))
            batch = Batch.random(case.rows, case.vocab, case.dtype)
            if case.question == raced.LOGITS_MEMORY.question:
                _memory(visit, case, batch)
            else:
                races.race(visit, list(_contenders(case, batch)), turn, lambda batch=batch: _refresh(batch))
            del batch
            visit.device.release()


def _memory(visit: Visit, case: Case, batch: Batch) -> None:
    names = dict.fromkeys(bar.ours for bar in case.bars)
    peaks = {name: lambda name=name: visit.device.peak_mib(kd_contender(name, batch, ForwardKL())) for name in names}
    races.values(visit, case, {**peaks, ONE_GRADIENT: lambda: case.matrix_bytes / 2**20})
