"""What do terms of layers cost a training step, and what do teachers that learn or follow?"""

from __future__ import annotations

import pytest
import torch

from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals.teaching import EAGER, FEATURES, LOGITS, UPDATE, WITH_UPDATES, features, moving_average, pairs

_STUDENT = "the demo's student (GPT-2, 4 layers, 256 wide; 128-token windows; T = 2; AdamW included)"
FEATURES_STEP = Question(
    "teaching_features",
    Section.TRAINING,
    f"A training step of {_STUDENT} with terms of layers",
    "Both include the forward of a teacher of SmolLM2-135M's size. Each of the four blocks learns hidden states and, "
    "from queries and keys, attention of a block of the teacher. Matrix products of the output heads.",
    measure="flops",
)
ONLINE = Question(
    "teaching_online",
    Section.TRAINING,
    f"A training step of {_STUDENT} and of its teacher (GPT-2, 6 layers, 512 wide), which learns from the labels",
    "One forward of each model and step, in both. Matrix products of the output heads.",
    measure="flops",
)
MUTUAL = Question(
    "teaching_mutual",
    Section.TRAINING,
    f"A training step of {_STUDENT} and of a second one, which learn from each other",
    "One forward of each model and step, in both. Matrix products of the output heads.",
    measure="flops",
)
AVERAGE = Question(
    "teaching_average",
    Section.TRAINING,
    f"A training step of {_STUDENT} whose teacher is the moving average of its weights",
    "The update of the average is part of the step, and is timed by itself too.",
    measure="flops",
)
_ROWS, _VOCAB = 4096, 49152
CASES = (
    Case(FEATURES_STEP, _ROWS, _VOCAB, torch.float32, (within(FEATURES, LOGITS, 1.25),), hidden=(256, 576)),
    Case(ONLINE, _ROWS, _VOCAB, torch.float32, (faster("fastkd, online", EAGER, 1.5),), hidden=(256, 512)),
    Case(MUTUAL, _ROWS, _VOCAB, torch.float32, (faster("fastkd, mutual", EAGER, 1.5),), hidden=(256, 256)),
    Case(AVERAGE, _ROWS, _VOCAB, torch.float32, (within(UPDATE, WITH_UPDATES, 0.03),), hidden=(256, 256)),
)
_RACES = {
    FEATURES_STEP.name: features,
    ONLINE.name: lambda rows, vocab: pairs(rows, vocab, "online"),
    MUTUAL.name: lambda rows, vocab: pairs(rows, vocab, "mutual"),
    AVERAGE.name: moving_average,
}


def bench_teaching(benchmark: Benchmark, case: Case, quick: bool) -> None:
    pytest.importorskip("transformers", reason="make .venv/demo installs it")
    race(benchmark, _RACES[case.question.name](case.rows, case.vocab), case, quick=quick)
