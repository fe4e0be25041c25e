"""How much faster are row statistics in one read than a chain of torch reductions?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastkd
from bench import check, rivals, shapes
from bench.cases import Case
from bench.contenders import TEMPERATURE, Contender
from bench.names import FRESH
from bench.race import race
from fastkd import reference

CASES = shapes.ROW_STATISTICS


def bench_row_statistics(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    batch = check.Batch.random(case.rows, case.vocab, case.dtype)
    logits, labels = batch.student.detach(), batch.labels
    truth = _truth(logits, labels)

    def verify(name: str, rows: Any) -> float:
        log_sum_exp, entropy, argmax, label_logprob = rows
        found = torch.stack((log_sum_exp, entropy, label_logprob)).double()
        off = ((found - truth).abs() / truth.abs().clamp(min=1)).max().item()
        assert off <= check.FP32, f"{name}: relative error {off:.1e} > {check.FP32:.0e}"
        assert torch.equal(logits.gather(1, argmax[:, None])[:, 0], logits.amax(1)), f"{name}: arg-max is not a maximum"
        return float(off)

    functions: dict[str, Callable[..., Any]] = {FRESH: fastkd.row_statistics, "eager": rivals.row_statistics}
    if rivals.can_compile():
        functions["compile"] = rivals.compiled(rivals.row_statistics)
    contenders = [
        Contender(
            name, functools.partial(function, logits, labels, TEMPERATURE), verify=functools.partial(verify, name)
        )
        for name, function in functions.items()
    ]
    contenders.append(Contender("sum", lambda: torch.sum(logits)))
    race(benchmark, contenders, case, quick=quick)


def _truth(logits: Tensor, labels: Tensor) -> Tensor:
    """`[3, N]` float64: log-sum-exp, entropy, label log-probability."""
    parts = [
        reference.row_statistics(logits[slab].double(), labels[slab], TEMPERATURE)
        for slab in check.slabs(*logits.shape)
    ]
    return torch.stack([torch.cat([part[place] for part in parts]) for place in (0, 1, 3)])
