"""Did `make demo` teach its student more than labels alone do? Read from the last run's own judgement, not run here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bench import machine, shapes
from bench.cases import Case
from bench.names import DISTILLED, LABELS_ALONE
from bench.race import measure

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

CASES = shapes.DEMO
_METRICS = machine.ROOT / "runs" / "demo" / "metrics.json"


def bench_demo(benchmark: BenchmarkFixture, case: Case) -> None:
    if not _METRICS.exists():
        pytest.skip("make demo has not been run")
    record = json.loads(_METRICS.read_text())
    models, tokens = record["models"], record["training"]["student"]["tokens"]
    assert tokens == case.rows, f"that run trained on {tokens:,} tokens, not on the demo's {case.rows:,}: run make demo"
    metric = {"demo_perplexity": "perplexity", "demo_kl": "kl"}[case.question]
    measure(
        benchmark,
        case,
        lambda: {DISTILLED: models["student"][metric], LABELS_ALONE: models["CE-only student"][metric]},
    )
