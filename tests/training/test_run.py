"""The directory of a run: nothing in it is lost before a new run is whole, and nothing else than a run is replaced."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import transformers
import yaml

from fastkd.cli import main
from fastkd.training.configuration import dump
from fastkd.training.launcher import check_launch, started
from fastkd.training.options import InputError, TrainingOptions
from tests.training.conftest import changed, run
from tests.training.killed import in_child


@pytest.fixture
def options(options):
    return changed(options, max_steps=4, eval_steps=2, eval_windows=4, sample_tokens=0, cache_tokens=8)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where a run is kept that several tests start from."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def earlier(options, tmp_path, kept):
    """A finished run with a cache in it, and a note that someone left; what its directory holds."""
    out = tmp_path / "out"
    if not kept.exists():
        run(options, cache_dir=str(out / "cache"), ce_baseline=True, seed=1)
        (out / "notes").write_text("mine")
        out.rename(kept)
    shutil.copytree(kept, out)
    return content(out)


def without_weights(inputs, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    return {"teacher": str(tmp_path / "teacher")}


def knows_nothing(inputs, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    teacher.lm_head.weight.data.neg_()
    teacher.save_pretrained(tmp_path / "teacher")
    return {"teacher": str(tmp_path / "teacher")}


def no_report(*_, **__):
    raise OSError(28, "No space left on device")


def ctrl_c(*_, **__):
    raise KeyboardInterrupt


FAILURES = {
    "mistyped teacher": (lambda *_: {"teacher": "absent/at/all"}, InputError, None),
    "teacher without weights": (without_weights, InputError, None),
    "teacher that is no better": (knows_nothing, InputError, None),
    "cache of another temperature": (
        lambda _, path: {"temperature": 2.0, "cache_dir": str(path / "out" / "cache")},
        InputError,
        None,
    ),
    "adapters of no layer": (lambda *_: {"lora_rank": 2, "lora_targets": ["nonsense"]}, InputError, None),
    "loss that is no number": (lambda *_: {"learning_rate": 1e30, "eval_steps": 50}, FloatingPointError, None),
    "results that cannot be written": (lambda *_: {}, OSError, ("report.write", no_report)),
    "ctrl-c before the first step": (lambda *_: {}, KeyboardInterrupt, ("lessons.lessons_of", ctrl_c)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_leaves_the_earlier_one(options, inputs, tmp_path, monkeypatch, capsys, earlier, failure):
    settings, error, patch = FAILURES[failure]
    if "adapters" in failure:
        pytest.importorskip("peft")
    if patch:
        monkeypatch.setattr(f"fastkd.training.{patch[0]}", patch[1])
    with pytest.raises(error):
        run(options, overwrite=True, **settings(inputs, tmp_path))
    assert content(tmp_path / "out") == earlier
    if error is OSError:
        assert f"resume with fastkd distill {tmp_path / 'out.new' / 'config.yaml'} --resume" in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()} - {"out", "teacher"}
    # What was trained is not thrown away either, though its report failed.
    assert left == ({"out.new"} if error is OSError else set())


def test_a_new_run_replaces_what_a_run_wrote_and_nothing_else(options, tmp_path, earlier):
    (tmp_path / "out" / "eval").mkdir()  # not written by fastkd eval
    run(options, overwrite=True)
    out = tmp_path / "out"
    found = content(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {name: found[name] for name in found if name.startswith(("cache/", "notes"))} == {
        name: earlier[name] for name in earlier if name.startswith(("cache/", "notes"))
    }
    assert (out / "eval").is_dir()
    assert yaml.safe_load(found["config.yaml"])["seed"] == 0
    assert found["model.safetensors"] != earlier["model.safetensors"]
    assert "ce-only/model.safetensors" in earlier
    assert not (out / "ce-only").exists()
    assert not (out / "checkpoints").exists()
    transformers.AutoModelForCausalLM.from_pretrained(out)
    assert main(["eval", str(out)]) == 0
    run(options, overwrite=True, seed=2)  # and once more
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "notes").read_text() == "mine"


def test_the_same_command_with_a_cache_in_its_output_runs_again_and_again(options, tmp_path):
    """As `make demo` does; the cache is written once."""
    cache = tmp_path / "out" / "cache"
    written = []
    for seed in (1, 1):
        run(options, overwrite=True, cache_dir=str(cache), seed=seed)
        written.append({path.name: path.stat().st_mtime_ns for path in cache.iterdir()})
    assert written[0] == written[1]


def test_an_interrupted_replacement_is_resumed_beside(options, tmp_path, monkeypatch, earlier, capsys):
    from fastkd.training.commands import distill as module

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(module, "_as_long", ctrl_c)  # the student is trained, the one without a teacher is not
        with pytest.raises(KeyboardInterrupt) as interrupted:
            run(options, overwrite=True, ce_baseline=True)
    command = f"fastkd distill {tmp_path / 'out.new' / 'config.yaml'} --resume"
    assert command in str(interrupted.value)
    assert content(out) == earlier
    with pytest.raises(InputError, match=r"out\.new is an interrupted run.*rm -r"):  # its steps are not thrown away
        run(options, overwrite=True)
    assert content(out) == earlier
    assert main(command.split()[1:]) == 0
    assert f"saved to {out}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "notes").read_text() == "mine"
    assert json.loads((out / "metrics.json").read_text())["options"]["training"]["seed"] == 0
    run(options, output=str(tmp_path / "whole"), ce_baseline=True)
    for name in ("model.safetensors", "ce-only/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_anywhere_a_replacement_loses_neither_run(options, tmp_path, earlier):
    """At random file operations, most of them about the end, where directories are renamed."""
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "out", start)
    again = functools.partial(run, options, overwrite=True)
    operations = in_child(again, tmp_path)
    new = content(tmp_path / "out")["model.safetensors"]
    rng = random.Random(0)
    for kill_at in [*range(operations - 24, operations, 4), *rng.sample(range(operations - 24), 2)]:
        for path in tmp_path.glob("*out*"):
            shutil.rmtree(path)
        shutil.copytree(start, tmp_path / "out")
        assert in_child(again, tmp_path, kill_at) is None
        found = {path.name: content(path) for path in tmp_path.glob("*out*") if path.is_dir()}
        students = {files.get("model.safetensors") for files in found.values()}
        assert students & {earlier["model.safetensors"], new}
        assert sum("notes" in files for files in found.values()) == 1
        resumed = functools.partial(run, options, resume=True)
        with suppress(InputError):  # it was finished, and only had to take its place
            resumed() if "out.new" in found else again()
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "start"]
        after = content(tmp_path / "out")
        assert after["model.safetensors"] == new
        assert {name for name in after if name.startswith(("cache/", "notes"))} == {
            name for name in earlier if name.startswith(("cache/", "notes"))
        }


def test_files_in_the_way_of_the_results_cost_neither(options, tmp_path, earlier, capsys):
    """They lie in the earlier run, or came to lie in the new one's directory."""
    out = tmp_path / "out"
    (out / "sweep.png").write_text("mine")
    arguments = ["--alpha", "1", "--temperature", "1", "--output", str(out)]
    config = tmp_path / "config.yaml"
    config.write_text(dump(changed(options, max_steps=1)))
    assert main(["sweep", str(config), *arguments, "--overwrite"]) == 2
    assert "has files that no run wrote: sweep.png" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == earlier["model.safetensors"]
    assert (tmp_path / "out.new" / "results.csv").exists()
    (out / "sweep.png").rename(tmp_path / "mine.png")
    assert main(["sweep", str(config), *arguments, "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err
    assert (out / "results.csv").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "mine.png", "out"]


@pytest.mark.parametrize("name", ["out.new", ".out.replaced"])
def test_another_directory_of_its_names_is_in_the_way(options, tmp_path, earlier, name):
    run(options, output=str(tmp_path / name), max_steps=1)
    before = content(tmp_path)
    with pytest.raises(InputError, match="in the way"):
        run(options, overwrite=True)
    assert content(tmp_path) == before


@pytest.fixture
def project(tmp_path):
    """A directory that is no run, though it has a config.yaml."""
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (project / "config.yaml").write_text("{}")
    (project / "run.json").write_text('{"name": "someone\'s own"}')
    return project


@pytest.mark.parametrize("place", ["project", ".", "..", "home", "runs of others"])
def test_what_is_no_run_is_never_replaced(options, tmp_path, monkeypatch, project, place):
    (project / "inner").mkdir()
    outputs = {"project": str(project), ".": ".", "..": "..", "home": str(tmp_path / "home")}
    if place == "..":
        monkeypatch.chdir(project / "inner")
    elif place == ".":
        monkeypatch.chdir(project)
    shutil.copytree(project, tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"no earlier run|which is or holds"):
        run(options, overwrite=True, output=outputs.get(place, str(tmp_path)))
    assert content(tmp_path) == before


@pytest.mark.parametrize("place", ["current directory", "parent of it", "home directory", "parent of home"])
def test_a_run_that_is_in_use_as_a_directory_is_not_replaced(options, tmp_path, monkeypatch, place):
    out = tmp_path / "out"
    run(options)
    inner = out / "inner"
    inner.mkdir()
    taken = inner if "parent" in place else out
    if "home" in place:
        monkeypatch.setenv("HOME", str(taken))
    else:
        monkeypatch.chdir(taken)
    before = content(out)
    with pytest.raises(InputError, match="which is or holds"):
        run(options, overwrite=True)
    assert content(out) == before


def test_an_output_that_holds_an_input_is_not_replaced(options, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    run(options)
    for name in ("teacher", "text.txt", "student.json"):
        copy = shutil.copytree if (inputs / name).is_dir() else shutil.copy
        copy(inputs / name, out / name)
    before = content(out)
    for settings in (
        {"teacher": str(out / "teacher")},
        {"student": str(out)},
        {"student": str(out / "student.json")},
        {"data": str(out / "text.txt")},
        {"mix_data": ["elsewhere.txt", str(out / "text.txt")]},
        {"out_of_domain": str(out / "text.txt")},
    ):
        with pytest.raises(InputError, match=r"is in the output .*move it, or name another"):
            run(options, overwrite=True, **settings)
    assert main(["distill", str(out / "config.yaml"), "--overwrite"]) == 2
    assert "the configuration" in capsys.readouterr().err
    modes = {"peer": "mutual", "more_teachers": "mixture", "assistant": "frozen"}
    for name, mode in modes.items():  # a sweep takes them in a group of its own
        flags = ["--output", str(out), "--overwrite", "--teacher-mode", mode, f"--{name}", str(out / "teacher")]
        assert main(["sweep", *flags]) == 2
        assert f"{out / 'teacher'} is in the output" in capsys.readouterr().err
    for cache, message in ((out, "is the output"), (out / "checkpoints" / "cache", "the run's own")):
        for overwrite in (True, False):
            with pytest.raises(InputError, match=message):
                run(options, overwrite=overwrite, cache_dir=str(cache))
    assert content(out) == before


def test_an_output_that_fills_meanwhile_is_not_emptied(options, tmp_path, monkeypatch):
    from fastkd.training import setup as module

    out, gather = tmp_path / "out", module.gather

    def slow(options):
        found = gather(options)
        out.mkdir()
        (out / "thesis").write_text("the only copy")
        return found

    monkeypatch.setattr(module, "gather", slow)
    with pytest.raises(InputError, match="filled meanwhile"):
        run(options)
    assert content(out) == {"thesis": b"the only copy"}


def test_of_two_processes_one_is_refused_at_once(options, tmp_path):
    """The first is still reading its text."""
    from fastkd.training import setup as module

    told, tell = os.pipe()
    wait, go = os.pipe()
    first = os.fork()
    if first == 0:
        gather = module.gather

        def slow(options):
            os.write(tell, b"x")
            os.read(wait, 1)
            return gather(options)

        module.gather = slow
        try:
            run(options, seed=3)
            os._exit(0)
        finally:
            os._exit(1)
    os.read(told, 1)
    try:
        with pytest.raises(InputError, match=rf"written by process {first} on {socket.gethostname()}"):
            run(options, seed=4)
        with pytest.raises(InputError, match="written by process"):
            run(options, overwrite=True)
    finally:
        os.write(go, b"x")
        status = os.waitpid(first, 0)[1]
    assert status == 0
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_killed_process_is_free(options, tmp_path):
    assert in_child(functools.partial(run, options), tmp_path, kill_at=3) is None
    assert (tmp_path / ".out.lock").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run(options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


COMMANDS = ("distill", "cache", "eval", "sweep")
MET = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        *((name, {"WORLD_SIZE": "4"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set") for name in COMMANDS),
        ("distill", {**MET, "WORLD_SIZE": "4", "MASTER_PORT": ""}, "but MASTER_PORT is not set, so these processes"),
        ("distill", {"OMPI_COMM_WORLD_SIZE": "2"}, "(OMPI_COMM_WORLD_SIZE=2), started by a launcher that"),
        (
            "distill",
            {"OMPI_COMM_WORLD_SIZE": "4", "WORLD_SIZE": "1"},
            "(OMPI_COMM_WORLD_SIZE=4), started by a launcher",
        ),
        ("distill", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "env -u SLURM_STEP_NUM_TASKS fastkd"),
        ("distill", {**MET, "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4"}, "(SLURM_STEP_NUM_TASKS=4), started by a"),
        ("distill", {"WORLD_SIZE": " 4"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ("distill", {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is no number of processes"),
        ("distill", {"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', which is no number of processes"),
        ("sweep", {**MET, "WORLD_SIZE": "2"}, "(WORLD_SIZE=2), but fastkd sweep works in one"),
    ],
)
def test_processes_that_cannot_work_together_are_refused_before_any_work(
    tmp_path, monkeypatch, capsys, command, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("load_tokenizer", "teacher_config"):
        monkeypatch.setattr(f"fastkd.training.loading.{name}", lambda _: pytest.fail("work was begun"))
    arguments = {"cache": ["write"], "eval": ["somewhere"]}.get(command, [])
    output = [] if command == "eval" else ["--output", str(tmp_path / "out")]
    assert main([command, *arguments, *output]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "torchrun" in told
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),  # a script's one command
        ({"SLURM_NTASKS": "4", "WORLD_SIZE": ""}, 1),
        ({**MET, "WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "4"}, 8),  # a torchrun on each of four nodes
        ({**MET, "WORLD_SIZE": " 4"}, 4),
    ],
)
def test_processes_that_can_work_are_counted(monkeypatch, environment, processes):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch("distill", several=True)
    assert started() == processes


def test_a_directory_that_cannot_be_written_is_found_before_any_work(options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fastkd.training.setup.gather", lambda _: pytest.fail("text was read"))
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        run(options, output=str(tmp_path / "file" / "deep" / "out"))
    with pytest.raises(InputError, match="is a file"):
        run(options, output=str(tmp_path / "file"))


def test_a_tilde_is_the_home_directory_in_every_path(options, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "text.txt", "student.json"):
        copy = shutil.copytree if (inputs / name).is_dir() else shutil.copy
        copy(inputs / name, tmp_path / name)
    settings = {"teacher": "~/teacher", "student": "~/student.json", "data": "~/text.txt", "cache_dir": "~/cache"}
    (tmp_path / "more.txt").write_text("\n".join(line[::-1] for line in (inputs / "text.txt").read_text().splitlines()))
    settings |= {"out_of_domain": "~/text.txt", "mix_data": "~/more.txt"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"max_length": 16, "max_steps": 2, "device": "cpu", "output": "~/out"}))
    assert main(["distill", "~/config.yaml"]) == 0
    assert main(["eval", "~/out"]) == 0
    assert main(["cache", "info", "~/cache"]) == 0
    assert main(["export", "~/out", "--to", "hf", "--output", "~/exported"]) == 0
    write = ["cache", "write", "~/config.yaml", "--output", "~/other", "--max-length", "16"]
    assert main(write) == 0
    assert not (tmp_path / "~").exists()
    for name in ("out/eval/metrics.json", "cache/manifest.json", "exported/config.json", "other/manifest.json"):
        assert (tmp_path / name).exists()
    capsys.readouterr()
    with pytest.raises(InputError, match=r"output is '~nobody-of-that-name/out'.*no such home directory"):
        TrainingOptions(output="~nobody-of-that-name/out")
