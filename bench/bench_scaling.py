"""How does fastkd scale, beside the floor: with tokens, with the vocabulary, with the hidden size, with threads?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import check, shapes
from bench.cases import Case
from bench.contenders import TEMPERATURE, Contender, add_floors, kd_contender
from bench.names import FRESH
from bench.projections import Hidden, products, projection_contender
from bench.race import race
from fastkd.divergences import ForwardKL

CASES = shapes.SCALING_LOGITS + shapes.SCALING_HIDDEN
_NAMES = (FRESH, "eager")


def bench_scaling(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    contenders = _from_logits(case) if case.hidden is None else _from_hidden(case)
    with _threads(case.threads):
        race(benchmark, contenders, case, quick=quick)


def _from_logits(case: Case) -> list[Contender]:
    batch = check.Batch.random(case.rows, case.vocab, case.dtype)
    truth = check.kd_truth(batch, ForwardKL(), TEMPERATURE)
    contenders = [kd_contender(name, batch, ForwardKL(), truth) for name in _NAMES]
    return [*contenders, *add_floors(batch.student.detach(), batch.teacher)]


def _from_hidden(case: Case) -> list[Contender]:
    assert case.hidden is not None
    batch = Hidden.random(case.rows, case.vocab, case.hidden, case.dtype)
    truth = batch.truth()
    return [*(projection_contender(name, batch, truth) for name in _NAMES), products(batch)]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
