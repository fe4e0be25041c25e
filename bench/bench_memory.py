"""How much memory does a loss need beyond its inputs? The peak of each contender, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from pytest_benchmark.fixture import BenchmarkFixture

from bench import machine, rivals, shapes
from bench.race import describe
from bench.cases import FRESH, IN_PLACE, LOSS_ONLY, ONE_GRADIENT

CASES = shapes.MEMORY


def bench_memory(benchmark: BenchmarkFixture, case: Case) -> None:
    names = [FRESH, IN_PLACE, LOSS_ONLY, "eager", *(["compile"] if rivals.can_compile() else [])]
    peaks = {ONE_GRADIENT: case.matrix_bytes / shapes.MIB}

    def measure() -> None:
        for name in names:
            peaks[name] = _peak(name, case) / shapes.MIB

    describe(benchmark, "memory", case)
    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["peaks"] = peaks


def _peak(contender: str, case: Case) -> int:
    """Bytes, from `peak.py`."""
    arguments = (contender, case.rows, case.vocab, str(case.dtype).removeprefix("torch."), case.divergence)
    child = subprocess.run(
        [sys.executable, "-m", "bench.peak", json.dumps(arguments)],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"{contender}: {child.stderr[-2000:]}"
    return int(child.stdout.splitlines()[-1])
