"""What does a call cost the host: for a GPU, where a backend that does nothing leaves Python and torch alone, and on a
CPU, where a loss on logits in main memory is one native call?
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.harness import check, machine
from bench.harness.check import Batch, Truth
from bench.harness.contender import FRESH, TEMPERATURE
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, measure
from bench.rivals import recipes
from fastkd.divergences import ForwardKL
from tools import host_time
from tools.host_time import stand_in

LAUNCHED = "fastkd with its kernels"
WEIGHTED, PER_ROW, NOTHING = "fastkd with weights", 'fastkd reduction="none"', "autograd alone"
HOST = Question(
    "host",
    Section.FUNCTIONS,
    "Host time of one call on few logits, forward and backward",
    "`fastkd` has a backend that computes nothing, `fastkd with its kernels` the one of the device.",
    unit="µs",
)
SMALL = Question(
    "small",
    Section.FUNCTIONS,
    "Forward KL (T = 2) and cross-entropy on few logits in main memory, forward and backward",
    f"`{FRESH}` is given labels, `{WEIGHTED}` token weights too; `{PER_ROW}` returns a loss per token, which are added "
    "up. Medians of single calls that take turns.",
    unit="µs",
    on_cpus=True,
    floor=NOTHING,
)
_OURS = (FRESH, WEIGHTED, PER_ROW)
FOR_GPUS = Case(HOST, 4, 1003, torch.bfloat16, (within(FRESH, None, 120), within(FRESH, "eager fp32")))
CASES = (
    FOR_GPUS,
    Case(
        SMALL,
        *(1, 64, torch.float32),
        (*(within(name, None, 120) for name in _OURS), *(within(name, "eager", 1.3) for name in _OURS)),
    ),
    Case(SMALL, 4, 32000, torch.float32, tuple(faster(name, "eager", 1) for name in _OURS)),
)
_CALLS, _WARM = 300, 20


def bench_host(benchmark: Benchmark, case: Case) -> None:
    measure(benchmark, case, lambda: microseconds(case) if case == FOR_GPUS else in_main_memory(case))


# --- for a GPU ----------------------------------------------------------------------------------------------------


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


# --- on a CPU -----------------------------------------------------------------------------------------------------


def in_main_memory(case: Case) -> dict[str, float]:
    """Of each contender, of which all but the floor have been checked.

    No default device may be in force, nor any other mode: what is watched does not go the way that is asked about.
    """
    batch = Batch.random(case.rows, case.vocab, case.dtype)
    losses = losses_of(batch)
    truth = check.kd_truth(batch, ForwardKL(), TEMPERATURE)
    for name, loss in losses.items():
        if name != NOTHING:
            _check(name, loss, batch, truth)
    return host_time.microseconds({name: (nullcontext, _step(loss, batch)) for name, loss in losses.items()})


def losses_of(batch: Batch) -> dict[str, Callable[[], Tensor]]:
    """Means over tokens, of weights that are 1; the sum over tokens; and the floor, which is wrong."""
    student, teacher, labels = batch.student, batch.teacher, batch.labels
    kd, per_row = fastkd.KDLoss(TEMPERATURE), fastkd.KDLoss(TEMPERATURE, reduction="none")
    eager = recipes.kd_loss(ForwardKL(), TEMPERATURE)
    weights = torch.ones(len(labels))
    return {
        FRESH: lambda: kd(student, teacher, labels),
        WEIGHTED: lambda: kd(student, teacher, labels, weights=weights),
        PER_ROW: lambda: per_row(student, teacher, labels).sum(),
        "eager": lambda: eager(student, teacher, labels),
        NOTHING: lambda: _Nothing.apply(student),  # type: ignore[no-untyped-call]
    }


def _check(name: str, loss: Callable[[], Tensor], batch: Batch, truth: Truth) -> None:
    times = len(batch.labels) if name == PER_ROW else 1
    batch.student.grad = None
    value = loss()
    value.backward()
    gradients = [(batch.student.grad, times * truth.gradient)]
    check.verified(name, value, times * truth.loss, gradients, check.FP32)


class _Nothing(torch.autograd.Function):
    """Saved in this way, nothing else holds the gradient, so autograd need not copy it into `.grad`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(student))
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (ready,) = ctx.saved_tensors
        return ready  # type: ignore[no-any-return]


def _step(loss: Callable[[], Tensor], batch: Batch) -> Callable[[], None]:
    def step() -> None:
        batch.student.grad = None
        loss().backward()

    return step
