"""How much faster is fastkd than the textbook recipe on logits, and how near to the cost of touching them?

Forward KL in every shape, the other rows of the divergence table in one.
"""

from __future__ import annotations

import torch

from bench.harness.check import Batch
from bench.harness.contender import FRESH, IN_PLACE
from bench.harness.question import Bar, Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals.logits import A_LOSS_EACH, kd_contenders
from fastkd.divergences import TABLE, resolve

_LEAST = "Least traffic: read student and teacher, write the gradient: 3·N·V·b bytes."
LOGITS = Question(
    "logits",
    Section.LOGITS,
    "Forward KL (T = 2) and cross-entropy on logits, forward and backward",
    _LEAST,
    passes=3,
    floor="add",
    both_allocators=True,
    gated=True,
)
DIVERGENCES = Question(
    "divergences",
    Section.LOGITS,
    "The other divergences (T = 2) with cross-entropy, forward and backward",
    _LEAST,
    passes=3,
    floor="add",
    both_allocators=True,
    gated=True,
)
_FP32_BARS = (faster(FRESH, "eager", 12), faster(FRESH, "compile", 5))
_BF16_BARS = (
    faster(FRESH, "eager", 10),
    faster(FRESH, "eager fp32"),
    faster(FRESH, "compile"),
    faster(FRESH, "compile fp32"),
    within(FRESH, "add", 3.0),
    within(IN_PLACE, "add out="),
)


def _bars(dtype: torch.dtype, rows: int) -> tuple[Bar, ...]:
    """With few rows a core waits for the last one of another, and for waking up."""
    if dtype != torch.float32:
        return _BF16_BARS
    most = 1.6 if rows >= 1024 else 2.0
    return (*_FP32_BARS, within(FRESH, "add", most), within(IN_PLACE, "add out=", most))


_DIVERGENCE_BARS = (
    faster(FRESH, "eager", 6),
    faster(FRESH, "compile", 2.5),
    within(FRESH, "add"),
    within(IN_PLACE, "add out="),
)
_BOTH_ALLOCATORS = ("reverse_kl", "jsd")
#: Sums of divergences in one sweep.
MIXES = ("forward_kl:0.5+tvd:0.5", "jsd:0.3+reverse_kl:0.5+squared_hellinger:1.5")
CASES = (
    *(
        Case(LOGITS, rows, vocab, dtype, _bars(dtype, rows), in_quick=(rows, vocab) == (256, 50257))
        for dtype in (torch.float32, torch.bfloat16)
        for rows, vocab in ((1024, 50257), (256, 50257), (256, 128256))
    ),
    *(
        Case(
            DIVERGENCES,
            1024,
            50257,
            torch.float32,
            (*_DIVERGENCE_BARS, *([faster(FRESH, A_LOSS_EACH)] if name in MIXES else [])),
            name,
            in_quick=name in _BOTH_ALLOCATORS,
            both_allocators=name in _BOTH_ALLOCATORS,
        )
        for name in (*TABLE, *MIXES)
        if name != "forward_kl"
    ),
)


def bench_logits(benchmark: Benchmark, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    batch = Batch.random(case.rows, case.vocab, case.dtype)
    race(benchmark, kd_contenders(batch, resolve(case.divergence)), case, quick=quick)
