"""How near does fastkd come, from hidden states to gradients, to the cost of the matrix products alone?"""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import shapes
from bench.cases import Case
from bench.projections import projection_contenders
from bench.race import race

CASES = shapes.PROJECTIONS + shapes.PROJECTIONS_SOFT + shapes.PROJECTIONS_HARD


def bench_projection(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    race(benchmark, projection_contenders(case), case, quick=quick)
