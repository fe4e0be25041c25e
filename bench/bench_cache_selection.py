"""How much does it cost to choose what a cache keeps of a row, beside torch's own top-k and one read of the row?"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.harness import check, machine
from bench.harness.contender import FRESH, TEMPERATURE, Contender
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from fastkd import backend, reference

_ABOUT = (
    "Least traffic: read z: N·V·b bytes. `eager` is fastkd's reference. `torch.topk` and `row statistics`, which reads "
    "the row once, do only a part of the work."
)
TOP_K = Question(
    "top_k",
    Section.CACHES,
    "The 64 likeliest tokens of a row, their log-probabilities and the mass of the others (T = 2)",
    _ABOUT,
)
SAMPLE = Question(
    "sample", Section.CACHES, "A sample of 12 tokens of a row, its weights and the row's entropy (T = 2)", _ABOUT
)
_BARS = (faster(FRESH, "eager", 1.0), within(FRESH, "torch.topk"), within(FRESH, "row statistics"))
CASES = tuple(
    Case(question, 256, 50257, dtype, _BARS, in_quick=dtype == torch.float32)
    for question in (TOP_K, SAMPLE)
    for dtype in (torch.float32, torch.bfloat16)
)
_LIKELIEST, _SAMPLED = 64, 12


def bench_selection(benchmark: Benchmark, case: Case, quick: bool) -> None:
    race(benchmark, _contenders(case), case, quick=quick)


def _contenders(case: Case) -> list[Contender]:
    logits = check.Batch.random(case.rows, case.vocab, case.dtype).student.detach()
    uniforms = torch.rand(case.rows, dtype=torch.float64, generator=machine.generator())
    ours = backend.select(logits)
    sampled = case.question == SAMPLE
    k = _SAMPLED if sampled else _LIKELIEST
    more = (uniforms,) if sampled else ()
    parts = [
        getattr(reference, case.question.name)(logits[slab].double(), k, TEMPERATURE, *(part[slab] for part in more))
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
                functools.partial(getattr(module, case.question.name), logits, k, TEMPERATURE, *more),
                verify=functools.partial(verify, name),
            )
            for name, module in ((FRESH, ours), ("eager", reference))
        ),
        Contender("torch.topk", lambda: logits.topk(k)),
        Contender("row statistics", lambda: ours.row_statistics(logits, None, TEMPERATURE)),
    ]
