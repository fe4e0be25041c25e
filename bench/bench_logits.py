"""How much faster is fastkd than the textbook recipe on logits, and how near to the cost of touching them?"""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import shapes
from bench.cases import Case
from bench.check import Batch
from bench.contenders import kd_contenders
from bench.race import race
from fastkd.divergences import resolve

CASES = shapes.LOGITS


def bench_forward_kl(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    batch = Batch.random(case.rows, case.vocab, case.dtype)
    race(benchmark, kd_contenders(batch, resolve(case.divergence)), case, quick=quick)
