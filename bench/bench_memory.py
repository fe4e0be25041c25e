"""How much memory does a loss need beyond its inputs? The peak of each contender, in a process of its own.

    python -m bench.bench_memory '["fastkd", 1024, 50257, "float32", "jsd", null]'    one contender; prints bytes

The matrix library's packing buffers, which it makes at its first large product and keeps, are nobody's: bare products
come before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import fastkd
from bench.harness import machine, peak
from bench.harness.check import BOTH, Batch
from bench.harness.contender import FRESH, IN_PLACE, Contender
from bench.harness.question import Bar, Case, Question, Section, near, within
from bench.harness.race import Benchmark, measure
from bench.rivals import peers, recipes, steps
from bench.rivals.hidden import BUDGETS, LARGE, SMALL, Hidden, hidden_loss, products, projection_contender
from bench.rivals.logits import LOSS_ONLY, kd_contender
from bench.rivals.recipes import CHUNKED, EAGER_STEP
from bench.rivals.steps import STEP
from fastkd.divergences import resolve

MEMORY = Question(
    "memory",
    Section.MEMORY,
    "Peak memory above the resident inputs, forward and backward, a process each, default allocator",
    "`one gradient` is N·V·b bytes.",
    unit="MiB",
    gated=True,
)
PROJECTION_MEMORY = Question(
    "projection_memory",
    Section.MEMORY,
    "Peak memory above the resident inputs, from hidden states to loss and gradients, default allocator",
    "`gradients` are (N + V)·H·b bytes; `predicted` is what `fastkd.plan(...)` says before the call. The number behind "
    "a contender is its `memory_budget`.",
    unit="MiB",
    gated=True,
)
TRAINING_MEMORY = Question(
    "training_memory",
    Section.MEMORY,
    "Peak memory above the resident model, optimizer and inputs, of the training step below, default allocator",
    "The gradients of the output head alone are (N + V)·H·b bytes.",
    passes=0,
    unit="MiB",
    gated=True,
)
_MIB = 2**20
ONE_GRADIENT = "one gradient"
_ALLOWANCES = {"32 MiB": 32, "256 MiB": 256, "1 GiB": 1024}  # MiB beside the gradients


def _beyond_gradients(budget: str) -> str:
    """What a contender with this much working memory may need."""
    return f"gradients + {budget}"


def predicted(contender: str) -> str:
    """What `fastkd.plan` says it will need."""
    return contender.replace(FRESH, "predicted", 1)


def _budgeted(contender: str, budget: str) -> tuple[Bar, ...]:
    return within(contender, _beyond_gradients(budget), 1.0), near(contender, predicted(contender))


_BARS = (
    within(FRESH, ONE_GRADIENT, 1.02),
    within(IN_PLACE, None, 1.0),
    within(LOSS_ONLY, None, 1.0),
    within("eager", ONE_GRADIENT),
)
_COMPILED = within("compile", ONE_GRADIENT)
_FROM_HIDDEN = (*_budgeted(FRESH, "256 MiB"), *_budgeted(SMALL, "32 MiB"))
_RIVALS_FROM_HIDDEN = tuple(within(name, "gradients") for name in ("eager", "compile", CHUNKED, *peers.raced(BOTH)))
CASES = (
    Case(MEMORY, 1024, 50257, torch.float32, (*_BARS, _COMPILED), in_quick=True),
    Case(MEMORY, 1024, 50257, torch.bfloat16, (*_BARS, _COMPILED)),
    Case(MEMORY, 256, 128256, torch.float32, _BARS),
    Case(MEMORY, 1024, 50257, torch.float32, _BARS, "jsd"),
    Case(PROJECTION_MEMORY, 1024, 50257, torch.float32, (*_FROM_HIDDEN, *_RIVALS_FROM_HIDDEN), hidden=(256, 768)),
    Case(PROJECTION_MEMORY, 1024, 50257, torch.float32, _FROM_HIDDEN, hidden=(768, 1024), in_quick=True),
    Case(PROJECTION_MEMORY, 1024, 128256, torch.float32, _FROM_HIDDEN, hidden=(256, 768)),
    Case(PROJECTION_MEMORY, 512, 50257, torch.bfloat16, (near(FRESH, predicted(FRESH)),), hidden=(256, 768)),
    Case(PROJECTION_MEMORY, 8192, 128256, torch.float32, _budgeted(LARGE, "1 GiB"), hidden=(256, 768)),
    Case(
        TRAINING_MEMORY,
        4096,
        49152,
        torch.float32,
        (within(STEP, EAGER_STEP, 0.4), within(EAGER_STEP, None)),
        hidden=(256, 576),
    ),
)


def bench_memory(benchmark: Benchmark, case: Case) -> None:
    judged = dict.fromkeys(bar.ours for bar in case.bars)  # every contender has a bar, if only one without a limit
    names = [name for name in judged if _runs(name)]
    measure(benchmark, case, lambda: _peaks(names, case) | _yardsticks(case, names))


def _runs(name: str) -> bool:
    if name in peers.PEERS:
        return hidden_loss(name) is not None
    return recipes.can_compile() or name != "compile"


def _yardsticks(case: Case, names: list[str]) -> dict[str, float]:
    """What peaks are compared with, in MiB."""
    if case.hidden is None:
        return {ONE_GRADIENT: case.matrix_bytes / _MIB}
    gradients = case.gradient_bytes / _MIB
    found = {"gradients": gradients}
    for size, mib in _ALLOWANCES.items():
        if any(bar.other == _beyond_gradients(size) for bar in case.bars):
            found[_beyond_gradients(size)] = gradients + mib
    for name in names:
        if name in BUDGETS:
            plan = fastkd.plan(case.rows, case.vocab, *case.hidden, dtype=case.dtype, memory_budget=BUDGETS[name])
            found[predicted(name)] = plan.peak_bytes / _MIB
    return found


def _peaks(names: list[str], case: Case) -> dict[str, float]:
    """MiB. Two processes at a time: what they share is time, which is not the question. One GPU is another matter."""
    with ThreadPoolExecutor(2 if machine.DEVICE.type == "cpu" else 1) as pool:
        peaks = list(pool.map(lambda name: _peak(name, case) / _MIB, names))
    return dict(zip(names, peaks, strict=True))


def _peak(contender: str, case: Case) -> int:
    """Bytes, as the process says that this file starts."""
    dtype = str(case.dtype).removeprefix("torch.")
    arguments = (contender, case.rows, case.vocab, dtype, case.divergence, case.hidden)
    child = subprocess.run(
        [sys.executable, "-m", "bench.bench_memory", json.dumps(arguments)],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"{contender}: {child.stderr[-2000:]}"
    return int(child.stdout.splitlines()[-1])


def _print_peak(
    name: str, rows: int, vocab: int, dtype: torch.dtype, divergence: str, hidden: tuple[int, int] | None
) -> None:
    """Of one forward and backward pass of the contender (its forward alone, for the loss-only one)."""

    def contending(rows: int, vocab: int) -> Contender:
        if name in (STEP, EAGER_STEP):
            return steps.step(name, rows, vocab)
        if hidden is not None:
            return projection_contender(name, Hidden.random(rows, vocab, hidden, dtype))
        return kd_contender(name, Batch.random(rows, vocab, dtype), resolve(divergence))

    peak.check_system()
    contender = contending(rows, vocab)
    if hidden is not None:
        products(Hidden.random(min(rows, 512), vocab, hidden, torch.float32)).run()
    print(peak.peak_bytes(contender, contender if contender.compiles else contending(128, 1024)))


if __name__ == "__main__":
    name, rows, vocab, dtype, divergence, hidden = json.loads(sys.argv[1])
    _print_peak(name, rows, vocab, getattr(torch, dtype), divergence, hidden and tuple(hidden))
