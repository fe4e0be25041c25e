"""How much memory does a loss need beyond its inputs? The peak of each contender, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from pytest_benchmark.fixture import BenchmarkFixture

import fastkd
from bench import machine, peers, rivals, shapes
from bench.cases import Case
from bench.names import BUDGETS, MIB, ONE_GRADIENT, beyond_gradients, predicted
from bench.projections import hidden_loss
from bench.race import measure

CASES = shapes.MEMORY + shapes.PROJECTION_MEMORY + shapes.TRAINING_MEMORY
_ALLOWANCES = {"32 MiB": 32, "256 MiB": 256, "1 GiB": 1024}  # beside the gradients


def bench_memory(benchmark: BenchmarkFixture, case: Case) -> None:
    judged = dict.fromkeys(bar.ours for bar in case.bars)  # every contender has a bar, if only one without a limit
    names = [name for name in judged if _runs(name)]
    measure(benchmark, case, lambda: _peaks(names, case) | _yardsticks(case, names))


def _runs(name: str) -> bool:
    if name in peers.PEERS:
        return hidden_loss(name) is not None
    return rivals.can_compile() or name != "compile"


def _yardsticks(case: Case, names: list[str]) -> dict[str, float]:
    """What peaks are compared with, in MiB."""
    if case.hidden is None:
        return {ONE_GRADIENT: case.matrix_bytes / MIB}
    gradients = case.gradient_bytes / MIB
    found = {"gradients": gradients}
    for size, mib in _ALLOWANCES.items():
        if any(bar.other == beyond_gradients(size) for bar in case.bars):
            found[beyond_gradients(size)] = gradients + mib
    for name in names:
        if name in BUDGETS:
            plan = fastkd.plan(case.rows, case.vocab, *case.hidden, dtype=case.dtype, memory_budget=BUDGETS[name])
            found[predicted(name)] = plan.peak_bytes / MIB
    return found


def _peaks(names: list[str], case: Case) -> dict[str, float]:
    """MiB. Two processes at a time: what they share is time, which is not the question. One GPU is another matter."""
    with ThreadPoolExecutor(2 if machine.DEVICE.type == "cpu" else 1) as pool:
        peaks = list(pool.map(lambda name: _peak(name, case) / MIB, names))
    return dict(zip(names, peaks, strict=True))


def _peak(contender: str, case: Case) -> int:
    """Bytes, from `peak.py`."""
    dtype = str(case.dtype).removeprefix("torch.")
    arguments = (contender, case.rows, case.vocab, dtype, case.divergence, case.hidden)
    child = subprocess.run(
        [sys.executable, "-m", "bench.peak", json.dumps(arguments)],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"{contender}: {child.stderr[-2000:]}"
    return int(child.stdout.splitlines()[-1])
