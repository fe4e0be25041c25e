"""How much faster does the demo's student train than by the eager recipe, and from a cache than from the teacher?"""

from __future__ import annotations

import pytest
import torch

from bench.harness.question import Case, Question, Section, faster
from bench.harness.race import Benchmark, race
from bench.rivals.recipes import EAGER_STEP
from bench.rivals.steps import CACHED_STEP, LIVE_STEP, STEP, steps

TRAINING = Question(
    "training",
    Section.TRAINING,
    "A training step of the demo's student (GPT-2, 4 layers, 256 wide; 128-token windows; T = 2; AdamW included)",
    f"`{STEP}` and `{EAGER_STEP}` are given the teacher's hidden states; `{LIVE_STEP}` includes the whole forward of "
    f"a teacher of SmolLM2-135M's size; `{CACHED_STEP}` reads its predictions from a cache. Matrix products of the "
    "output heads: 2·N·V·(3·H of the student + H of the teacher) FLOPs.",
    measure="flops",
    both_allocators=True,
)
#: Batch 32 × 128 of the demo: vocabulary and teacher of SmolLM2-135M.
CASES = (
    Case(
        TRAINING,
        4096,
        49152,
        torch.float32,
        (faster(STEP, EAGER_STEP, 1.6), faster(CACHED_STEP, LIVE_STEP, 2.5)),
        hidden=(256, 576),
    ),
)


def bench_training(benchmark: Benchmark, case: Case, quick: bool) -> None:
    pytest.importorskip("transformers", reason="make .venv/demo installs it")
    race(benchmark, steps(case.rows, case.vocab), case, quick=quick)
