"""Did `make demo` teach its student more than labels alone do? Read from the last run's own judgement, not run here."""

from __future__ import annotations

import json

import pytest
import torch

from bench.harness import machine
from bench.harness.question import Case, Question, Section, within
from bench.harness.race import Benchmark, measure

_ABOUT = "The same student, data and steps, with the teacher and on the labels alone; one seed, 21 held-out windows."
_DISTILLED, _LABELS_ALONE = "distilled", "labels alone"
PERPLEXITY = Question(
    "demo_perplexity",
    Section.TRAINING,
    "The result of `make demo`: perplexity on held-out reviews",
    _ABOUT,
    passes=0,
    unit="perplexity",
)
KL = Question(
    "demo_kl",
    Section.TRAINING,
    "The result of `make demo`: KL(teacher ‖ student) on held-out reviews",
    _ABOUT,
    passes=0,
    unit="nats",
)
_METRIC = {PERPLEXITY: "perplexity", KL: "kl"}
#: The demo's training tokens: epochs, windows and their length.
TOKENS = 2 * 448 * 128
#: The distilled student has to be better, and its KL at least 15 % lower.
CASES = tuple(
    Case(question, TOKENS, 49152, torch.float32, (within(_DISTILLED, _LABELS_ALONE, limit),))
    for question, limit in ((PERPLEXITY, 1.0), (KL, 0.85))
)
_METRICS = machine.ROOT / "runs" / "demo" / "metrics.json"


def bench_demo(benchmark: Benchmark, case: Case) -> None:
    if not _METRICS.exists():
        pytest.skip("make demo has not been run")
    record = json.loads(_METRICS.read_text())
    models, tokens = record["models"], record["training"]["student"]["tokens"]
    assert tokens == case.rows, f"that run trained on {tokens:,} tokens, not on the demo's {case.rows:,}: run make demo"
    metric = _METRIC[case.question]
    measure(
        benchmark,
        case,
        lambda: {_DISTILLED: models["student"][metric], _LABELS_ALONE: models["CE-only student"][metric]},
    )
