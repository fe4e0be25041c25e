"""Races from hidden states: both terms, KL alone and cross-entropy alone, and the memory that they take."""

from __future__ import annotations

from dataclasses import replace

import torch

import fastkd
from bench.bench_memory import predicted
from bench.gpu import raced, races
from bench.gpu.time_logits import fitted, forget_compiled
from bench.gpu.visit import Visit
from bench.harness.contender import FRESH
from bench.harness.question import Case
from bench.rivals.hidden import Hidden, hidden_loss, projection_contender, projection_contenders

_LEAST = 10.0  # seconds that a case takes
_MIB = 2**20


def _refresh(batch: Hidden) -> None:
    batch.student.hidden.detach().normal_(0, 1)
    if batch.teacher is not None:
        batch.teacher.hidden.normal_(0, 1)


def _memory(visit: Visit, case: Case) -> None:
    batch = Hidden.random(case.rows, case.vocab, case.hidden, case.dtype)
    names = [name for name in dict.fromkeys(bar.ours for bar in case.bars) if hidden_loss(name) is not None]
    plan = fastkd.plan(case.rows, case.vocab, *case.hidden, dtype=case.dtype, device=visit.device.kind)
    races.values(
        visit,
        case,
        {
            **{name: lambda name=name: visit.device.peak_mib(projection_contender(name, batch)) for name in names},
            "gradients": lambda: case.gradient_bytes / _MIB,
            predicted(FRESH): lambda: plan.peak_bytes / _MIB,
        },
    )


def run(visit: Visit) -> None:
    first, *others = raced.HIDDEN
    with torch.device(visit.device.kind):
        work = raced.turns([first, raced.HIDDEN_MEMORY, *others])
        for turn in visit.mine(work, at_least=0 if visit.small else _LEAST):
            forget_compiled()
            turn = replace(turn, case=(case := fitted(visit, turn.case)))
            if case.question == raced.HIDDEN_MEMORY.question:
                _memory(visit, case)
            else:
                batch = Hidden.random(case.rows, case.vocab, case.hidden, case.dtype)
                contenders = projection_contenders(case, raced.OBJECTIVES[case.question], batch)
                races.race(visit, contenders, turn, lambda batch=batch: _refresh(batch))
                del batch, contenders
            visit.device.release()
