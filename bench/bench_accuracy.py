"""How far is the gradient off, where it is easy and where it is a difference of near-equal numbers?"""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench import accuracy, shapes
from bench.cases import Case
from bench.names import ALLOWED
from bench.race import measure

CASES = shapes.ACCURACY + shapes.PROJECTION_ACCURACY


def bench_accuracy(benchmark: BenchmarkFixture, case: Case) -> None:
    measure(benchmark, case, lambda: _errors(case))


def _errors(case: Case) -> dict[str, float]:
    found = accuracy.logit_errors(case) if case.hidden is None else accuracy.hidden_errors(case)
    return found | {ALLOWED: 2 * found["eager"] + 1e-6}
