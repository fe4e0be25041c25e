"""How much faster are row statistics in one read than a chain of torch reductions?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.harness import check
from bench.harness.contender import FRESH, TEMPERATURE, Contender
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals import recipes
from fastkd import reference

ROW_STATISTICS = Question(
    "row_statistics",
    Section.FUNCTIONS,
    "Row statistics (T = 2): log-sum-exp, entropy, arg-max and label log-probability",
    "Least traffic: read z: N·V·b bytes.",
    floor="sum",
    gated=True,
)
_BARS = (faster(FRESH, "eager", 4), faster(FRESH, "compile"), within(FRESH, "sum"))
CASES = (
    Case(ROW_STATISTICS, 1024, 50257, torch.float32, _BARS),
    Case(ROW_STATISTICS, 256, 50257, torch.float32, _BARS, in_quick=True),
    Case(ROW_STATISTICS, 1024, 50257, torch.bfloat16, _BARS),
)


def bench_row_statistics(benchmark: Benchmark, case: Case, quick: bool) -> None:
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

    functions: dict[str, Callable[..., Any]] = {FRESH: fastkd.row_statistics, "eager": recipes.row_statistics}
    if recipes.can_compile():
        functions["compile"] = recipes.compiled(recipes.row_statistics)
    contenders = [
        Contender(
            name,
            functools.partial(function, logits, labels, TEMPERATURE),
            verify=functools.partial(verify, name),
            compiles=name in recipes.COMPILED,
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
