"""Ctrl-C, whenever it comes: status 130, "interrupted", and what to type."""

from __future__ import annotations

import csv
import json

import pytest

from fastkd.cli import main
from fastkd.training.configuration import dump
from tests.training.conftest import changed


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def config(options, tmp_path):
    """A configuration file of a short run."""
    options = changed(options, max_steps=4, eval_steps=2, eval_windows=4, sample_tokens=0, cache_tokens=8)
    path = tmp_path / "short.yaml"
    path.write_text(dump(options))
    return str(path)


@pytest.mark.parametrize(
    "place",
    [
        "setup.gather",
        "setup.with_teacher",
        "checks.check_better",
        "trainer.KDTrainer.train",
        "trainer.KDTrainer.evaluate",
    ],
)
def test_before_the_first_step(config, tmp_path, monkeypatch, capsys, place):
    """Nothing is left that could be resumed, and the same command starts again."""
    monkeypatch.setattr(f"fastkd.training.{place}", interrupt)
    assert main(["distill", config, "--epochs", "1"]) == 130
    told = capsys.readouterr().err
    assert f"fastkd: interrupted: start again with fastkd distill {config} --epochs 1" in told
    assert [path.name for path in tmp_path.iterdir()] == ["short.yaml"]


@pytest.mark.parametrize("inside", [True, False])
def test_in_a_cache_write(config, tmp_path, monkeypatch, capsys, inside):
    """What is typed then goes on with the cache, in the output or elsewhere."""
    import fastkd.cache.writer as writer

    original, calls = writer._run, []

    def slow(*arguments):
        calls.append(1)
        return original(*arguments) if len(calls) < 3 else interrupt()

    cache = tmp_path / "out" / "cache" if inside else tmp_path / "cache"
    command = ["distill", config, "--cache-dir", str(cache)]
    with monkeypatch.context() as patched:
        patched.setattr(writer, "_run", slow)
        assert main(command) == 130
    told = capsys.readouterr().err
    assert "fastkd: interrupted: " in told
    if inside:
        resume = f"fastkd distill {tmp_path / 'out' / 'config.yaml'} --resume"
        assert resume in told
        command = resume.split()[1:]
    else:
        assert f"the same command resumes the cache {cache}" in told
    assert main(command) == 0
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("command", [["eval", "somewhere"], ["inspect-teacher"], ["cache", "write"]])
def test_in_any_command(monkeypatch, capsys, command):
    function = {"eval": "eval.run", "inspect-teacher": "inspect_teacher.run", "cache": "cache.run"}[command[0]]
    monkeypatch.setattr(f"fastkd.training.commands.{function}", interrupt)
    assert main(command) == 130
    assert capsys.readouterr().err == f"fastkd: interrupted: start again with fastkd {' '.join(command)}\n"


def test_a_sweep_keeps_finished_cells_and_is_resumed(config, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third of five cells; the table is that of a sweep that was not interrupted."""
    from fastkd.training import fit as module

    def command(output):
        return [
            "sweep",
            config,
            "--alpha",
            "0",
            "0.5",
            "1",
            "--temperature",
            "1",
            "2",
            "--output",
            str(tmp_path / output),
        ]

    trained, fit = [], module.fit

    def counted(student, tokenizer, corpus, lessons, kd, *rest):
        trained.append((kd.soft_weight, kd.temperature))
        if len(trained) == 3:
            interrupt()
        return fit(student, tokenizer, corpus, lessons, kd, *rest)

    assert main(command("whole")) == 0
    monkeypatch.setattr(module, "fit", counted)
    capsys.readouterr()
    assert main(command("out")) == 130
    told = capsys.readouterr().err
    resume = f"fastkd sweep {tmp_path / 'out' / 'config.yaml'} --resume"
    assert f"interrupted: resume with {resume}" in told
    assert main([*command("out"), "--resume", "--learning-rate", "0.5"]) == 2
    assert "started with other options" in capsys.readouterr().err
    assert main(["distill", config, "--resume"]) == 2
    assert "not of distill" in capsys.readouterr().err

    assert main(resume.split()[1:]) == 0
    cells = [(0.0, 1.0), (0.5, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 2.0)]
    assert trained == [*cells[:3], *cells[2:]]
    rows = [list(csv.DictReader((tmp_path / name / "results.csv").open())) for name in ("out", "whole")]
    assert rows[0] == rows[1]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]
