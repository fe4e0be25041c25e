"""What metrics.json says of a run's machine, time and course."""

from __future__ import annotations

import math
import os

import pytest
import torch
import transformers

import fastkd
from tests.training.conftest import run


def test_a_run_says_what_it_was_made_on_and_how_long_it_took(options):
    found = run(options, max_steps=12, logging_steps=4, eval_steps=6)
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["device"] == found["device"] == "cpu"
    assert found["machine"]["processor"]
    for module in (fastkd, torch, transformers):
        assert found["versions"][module.__name__] == module.__version__
    assert found["peak_memory"]["process"] > 100 << 20
    assert found["peak_memory"]["device"] is None
    training = found["training"]["student"]
    assert training["tokens"] == 12 * 8 * 16
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["seconds"])
    assert 0 < training["seconds"] == found["seconds"]["student"] < found["seconds"]["total"]
    lines = [line for line in training["history"] if "tokens_per_second" in line]
    assert [line["step"] for line in lines] == [1, 4, 8, 12]
    for line in lines:
        assert {"loss", "soft", "hard", "ratio", "learning_rate", "grad_norm", "tokens_per_second"} <= line.keys()
        assert line["ratio"] == pytest.approx(line["hard"] / line["soft"])
        assert 0 < line["grad_norm"] < math.inf
    assert lines[1]["learning_rate"] > lines[2]["learning_rate"] > lines[3]["learning_rate"] >= 0
