"""How much does it cost to choose what a cache keeps of a row, beside torch's own top-k and one read of the row?"""

from __future__ import annotations

import functools
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import check, machine, shapes
from bench.cases import Case
from bench.contenders import TEMPERATURE, Contender
from bench.names import FRESH
from bench.race import race
from fastkd import backend, reference

CASES = shapes.TOP_K + shapes.SAMPLE
_TOP_K, _SAMPLED = 64, 12


def bench_selection(benchmark: BenchmarkFixture, case: Case, quick: bool) -> None:
    race(benchmark, _contenders(case), case, quick=quick)


def _contenders(case: Case) -> list[Contender]:
    logits = check.Batch.random(case.rows, case.vocab, case.dtype).student.detach()
    uniforms = torch.rand(case.rows, dtype=torch.float64, generator=machine.generator())
    ours = backend.select(logits)
    sampled = case.question == "sample"
    k = _SAMPLED if sampled else _TOP_K
    more = (uniforms,) if sampled else ()
    parts = [
        getattr(reference, case.question)(logits[slab].double(), k, TEMPERATURE, *(part[slab] for part in more))
        for slab in check.slabs(*logits.shape)
    ]
    truth = [torch.cat(part) for part in zip(*parts, strict=True)]

    def verify(name: str, found: Any) -> float:
        """Weights in descending order and the row's number; which of equally likely tokens were taken is open."""
        off = (found[1].sort(-1).values.exp() - truth[1].sort(-1).values.exp()).abs().max().item()
        off = max(off, ((found[2] - truth[2]).abs() / truth[2].abs().clamp(min=1)).max().item())
        assert off <= check.FP32, f"{name}: error {off:.1e} > {check.FP32:.0e}"
        return float(off)

    return [
        *(
            Contender(
                name,
                functools.partial(getattr(module, case.question), logits, k, TEMPERATURE, *more),
                verify=functools.partial(verify, name),
            )
            for name, module in ((FRESH, ours), ("eager", reference))
        ),
        Contender("torch.topk", lambda: logits.topk(k)),
        Contender("row statistics", lambda: ours.row_statistics(logits, None, TEMPERATURE)),
    ]
