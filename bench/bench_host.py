"""What does a call cost the host? With a backend that does nothing: all that remains is Python and torch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from bench.harness import machine
from bench.harness.check import Batch
from bench.harness.contender import FRESH, TEMPERATURE
from bench.harness.question import Case, Question, Section, within
from bench.harness.race import Benchmark, measure
from bench.rivals import recipes
from fastkd.divergences import ForwardKL
from tools.host_time import stand_in

LAUNCHED = "fastkd with its kernels"
HOST = Question(
    "host",
    Section.FUNCTIONS,
    "Host time of one call on few logits, forward and backward",
    "`fastkd` has a backend that computes nothing, `fastkd with its kernels` the one of the device.",
    unit="µs",
)
CASES = (Case(HOST, 4, 1003, torch.bfloat16, (within(FRESH, None, 120), within(FRESH, "eager fp32"))),)
_CALLS, _WARM = 300, 20


def microseconds(case: Case) -> dict[str, float]:
    """Of each contender, on the host alone: nothing waits for the device."""
    batch = Batch.random(case.rows, case.vocab, case.dtype)
    kd, eager = fastkd.KDLoss(TEMPERATURE), recipes.kd_loss_fp32(ForwardKL(), TEMPERATURE)
    found = {LAUNCHED: _of(kd, batch), "eager fp32": _of(eager, batch)}
    with stand_in():
        return {FRESH: _of(kd, batch), **found}


def _of(loss: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch) -> float:
    def calls(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            batch.student.grad = None
            loss(batch.student, batch.teacher, batch.labels).backward()
        return (time.perf_counter() - begin) / count * 1e6

    calls(_WARM)
    if machine.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return min(calls(_CALLS // 10) for _ in range(10))


def bench_host(benchmark: Benchmark, case: Case) -> None:
    measure(benchmark, case, lambda: microseconds(case))
