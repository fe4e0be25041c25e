"""`python -m bench.ranks` compares ranks, and says whether two are as fast as they should be."""

from __future__ import annotations

import re

import pytest

from bench import ranks


def test_each_form_and_divergence_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "8", "--vocab", "300", "--rounds", "1", "--repeats", "1", "--divergences", "mse"]
    found = ranks.main(sizes)
    head, hidden, logits, verdict = capsys.readouterr().out.splitlines()
    assert head.startswith("8 × 300, fp32")
    for line, form in ((hidden, "hidden states"), (logits, "logits")):
        assert re.fullmatch(rf"{form}, mse: 1: \d+\.\d+ \(1\.00\), 2: \d+\.\d+ \(\d+\.\d+\)", line), line
    ratio = float(re.findall(r"\((\d+\.\d+)\)", hidden)[1])
    assert found == (ratio > ranks.BAR) or abs(ratio - ranks.BAR) < 0.01
    assert ("more" if found else "at most") in verdict
