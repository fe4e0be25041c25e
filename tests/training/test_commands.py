"""The commands beside `distill`, on a run of the tiny teacher and student."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
import transformers

from fastkd.cli import main
from tests.training.conftest import run


@pytest.fixture
def finished(options, tmp_path):
    """A run with a student that was not taught, out of a cache."""
    metrics = run(options, ce_baseline=True, cache_dir=str(tmp_path / "cache"), cache_tokens=8)
    return tmp_path / "out", metrics


def test_eval_finds_what_distill_found(finished, tmp_path, capsys):
    out, metrics = finished
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "CE-only student" in shown
    found = json.loads((out / "eval" / "metrics.json").read_text())["models"]
    for name, values in found.items():
        expected = metrics["models"][name]
        for measure in ("perplexity", "kl", "top1_agreement", "probability_correlation", "calibration_error"):
            assert values[measure] == pytest.approx(expected[measure], rel=1e-4, abs=1e-6)
        assert values["samples"] == expected["samples"]
    assert (out / "eval" / "report.html").read_text().count("<svg") == 4
    assert main(["eval", str(out), "--baseline", str(out), "--metrics", "kl"]) == 0
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_a_cache_is_written_once(finished, options, tmp_path, capsys):
    """A second run finds every row; one at another temperature is refused, and so is another tokenizer."""
    out, metrics = finished
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = run(options, cache_dir=str(tmp_path / "cache"), cache_tokens=8, output=str(tmp_path / "again"))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert again["models"]["student"]["kl"] == metrics["models"]["student"]["kl"]
    capsys.readouterr()
    arguments = [str(out / "config.yaml"), "--output", str(tmp_path / "other")]
    assert main(["distill", *arguments, "--temperature", "2"]) == 2
    assert "temperature=1.0" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_sweep_ranks_by_what_temperature_does_not_change(options, tmp_path, finished, capsys):
    out, _ = finished
    arguments = ["sweep", str(out / "config.yaml"), "--output", str(tmp_path / "sweep"), "--max-steps", "20"]
    assert main([*arguments, "--alpha", "0", "0.5", "1", "--temperature", "1", "3", "--cache-dir", ""]) == 0
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert {(row["soft_weight"], row["temperature"]) for row in rows} == {
        ("0.0", "1.0"),
        ("0.5", "1.0"),
        ("0.5", "3.0"),
        ("1.0", "1.0"),
        ("1.0", "3.0"),
    }
    worst = max(rows, key=lambda row: float(row["kl"]))
    assert worst["soft_weight"] == "0.0"
    assert rows[0] != worst
    written = ["config.yaml", "results.csv", "results.md", "run.json", "sweep.png"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == written
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    assert main(["sweep", "--temperature", "0"]) == 2
    assert "temperature is 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1e7", "inf", "nan", "-1"])
def test_temperatures_that_no_loss_takes_are_refused_before_a_model_is_loaded(value, capsys):
    for command in (["inspect-teacher", "--temperatures", "1"], ["cache", "write", "--temperature"]):
        assert main([*command, value]) == 2
        assert re.search(r"temperatures? is .*; it must be", capsys.readouterr().err)


def test_inspect_teacher(inputs, tmp_path, capsys):
    plot = tmp_path / "plots" / "teacher.png"
    arguments = ["inspect-teacher", "--teacher", str(inputs / "teacher"), "--device", "cpu", "--plot", str(plot)]
    assert main([*arguments, "--prompts", "the old film was", "two friends", "--top-k", "4"]) == 0
    shown = capsys.readouterr().out
    assert "after 'the old film'\n  the text goes on with 'was'" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    ids = tokenizer("the old film was", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        row = teacher(ids[:, :-1]).logits[0, -1].double().log_softmax(-1)
    entropy = -(row.exp() * row).sum()
    assert f"probability {row.exp()[ids[0, -1]]:.4f}" in shown
    assert f"entropy {entropy:.3f} nats, {entropy / torch.tensor(2.0).log():.3f} bits" in shown
    assert f"{tokenizer.decode([row.argmax()])!r}" in shown
    assert main([*arguments, "--prompts", "film"]) == 2
    assert "2 are needed" in capsys.readouterr().err
