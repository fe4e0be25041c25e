"""Where options point to: the same from any directory, and found to be unwritable before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastkd.cli import main
from fastkd.training.commands.sweep import SweepOptions
from fastkd.training.configuration import dump
from fastkd.training.options import DataOptions, InputError, ModelOptions, TeachingOptions, TrainingOptions
from fastkd.training.places import anchored, check_writable
from tests.training.conftest import changed, run


def test_paths_are_kept_absolute_and_names_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a")
    assert anchored(DataOptions(data="text.txt")).data == str(tmp_path / "text.txt")
    assert anchored(DataOptions(data="user/dataset")).data == "user/dataset"
    mixed = anchored(DataOptions(data="user/dataset", mix_data=["user/other", "text.txt"]))
    assert mixed.mix_data == ["user/other", str(tmp_path / "text.txt")]
    assert anchored(TrainingOptions(output="runs/new")).output == str(tmp_path / "runs" / "new")
    models = ModelOptions(teacher="gpt2")
    assert anchored(models) is models
    assert anchored(SweepOptions(assistant="text.txt")).assistant == str(tmp_path / "text.txt")
    teaching = anchored(TeachingOptions(teacher_mode="mixture", more_teachers=["user/model", "text.txt"]))
    assert teaching.more_teachers == ["user/model", str(tmp_path / "text.txt")]


def test_every_one_of_several_teachers_may_be_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    found = TeachingOptions(teacher_mode="mixture", more_teachers=["~/one", "user/model", "~/two"])
    assert found.more_teachers == ["/home/of/one", "user/model", "/home/of/two"]


def test_a_run_is_resumed_and_judged_from_any_directory(options, inputs, tmp_path, monkeypatch, capsys):
    """Started with relative paths in one directory, interrupted, and gone on with from another."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(inputs)
    relative = changed(
        options,
        teacher="teacher",
        student="student.json",
        data="text.txt",
        output=os.path.relpath(tmp_path / "out"),
        max_steps=4,
        eval_steps=2,
        eval_windows=4,
        sample_tokens=0,
    )
    with monkeypatch.context() as patched:
        patched.setattr("fastkd.training.report.write", _interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(relative)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["distill", str(tmp_path / "out" / "config.yaml"), "--resume"]) == 0
    assert main(["eval", str(tmp_path / "out")]) == 0
    assert not any(Path().iterdir())


def _interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def forbidden(tmp_path: Path) -> Path:
    """A directory to write into which fails, for root too: one below a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "new"


def test_what_can_be_written_is_left_alone(tmp_path: Path, forbidden: Path) -> None:
    check_writable(str(tmp_path / "a" / "b"), "output")
    check_writable(str(tmp_path / "file"), "plot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    with pytest.raises(InputError, match=r"output is .*new', but nothing can be written there"):
        check_writable(str(forbidden), "output")


def _no_work(*_, **__):
    raise AssertionError("work was begun")


@pytest.mark.parametrize("command", ["export", "cache write", "inspect-teacher", "distill"])
def test_a_place_that_cannot_be_written_is_found_before_any_work(
    command, options, inputs, tmp_path, monkeypatch, capsys, forbidden
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", _no_work)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", _no_work)
    config = tmp_path / "c.yaml"
    config.write_text(dump([options.models, options.data]))
    arguments = {
        "export": ["export", str(inputs / "teacher"), "--to", "hf", "--output", str(forbidden)],
        "cache write": ["cache", "write", str(config), "--output", str(forbidden)],
        "inspect-teacher": [
            "inspect-teacher",
            "--teacher",
            str(inputs / "teacher"),
            "--plot",
            str(forbidden / "a.png"),
        ],
        "distill": ["distill", str(config), "--output", str(forbidden)],
    }
    assert main(arguments[command]) == 2
    assert str(forbidden.parent) in capsys.readouterr().err
