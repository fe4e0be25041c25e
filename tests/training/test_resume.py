"""A run that was interrupted, killed or damaged is resumed to the same weights, or refused with a reason."""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastkd.cli import main
from fastkd.training.options import InputError
from tests.training.conftest import STUDENT, changed, run
from tests.training.killed import in_child


@pytest.fixture
def options(options, tmp_path):
    """A run of 7 steps with checkpoints at 3, 6 and 7, of a student whose dropout draws random numbers."""
    student = {**STUDENT, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    (tmp_path / "student.json").write_text(json.dumps(student))
    return changed(
        options,
        student=str(tmp_path / "student.json"),
        max_steps=7,
        eval_steps=3,
        logging_steps=1,
        eval_windows=4,
        sample_tokens=2,
        batch_size=32,  # 7 batches an epoch
    )


def outcome(directory):
    """The student's weights, bit for bit, and what is told of its training."""
    weights = {name: weight.numpy().tobytes() for name, weight in load_file(directory / "model.safetensors").items()}
    metrics = json.loads((directory / "metrics.json").read_text())
    training = metrics["training"]["student"]
    losses = [(line["step"], line["loss"]) for line in training["history"] if "loss" in line]
    validations = [(line["step"], line["eval_hard"]) for line in training["history"] if "eval_hard" in line]
    return weights, losses, validations, training["steps"], (directory / "samples.md").read_text()


def interrupt_after(monkeypatch, step):
    """Ctrl-C during a step of the training."""
    from fastkd.training.trainer import KDTrainer

    original = KDTrainer.compute_loss

    def compute_loss(self, *arguments, **settings):
        if self.state.global_step + 1 == step and self.model.training:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(KDTrainer, "compute_loss", compute_loss)


@pytest.fixture(scope="module")
def kept():
    """Results that several tests compare with."""
    return {}


@pytest.fixture
def whole(options, tmp_path, kept):
    """What comes of a run that was not interrupted."""
    if not kept:
        run(options, output=str(tmp_path / "whole"))
        kept["whole"] = outcome(tmp_path / "whole")
    return kept["whole"]


def test_killed_anywhere_and_resumed_it_ends_with_the_same_weights(options, tmp_path):
    """At random file operations, again and again until the run ends. One that had not begun is started anew."""
    whole = tmp_path / "whole"
    operations = in_child(lambda: run(options, output=str(whole)), whole)
    assert operations > 40
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 6:
        out = tmp_path / f"out{(runs := runs + 1)}"
        attempt = functools.partial(run, options, output=str(out))
        while in_child(attempt, out, rng.randrange(operations)) is None:
            kills += 1
            begun = (out / "config.yaml").exists()
            attempt = functools.partial(run, options, output=str(out), resume=begun)
            if not begun:
                shutil.rmtree(out, ignore_errors=True)
        assert outcome(out) == outcome(whole)
        assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("step", [1, 4, 7])
def test_ctrl_c_and_resume_is_bit_for_bit(options, tmp_path, monkeypatch, step, whole):
    with monkeypatch.context() as patched:
        interrupt_after(patched, step)
        with pytest.raises(KeyboardInterrupt, match=r"saved: resume with fastkd distill .*config\.yaml --resume"):
            run(options)
    assert main(["distill", str(tmp_path / "out" / "config.yaml"), "--resume"]) == 0
    assert outcome(tmp_path / "out") == whole


def stopped(options, monkeypatch, step=5):
    """A run that ended with Ctrl-C; its checkpoints, first to last."""
    with monkeypatch.context() as patched:
        interrupt_after(patched, step)
        with pytest.raises(KeyboardInterrupt):
            run(options)
    checkpoints = (path for path in (Path(options.training.output) / "checkpoints" / "student").glob("checkpoint-*"))
    return sorted(checkpoints, key=lambda path: path.name)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_not_resumed(options, tmp_path, monkeypatch, capsys, whole, name):
    """The one before is, to the same weights."""
    *_, before, last = stopped(options, monkeypatch)
    assert (before.name, last.name) == ("checkpoint-3", "checkpoint-5")
    (last / name).unlink()
    capsys.readouterr()
    run(options, resume=True)
    assert outcome(tmp_path / "out") == whole
    shown = capsys.readouterr().out
    assert f"{last} is not whole ({name} is missing)" in shown
    assert f"resumed from {before}" in shown


def test_checkpoints_are_known_to_be_whole(options, tmp_path, monkeypatch, capsys):
    """Files that are missing, cut or altered; a best checkpoint that is."""
    from fastkd.training.checkpoints import last_whole

    *_, before, last = stopped(options, monkeypatch)
    names = sorted(path.name for path in last.iterdir())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} < {*names}

    def altered(content):
        return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]

    for number, (name, damage) in enumerate(itertools.product(names, (None, lambda found: found[:-3], altered))):
        copy = tmp_path / str(number)
        shutil.copytree(last.parent, copy)
        file = copy / last.name / name
        file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
        assert last_whole(copy) == copy / before.name
        assert not (copy / last.name).exists()
    assert last_whole(last.parent) == last
    (before / "model.safetensors").unlink()  # the best so far, which the end of the training needs
    assert last_whole(last.parent) is None
    assert "its best one, checkpoint-3, is not: model.safetensors is missing" in capsys.readouterr().out


def test_without_a_whole_checkpoint_training_starts_again(options, tmp_path, monkeypatch, capsys, whole):
    for checkpoint in stopped(options, monkeypatch):
        (checkpoint / "optimizer.pt").unlink()
    run(options, resume=True)
    assert "no checkpoint is whole" in capsys.readouterr().out
    assert outcome(tmp_path / "out") == whole


def test_text_that_changed_is_not_resumed_on(options, inputs, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes((inputs / "text.txt").read_bytes())
    options = changed(options, data=str(text))
    stopped(options, monkeypatch)
    documents = text.read_text().splitlines()
    text.write_text("\n".join(documents[1:]))
    config = str(tmp_path / "out" / "config.yaml")
    capsys.readouterr()
    assert main(["distill", config, "--resume"]) == 2
    told = capsys.readouterr().err
    assert "train text" in told
    assert "changed after the run" in told
    assert "--overwrite" in told
    text.write_text("\n".join(documents))
    assert main(["distill", config, "--resume"]) == 0


def test_a_teacher_or_student_that_changed_is_not_resumed_on(options, inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    options = changed(options, teacher=str(tmp_path / "teacher"))
    stopped(options, monkeypatch)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight *= 1.5
    teacher.save_pretrained(tmp_path / "teacher")
    settings = json.loads((tmp_path / "student.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps({**settings, "n_head": 4}))
    with pytest.raises(InputError, match="the teacher and the student changed after the run"):
        run(options, resume=True)


def test_early_stopping_keeps_its_count(options, tmp_path, monkeypatch):
    """Interrupted between two validations without progress, it stops where the whole training does."""
    options = changed(
        options, max_steps=40, eval_steps=2, early_stopping_patience=2, learning_rate=0.3, scheduler="constant"
    )
    whole = run(options, output=str(tmp_path / "whole"))["training"]["student"]["steps"]
    assert 4 < whole < 40
    stopped(options, monkeypatch, step=whole - 1)
    resumed = run(options, resume=True)
    assert resumed["training"]["student"]["steps"] == whole
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
