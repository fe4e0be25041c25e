"""How far is the gradient off, where it is easy and where it is a difference of near-equal numbers?"""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench import accuracy, shapes
from bench.cases import ALLOWED, Case
from bench.race import describe

CASES = shapes.ACCURACY + shapes.PROJECTION_ACCURACY


def bench_accuracy(benchmark: BenchmarkFixture, case: Case) -> None:
    describe(benchmark, case)
    benchmark.extra_info["peaks"] = benchmark.pedantic(_errors, args=(case,), rounds=1)


def _errors(case: Case) -> dict[str, float]:
    found = accuracy.logit_errors(case) if case.hidden is None else accuracy.hidden_errors(case)
    found[ALLOWED] = 2 * found["eager"] + 1e-6
    return found
