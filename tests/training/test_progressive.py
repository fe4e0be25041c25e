"""One student teaches the next: stages are runs of their own, checked together, in processes that give memory back."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

from fastkd.cache.fingerprints import fingerprint
from fastkd.cli import main
from fastkd.training.commands import progressive as command
from fastkd.training.configuration import dump, load
from fastkd.training.options import InputError, ProgressiveOptions
from tests.training.conftest import STUDENT, changed


@pytest.fixture
def common(options, tmp_path):
    """What the stages share: short runs on little text, of which nothing is drawn."""
    settings = {"max_steps": 4, "eval_steps": 2, "eval_windows": 4, "sample_tokens": 0}
    return changed(options, **settings, output=str(tmp_path / "stages"))


@pytest.fixture
def asked(common, tmp_path):
    """Writes a file of stages, each a narrower student than its teacher; returns its path."""

    def write(*stages, **more):
        for width in (32, 16):
            config = {**STUDENT, "n_embd": width}
            (tmp_path / f"wide-{width}.json").write_text(json.dumps(config))
        shared = yaml.safe_load(dump(common)) | more
        stages = stages or (stage("first", 32), stage("second", 16))
        file = tmp_path / "stages.yaml"
        file.write_text(yaml.safe_dump({**shared, "stages": list(stages)}))
        return str(file)

    def stage(name, width, **options):
        return {"name": name, "student": str(tmp_path / f"wide-{width}.json"), **options}

    write.stage = stage
    return write


@pytest.fixture
def in_process(monkeypatch):
    """Stages run here, which takes a third of the time; returns their names, as they come."""
    ran = []

    class Process:
        def __init__(self, words):
            ran.append(words[-1] if words[-1] == "--resume" else os.path.basename(words[-1]).removesuffix(".yaml"))
            self.status = main(words[words.index("distill") :])

        def wait(self):
            return self.status

        poll = wait

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=Process))
    return ran


def rows_of(output):
    with (output / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_student_teaches_the_next(asked, inputs, tmp_path, capfd):
    """In processes of their own, as it is meant: what is in the files, what is shown, and who holds how much memory."""
    output = tmp_path / "stages"
    assert main(["progressive", asked(asked.stage("first", 32, tokens=300), asked.stage("second", 16))]) == 0
    rows = rows_of(output)
    assert [row["stage"] for row in rows] == ["first", "second"]
    # 300 tokens in steps of 8 windows of 16; the other has the common number of steps
    assert [(row["steps"], row["tokens"]) for row in rows] == [("3", "384"), ("4", "512")]
    taught_by = [str(inputs / "teacher"), str(output / "first")]
    assert [load(output / row["stage"] / "config.yaml")["teacher"] for row in rows] == taught_by
    # The teacher that a run was started on is the student that the one before has left, to the last bit of a weight.
    first = transformers.AutoModelForCausalLM.from_pretrained(output / "first").eval()
    assert first.config.n_embd == 32
    assert json.loads((output / "second" / "run.json").read_text())["inputs"]["teacher"] == fingerprint(first)
    assert rows[1]["teacher_parameters"] == rows[0]["parameters"] == str(first.num_parameters())
    # The second holds no more than the first, and what started them holds what it held.
    peaks, left = ([float(row[name]) for row in rows] for name in ("peak_mib", "left_mib"))
    assert min(peaks) > 100
    assert max(peaks) - min(peaks) < 64
    assert abs(left[1] - left[0]) < 16
    table, shown = (output / "progressive.md").read_text().splitlines(), capfd.readouterr().out
    assert table[0].startswith("| stage | parameters | tokens | val_loss |")
    for row, line in zip(rows, table[2:], strict=True):
        metrics = json.loads((output / row["stage"] / "metrics.json").read_text())
        hard = [
            line["eval_hard"]
            for line in metrics["training"]["student"]["history"]
            if line.get("eval_hard") and line["step"]
        ]
        assert float(row["val_loss"]) == pytest.approx(min(hard))
        assert float(row["perplexity"]) == pytest.approx(metrics["models"]["student"]["perplexity"])
        assert f"{min(hard):.4f}" in line
        assert f"{min(hard):.4f}" in shown
    assert (output / "progressive.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == [
        *("config.yaml", "first", "progressive.json", "progressive.md", "progressive.png", "results.csv", "run.json"),
        "second",
    ]
    assert main(["progressive", str(output / "config.yaml"), "--resume"]) == 2
    assert "is finished: there is nothing to resume" in capfd.readouterr().err


def test_students_made_of_their_teachers(asked, in_process, tmp_path):
    """Every second layer of the teacher, and every second of those."""
    output = tmp_path / "stages"
    stages = [{"name": "half", "student_layers": "every:2"}, {"name": "one", "student-layers": "last:1"}]
    assert main(["progressive", asked(*stages)]) == 0
    layers = [transformers.AutoConfig.from_pretrained(output / name).num_hidden_layers for name in ("half", "one")]
    assert layers == [2, 1]
    assert [row["student"] for row in rows_of(output)] == [
        f"layers {kept} of the teacher" for kept in ("every:2", "last:1")
    ]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "none", "student_layers": "0,9"}, "stage 'none'"),
        ({"name": "both", "student_layers": "every:2", "student": "x.json"}, "both"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused_before_the_first_stage(asked, in_process, stage, message, capsys):
    assert main(["progressive", asked(asked.stage("first", 32), stage)]) != 0
    assert message in capsys.readouterr().err
    assert not in_process


def test_a_stage_that_fails_is_resumed_and_the_finished_ones_are_not_run_again(
    asked, in_process, tmp_path, monkeypatch, capsys
):
    """From the configuration that the run keeps, elsewhere than where it was started; the end is the same."""
    from fastkd.training import trainer

    whole, output = tmp_path / "whole", tmp_path / "stages"
    file = asked(asked.stage("first", 32, tokens=512), asked.stage("second", 16))
    assert main(["progressive", file, "--output", str(whole)]) == 0
    original, fail = trainer.KDTrainer.training_step, {"at": 4 + 3}

    def failing(self, *arguments, **named):
        fail["at"] -= 1
        if fail["at"] == 0:
            raise RuntimeError("the device is lost")
        return original(self, *arguments, **named)

    in_process.clear()
    monkeypatch.setattr(trainer.KDTrainer, "training_step", failing)
    with pytest.raises(RuntimeError, match="the device is lost"):
        main(["progressive", file])
    assert f"fastkd progressive {output / 'config.yaml'} --resume" in capsys.readouterr().err
    assert in_process == ["first", "second"]
    before = (output / "first" / "model.safetensors").stat().st_mtime_ns
    assert main(["progressive", file, "--resume", "--learning-rate", "0.5"]) == 2
    assert "was started with other options" in capsys.readouterr().err
    in_process.clear()
    monkeypatch.chdir(tmp_path.parent)
    assert main(["progressive", str(output / "config.yaml"), "--resume"]) == 0
    assert in_process == ["--resume"]
    assert "stage 1 of 2, first: finished earlier" in capsys.readouterr().out
    assert (output / "first" / "model.safetensors").stat().st_mtime_ns == before
    for name in ("first", "second"):
        one, two = (
            transformers.AutoModelForCausalLM.from_pretrained(place / name).state_dict() for place in (whole, output)
        )
        assert all(torch.equal(weight, two[key]) for key, weight in one.items())
    timed = ("seconds", "peak_mib", "left_mib", "teacher")
    once, again = ([{k: v for k, v in row.items() if k not in timed} for row in rows_of(at)] for at in (whole, output))
    assert once == again


@pytest.mark.parametrize("at", ["first", "second"])
def test_an_interrupted_stage_is_resumed_where_it_was_moved_to(asked, inputs, in_process, tmp_path, monkeypatch, at):
    """On another device too; the stage's own file has the earlier place, and so has its teacher's."""
    from fastkd.training import report

    monkeypatch.chdir(inputs)
    output, moved, begun = tmp_path / "stages", tmp_path / "moved", asked(teacher="teacher")
    write = report.write

    def interrupted(staging, *given):
        if staging.parent.name == at:
            raise KeyboardInterrupt
        return write(staging, *given)

    with monkeypatch.context() as patched:
        patched.setattr(report, "write", interrupted)
        assert main(["progressive", begun]) == 130
    output.rename(moved)
    # The file that it was begun with has a relative teacher, the one that it has left an absolute one.
    file, place = begun if at == "first" else str(moved / "config.yaml"), str(moved)
    assert load(moved / at / "config.yaml")["device"] == "cpu"
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)  # auto is the processor here too
    assert main(["progressive", file, "--resume", "--output", place, "--device", "auto"]) == 0
    assert in_process[-1] == ("--resume" if at == "second" else "second")
    assert not output.exists()
    states = [json.loads((moved / name / "run.json").read_text()) for name in ("first", "second")]
    assert all(state["finished"] for state in states)
    used = json.loads((moved / at / "metrics.json").read_text())["options"]
    assert used["models"]["device"] == "auto"
    assert used["training"]["output"] == str(moved / at)


def test_stages_without_a_row_are_read_from_their_runs(asked, in_process, tmp_path, monkeypatch):
    """A process that dies after a stage, before its row is written, loses neither."""
    results, calls = command.training.run.Run.results, []

    def dying(self):
        calls.append(self.command)
        if calls.count("progressive") == 1:
            raise OSError("no space left on device")
        return results(self)

    file = asked(asked.stage("first", 32, tokens=512), asked.stage("second", 16))
    with monkeypatch.context() as patched:
        patched.setattr(command.training.run.Run, "results", dying)
        with pytest.raises(OSError, match="no space left"):
            main(["progressive", file])
        assert in_process == ["first"]
        assert main(["progressive", file, "--resume"]) == 0
    assert in_process == ["first", "second"]
    assert [row["stage"] for row in rows_of(tmp_path / "stages")] == ["first", "second"]


#: In the place of a stage: says in a file what has reached it.
CHILD = """
import pathlib, signal, sys, time
told = pathlib.Path(sys.argv[1])
def note(number, frame):
    told.write_text(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
told.write_text("ready")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "to_both", "raised"), [(signal.SIGINT, True, KeyboardInterrupt), (signal.SIGTERM, False, SystemExit)]
)
def test_signals_end_the_stage_too(common, tmp_path, monkeypatch, number, to_both, raised):
    """Ctrl-C reaches both processes, and the stage is waited for; SIGTERM reaches one, and is passed on."""
    told, started = tmp_path / "told", []

    def start(_):
        started.append(subprocess.Popen([sys.executable, "-c", CHILD, str(told)]))
        return started[0]

    def send():
        while not told.exists() or told.read_text() != "ready":
            time.sleep(0.02)
        if to_both:
            os.kill(started[0].pid, number)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=start))
    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(raised):
        command._distill(common, "first", tmp_path)
    sender.join()
    assert started[0].poll() is not None
    assert told.read_text() == number.name
    assert signal.getsignal(signal.SIGTERM) == before


BAD = [
    ({"temperature": 0}, "stage 'second': temperature is 0.0"),
    ({"temperatur": 2}, "stage 'second': it has an unknown key 'temperatur'; did you mean 'temperature'?"),
    ({"teacher": "gpt2"}, "stage 'second': teacher is of the whole run: give it beside 'stages'"),
    ({"output_": 1}, "stage 'second': it has an unknown key 'output_'"),
    ({"resume": True}, "stage 'second': resume is of the whole run"),
    ({"tokens": 0}, "stage 'second' has tokens 0; it must be a whole number of at least 1"),
    ({"tokens": "many"}, "stage 'second' has tokens 'many'"),
    ({"tokens": 100, "epochs": 2}, "stage 'second': it has both tokens and epochs: give one"),
    ({"name": "a/b"}, "stage 2 has the name 'a/b'; it must be letters"),
    ({"name": "results"}, "stage 2 has the name 'results'"),
    ({"name": "First"}, "two stages are named First and first"),
    ({"student": "stages.yaml"}, "stage 'second': cannot load the student's configuration"),
    ({"data": "absent.txt"}, "stage 'second': "),
    ({"batch_size": 10_000}, "stage 'second': "),
    ({"max_length": 24}, "stage 'second': max_length 24 is more than the student's 16 positions"),
    ({"lora_rank": 4, "lora_targets": ["nowhere"]}, "stage 'second': "),
    ({"teacher_mode": "snapshot"}, "4 steps in 1 epoch(s), and a snapshot is taken at each epoch's end"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message for _, message in BAD])
def test_all_stages_are_checked_before_the_first(asked, in_process, tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    second = asked.stage("second", 16)
    assert main(["progressive", asked(asked.stage("first", 32), {**second, **wrong})]) == 2
    assert message in capsys.readouterr().err
    assert not in_process
    assert {path.name for path in tmp_path.iterdir()} - set(before) <= {
        "stages.yaml",
        *map("wide-{}.json".format, (16, 32)),
    }


def test_files_that_are_no_stages(asked, tmp_path, capsys):
    for stages, message in (
        ("many", "stages is 'many'; it must be a list of mappings"),
        ([3], "stage 1 is 3; it must be a mapping"),
        ([], "there are no stages"),
        ([{"student": "s.json"}], "stage 1 has the name None"),
    ):
        file = tmp_path / "bad.yaml"
        file.write_text(yaml.safe_dump({"stages": stages}))
        assert main(["progressive", str(file)]) == 2
        assert message in capsys.readouterr().err
    assert main(["progressive", asked(), "--overwrite"]) == 2
    assert "does not replace an earlier one" in capsys.readouterr().err
    assert main(["progressive", asked(), "--tokens", "0"]) == 2
    assert "tokens is 0; it must be at least 1" in capsys.readouterr().err
    assert main(["distill", asked()]) == 2
    assert "unknown key 'stages'" in capsys.readouterr().err


def test_options_of_a_stage_stand_over_the_common_ones(common, tmp_path):
    """What excludes an option goes with it; what was understood is understood in the same way again."""
    common = changed(
        common,
        max_steps=None,
        soft_weight=0.9,
        hard_weight=0.1,
        temperature_schedule="linear",
        final_temperature=2.0,
        cache_dir=str(tmp_path / "cache"),
        cache_format="dense",
    )
    given = [
        {"name": "plain"},
        {"name": "alpha", "alpha": 0.9, "alpha-on": "hard", "num_train_epochs": 2},
        {
            "name": "soft",
            "training": {"soft_weight": 0.5},
            "temperature_schedule": "constant",
            "final_temperature": None,
        },
        {"name": "steps", "max_steps": 7, "cache_dir": ""},
        {"name": "long", "tokens": 1025, "gradient_accumulation_steps": 2},
        {"name": "passes", "epochs": 3},
    ]
    asked = ProgressiveOptions(stages=[json.dumps(one) for one in given], tokens=512)
    stages = command.stages_of(common, asked)
    plain, alpha, soft, steps, long, passes = (stage.options for stage in stages)
    assert (plain.training.epochs, plain.training.max_steps) == (None, 4)
    assert plain.distillation.cache_dir == str(tmp_path / "cache" / "plain")
    assert (alpha.training.epochs, alpha.training.max_steps) == (2.0, None)
    assert alpha.distillation.weights == (pytest.approx(0.1), pytest.approx(0.9))
    assert soft.distillation.weights == (0.5, 0.1)
    assert soft.distillation.final_temperature is None
    assert (steps.training.max_steps, steps.distillation.cache_dir) == (7, "")
    assert long.training.max_steps == 5  # of 256 tokens
    assert (passes.training.epochs, passes.training.max_steps) == (3.0, None)
    kept = [json.dumps(command._own(stage, common)) for stage in stages]
    assert command.stages_of(common, ProgressiveOptions(stages=kept)) == stages


@pytest.mark.parametrize(("length", "message"), [({"epochs": 7}, "epochs is 7"), ({"max_steps": 3}, "max_steps is 3")])
def test_common_tokens_beside_another_length_are_refused(options, length, message):
    common = changed(options, **{"max_steps": None, **length})
    with pytest.raises(InputError, match=f"tokens is 512 and {message}"):
        command.stages_of(common, ProgressiveOptions(stages=['{"name": "one"}'], tokens=512))


def test_the_validation_before_training_is_of_no_checkpoint():
    """Its weights are not what a training ends with, however good they were."""
    history = [{"step": 0, "eval_hard": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "eval_hard": 1.5}]
    assert command._val_loss([*history, {"step": 4, "eval_hard": 1.25}]) == 1.25


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("exit 2", InputError, "stage 'first' cannot be done"),
        ("exit 130", KeyboardInterrupt, "^$"),
        ("kill -9 $$", ChildProcessError, "stage 'first' was killed by signal 9"),
        ("exit 1", ChildProcessError, "stage 'first' ended with status 1"),
    ],
)
def test_a_stage_that_ends_badly_is_an_error(common, tmp_path, monkeypatch, script, kind, message):
    started = SimpleNamespace(Popen=lambda _: subprocess.Popen(["/bin/sh", "-c", script]))
    monkeypatch.setattr(command, "subprocess", started)
    with pytest.raises(kind, match=message):
        command._distill(common, "first", tmp_path)
