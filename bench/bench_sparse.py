"""Does a teacher of which K tokens are known cost no more than cross-entropy alone?"""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import shapes
from bench.cases import Case
from bench.race import race
from bench.sparse import sparse_contenders

CASES = shapes.SPARSE


def bench_sparse(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    race(benchmark, sparse_contenders(case), case, quick=quick)
