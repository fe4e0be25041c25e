"""How near does fastkd come, from hidden states to gradients, to the cost of the matrix products alone?

Each peer takes part with the objective it computes: both terms, KL alone, or cross-entropy alone.
"""

from __future__ import annotations

import torch

from bench.harness.check import BOTH, HARD, SOFT, Objective
from bench.harness.contender import FRESH
from bench.harness.question import Bar, Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals import peers
from bench.rivals.hidden import PRODUCTS, WIDENED, projection_contenders
from bench.rivals.recipes import CHUNKED


def _question(name: str, title: str, products: str) -> Question:
    return Question(
        name,
        Section.HIDDEN,
        title,
        f"Matrix products: {products} FLOPs.",
        measure="flops",
        floor=PRODUCTS,
        both_allocators=True,
        gated=True,
    )


_WITH_TEACHER = "2·N·V·(3·H of the student + H of the teacher)"
PROJECTIONS = _question(
    "projections",
    "From hidden states to forward KL (T = 2) and cross-entropy, d hidden and d weight included",
    _WITH_TEACHER,
)
PROJECTIONS_SOFT = _question(
    "projections_soft",
    "From hidden states to T²·forward KL alone (T = 2), d hidden and d weight included",
    _WITH_TEACHER,
)
PROJECTIONS_HARD = _question(
    "projections_hard", "From hidden states to cross-entropy alone, d hidden and d weight included", "2·N·V·3·H"
)
_OBJECTIVES = {PROJECTIONS: BOTH, PROJECTIONS_SOFT: SOFT, PROJECTIONS_HARD: HARD}


def _against_peers(objective: Objective) -> tuple[Bar, ...]:
    return tuple(faster(FRESH, name) for name in peers.raced(objective))


def _both_terms(over_products: float) -> tuple[Bar, ...]:
    return (
        within(FRESH, PRODUCTS, over_products),
        faster(FRESH, "eager", 1.4),
        faster(FRESH, "compile", 1.0),
        faster(FRESH, CHUNKED, 1.5),
        *_against_peers(BOTH),
    )


#: In bf16 torch's recipe takes a minute where no unit multiplies it: what has no bar of its own gets few rows, once.
_FEW_BF16 = (32, 50257, torch.bfloat16)


def _one_term(question: Question, hidden: tuple[int, ...]) -> tuple[Case, ...]:
    bars = (faster(FRESH, "eager"), *_against_peers(_OBJECTIVES[question]))
    fp32_bars = (within(FRESH, PRODUCTS), faster(FRESH, "compile"), *bars)
    bf16_bars = (within(FRESH, WIDENED), *bars)
    in_quick = question == PROJECTIONS_SOFT
    return (
        Case(question, 1024, 50257, torch.float32, fp32_bars, hidden=hidden, in_quick=in_quick),
        Case(question, *_FEW_BF16, bf16_bars, hidden=hidden, both_allocators=False),
    )


#: Both allocators for one case of each vocabulary: a case takes minutes.
CASES = (
    Case(PROJECTIONS, 1024, 50257, torch.float32, _both_terms(1.15), hidden=(256, 768), in_quick=True),
    Case(PROJECTIONS, 1024, 50257, torch.float32, _both_terms(1.15), hidden=(768, 1024), both_allocators=False),
    Case(PROJECTIONS, 1024, 128256, torch.float32, _both_terms(1.3), hidden=(256, 768)),
    Case(
        PROJECTIONS,
        512,
        50257,
        torch.bfloat16,
        (within(FRESH, WIDENED, 1.2), faster(FRESH, "eager", 20)),
        hidden=(256, 768),
        both_allocators=False,
    ),
    Case(
        PROJECTIONS,
        *_FEW_BF16,
        (within(FRESH, WIDENED), faster(FRESH, "eager"), *_against_peers(BOTH)),
        hidden=(256, 768),
        both_allocators=False,
    ),
    *_one_term(PROJECTIONS_SOFT, (256, 768)),
    *_one_term(PROJECTIONS_HARD, (256,)),
)


def bench_projection(benchmark: Benchmark, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    race(benchmark, projection_contenders(case, _OBJECTIVES[case.question]), case, quick=quick)
