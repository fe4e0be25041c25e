"""What a saved model is judged with, what is said of one that got worse, and that no model's own Python is run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkd.cli import main
from fastkd.training.configuration import dump
from fastkd.training.judge import STUDENT, verdict
from tests.training.conftest import changed, run


@pytest.mark.parametrize("flags_first", [True, False])
def test_eval_reads_the_configuration_of_the_run_wherever_its_flags_stand(flags_first, options, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(dump([changed(options, temperature=3.5).distillation]))
    seen = []
    monkeypatch.setattr(
        "fastkd.training.commands.eval.evaluate", lambda model, found, baseline: seen.append((model, found))
    )
    flags, model = ["--eval-windows", "7"], [str(tmp_path)]
    assert main(["eval", *(flags + model if flags_first else model + flags)]) == 0
    ((judged, found),) = seen
    assert judged == str(tmp_path)
    assert (found.distillation.temperature, found.evaluation.eval_windows) == (3.5, 7)


def test_a_student_that_became_worse_is_said_to_be(options):
    result = run(options, learning_rate=30.0, max_steps=6, sample_tokens=0)
    assert result["verdict"][0].startswith("WORSE: held-out perplexity ")
    assert "before it" in result["verdict"][0]


def test_a_student_that_became_better_is_not(monkeypatch):
    monkeypatch.setattr("fastkd.training.judge.diagnosis", lambda *_: [])

    def contender(name, perplexity):
        return SimpleNamespace(name=name, held_out=SimpleNamespace(perplexity=perplexity, kl=None))

    assert verdict([contender(STUDENT, 274.0)], contender("student before", 119.0))[0].startswith("WORSE")
    assert verdict([contender(STUDENT, float("nan"))], contender("student before", 119.0))[0].startswith("WORSE")
    assert verdict([contender(STUDENT, 118.0)], contender("student before", 119.0)) == []
    assert verdict([contender(STUDENT, 119.0)], contender("student before", 119.0)) == []


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model whose configuration is a Python file, which says that it was run by raising."""
    folder = tmp_path / "with_code"
    folder.mkdir()
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokens", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokens", "auto_map": names}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\nraise SystemExit('run')\n")
    return folder


@pytest.mark.parametrize("role", ["teacher", "student", "export"])
def test_a_models_own_code_is_not_run_whatever_the_terminal_answers(
    role, options, with_code, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    config = tmp_path / "c.yaml"
    config.write_text(dump([options.models, options.data]))
    commands = {
        "export": ["export", str(with_code), "--to", "hf", "--output", str(tmp_path / "out")],
        "teacher": ["distill", str(config), "--teacher", str(with_code), "--output", str(tmp_path / "out")],
        "student": ["distill", str(config), "--student", str(with_code), "--output", str(tmp_path / "out")],
    }
    assert main(commands[role]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()
