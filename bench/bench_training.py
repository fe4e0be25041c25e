"""How much faster does the demo's student train than by the eager recipe, and from a cache than from the teacher?"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import shapes
from bench.cases import Case
from bench.race import race

CASES = shapes.TRAINING


def bench_training(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    pytest.importorskip("transformers", reason="make .venv/demo installs it")
    from bench.training import steps

    race(benchmark, steps(case.rows, case.vocab), case, quick=quick)
