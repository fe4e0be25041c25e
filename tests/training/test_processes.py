"""The commands in two processes: the losses, the cache and the report of one; one voice; no process waits for ever."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader, IterableDataset

import fastkd
from fastkd.cli import main
from fastkd.training.configuration import dump
from fastkd.training.options import InputError, Options
from tests.processes import run as in_processes
from tests.training.conftest import CONTEXT, changed, run, short_run
from tests.training.test_sharding import SHARDED
from tests.training.test_trainer import LENGTH, VOCAB, Ragged, collate, logged, teacher, trainer, windows
from tests.training.test_trainer import model as small

QUICK = {
    "eval_steps": 25,
    "logging_steps": 1,
    "sample_tokens": 2,
    "bf16": False,
    "eval_windows": 5,
    "eval_batch_size": 2,
}


def launched(rank: int, world: int = 2) -> dist.Store:
    """Make this process one of torchrun's; returns the store that it has met the others by."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [None if store is None else store.port]
    dist.broadcast_object_list(port, 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port[0]), OMP_NUM_THREADS="1")
    return store


def said(case, *arguments):
    """(status or error, what was printed, also as an error) of the command."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = case  # each case tells of an error of its own
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    return status, out.getvalue(), err.getvalue()


def commands(rank, folder, options):
    """What the cases come to, by their names."""
    store, patch = launched(rank), pytest.MonkeyPatch()
    patch.setattr("fastkd.training.report_page.inline_svg", lambda *_: "")
    found = {}

    def config(name, **values):
        path = pathlib.Path(folder, f"{name}-{rank}.yaml")
        path.write_text(dump(changed(options, output=f"{folder}/{name}", **values)))
        return str(path)

    whole = {"max_steps": 50, "batch_size": 4, **QUICK}
    with patch.context() as here:
        found["forwards"] = counted(here)
        found["whole"] = said("whole", "distill", config("whole", **whole))
        found["eval"] = said("eval", "eval", f"{folder}/whole", "--eval-windows", "4")
    short = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 2, **QUICK}
    cached = {"cache_dir": f"{folder}/cache", "ce_baseline": True, "terms": ["multi_token"]}
    found["cached"] = said("cached", "distill", config("cached", **short, **cached))

    for mode in MODES:
        found[mode] = said(mode, "distill", config(mode, **short, teacher_mode=mode))
    with patch.context() as here:
        small_teacher(here, options)
        found["train"] = said("train", "distill", config("train", **{**short, "max_steps": 20}, teacher="train"))

    with patch.context() as alone:
        if rank == 1:
            alone.setattr("fastkd.training.loading.load_teacher", no_room)
        found["one fails"] = said("one fails", "distill", config("failed", **short))
    with patch.context() as alone:
        if rank == 1:
            alone.setattr("fastkd.training.judge.predict", no_room)
        found["one cannot judge"] = said("one cannot judge", "distill", config("failed", **short))
    found["lora"] = said("lora", "distill", config("lora", **short, lora_rank=2))
    found["all fail"] = said("all fail", "distill", config("failed", **short, learning_rate=1e30))
    found["nobody can"] = said("nobody can", "distill", config("failed", **short, max_length=4000))

    with patch.context() as alone:
        if rank == 1:
            alone.setattr("fastkd.training.trainer.KDTrainer.training_step", interrupting(7))
        found["interrupted"] = said("interrupted", "distill", config("stopped", **whole))
    if rank == 0:
        shutil.copytree(f"{folder}/stopped", f"{folder}/kept")
    found["resumed"] = said("resumed", "distill", config("stopped", **whole), "--resume")
    found["trained"] = batches(rank, f"{folder}/trainers")
    settings = {"max_steps": 50, "batch_size": 4, **QUICK, "ce_baseline": True}
    with patch.context() as here:
        as_on_gpus(here)
        found["refused"] = said("refused", "distill", config("none", **settings))
        here.setattr("fastkd.training.setup.check_sharding", lambda *_: None)
        teachers = weighed(here)
        found["sharded"] = said("sharded", "distill", config("sharded", **settings))
        found["teachers"] = [(before, parts_of(model)) for before, model in teachers]
    patch.undo()
    dist.barrier()
    del store
    return found


def counted(patch):
    """The sizes of the batches that models are judged on, once there are some."""
    found, project = [], fastkd.project

    def projected(model, **inputs):
        found.append(tuple(inputs["input_ids"].shape))
        return project(model, **inputs)

    patch.setattr("fastkd.training.evaluation.fastkd", types.SimpleNamespace(**{**vars(fastkd), "project": projected}))
    return found


#: Teachers that learn, and that follow the student.
MODES = ("mutual", "ema")


def small_teacher(patch, options):
    """The one that is trained first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.models.teacher)
    patch.setattr("fastkd.training.loading.gpt2_tokenizer", lambda: tokenizer)
    size = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 1, "n_head": 2}
    patch.setattr("fastkd.training.loading._TRAINED", size)


#: While a model is loaded, and while the others wait for what it says of its windows.
ONE_FAILS = ("one fails", "one cannot judge")


def no_room(*_):
    raise InputError("there is no room for the teacher")


def interrupting(at):
    from fastkd.training.trainer import KDTrainer

    original, calls = KDTrainer.training_step, []

    def step(*given, **named):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return original(*given, **named)

    return step


def losses(directory, name="student"):
    history = json.loads((directory / "metrics.json").read_text())["training"][name]["history"]
    return [line["loss"] for line in history if "loss" in line]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def parts_of(model):
    """Bytes of a model's parameters in this process."""
    weights = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters())
    return sum(weight.nbytes for weight in weights)


def weighed(patch):
    """Teachers and their bytes before they are sharded, once there are some."""
    from fastkd.training.beside import shard_frozen

    found = []

    def sharded(model, accelerator):
        found.append((parts_of(model), model))
        shard_frozen(model, accelerator)

    patch.setattr("fastkd.training.beside.shard_frozen", sharded)
    return found


def as_on_gpus(patch):
    """Processes on the CPU are sharded by accelerate where it thinks that they are on GPUs."""
    from accelerate.state import DistributedType, PartialState

    patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
    original = PartialState.__init__
    patch.setattr(PartialState, "__init__", lambda self, cpu=False, **more: original(self, **more))
    patch.delenv("ACCELERATE_USE_CPU")
    policy = {"ACCELERATE_TORCH_DEVICE": "cpu", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    for name, value in {**SHARDED, **policy}.items():
        patch.setenv(name, value)


def test_a_sharded_student(done, tmp_path):
    """The losses of one process with a teacher in two halves; what is saved and judged is whole."""
    short = {"max_steps": 50, "batch_size": 8, **QUICK, "ce_baseline": True}
    expected = run(done.options, output=str(tmp_path / "one"), **short)
    assert "FSDP, which it uses on GPUs alone" in done.first["refused"][2]
    assert done.first["sharded"][0] == 0, done.first["sharded"]
    found = done.folder / "sharded"
    for name in ("student", "CE-only student"):
        assert losses(found, name) == pytest.approx(losses(tmp_path / "one", name), rel=1e-5)
    for one in done[2:]:
        ((whole, part),) = one["teachers"]
        assert part == pytest.approx(whole / 2, rel=0.02)
    metrics = json.loads((found / "metrics.json").read_text())
    assert metrics["models"]["teacher"] == expected["models"]["teacher"]
    assert metrics["models"]["student"]["kl"] == pytest.approx(expected["models"]["student"]["kl"], rel=1e-4)
    saved = transformers.AutoModelForCausalLM.from_pretrained(found)
    assert saved.num_parameters() == expected["models"]["student"]["parameters"]


class Stream(IterableDataset):
    """Examples of another number of labels each, without end."""

    def __iter__(self):
        examples = Ragged(windows())
        while True:
            yield from (examples[number] for number in range(32))


class Taught:
    """A collator that brings the teacher's likeliest tokens."""

    def __init__(self, kind):
        self.kind, self.teacher = kind, teacher()

    @torch.no_grad()
    def __call__(self, examples):
        batch = collate(examples)
        rows = self.teacher(batch["input_ids"]).logits.div(2.0).log_softmax(-1)
        top = rows.topk(5)
        more = {"rest": torch.log1p(-top.values.exp().sum(-1))} if self.kind == "ghost" else {}
        return {**batch, "teacher": fastkd.SparseTargets(top.indices, top.values, self.kind, 2.0, **more)}


def trained(folder, rows, kind):
    """The losses of 50 steps of `rows` rows from a stream with what a cache would hold, and from a live teacher."""
    found = []
    for settings in (
        {"data": Stream(), "data_collator": Taught(kind), "max_steps": 50},
        {"teacher": teacher(), "max_steps": 50, "gradient_accumulation_steps": 2},
    ):
        one = trainer(folder, small(0), per_device_train_batch_size=rows, max_grad_norm=1.0, **settings)
        one.train()
        found += [logged(one, name) for name in ("loss", "soft", "hard")]
    return found


def batches(rank, folder):
    """What trainers and loaders of accelerate make of sparse targets."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, concatenate, send_to_device, slice_tensors

    os.environ["ACCELERATE_USE_CPU"] = "true"
    found = trained(folder, 4, "ghost")
    examples = [Ragged(windows())[number] for number in range(16)]
    taught = Taught("ghost")
    whole = taught(examples[:8])["teacher"]
    for split in (False, True):
        settings = DataLoaderConfiguration(dispatch_batches=True, split_batches=split)
        accelerator = Accelerator(cpu=True, dataloader_config=settings)
        loader = accelerator.prepare(DataLoader(examples, 8 if split else 4, collate_fn=taught))
        mine = next(iter(loader))["teacher"]
        assert mine.ids.shape == (4, LENGTH, 5)
        part = slice_tensors({"teacher": whole}, slice(4 * rank, 4 * rank + 4))["teacher"]
        together = accelerator.gather({"teacher": mine})["teacher"]
        joined = concatenate([{"teacher": whole}, {"teacher": whole}])["teacher"]
        for one, other in ((mine, part), (together, whole), (slice_tensors(joined, slice(8, 16)), whole)):
            assert (one.kind, one.temperature) == ("ghost", 2.0)
            for name in ("ids", "logprobs", "rest"):
                assert torch.equal(getattr(one, name), getattr(other, name))
        assert send_to_device({"teacher": mine}, torch.device("meta"))["teacher"].device.type == "meta"
    return found


class Done(NamedTuple):
    """What came of `commands` in the two processes."""

    options: Options
    folder: pathlib.Path
    first: dict[str, Any]
    second: dict[str, Any]


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    options = short_run(inputs, folder / "out")
    return Done(options, folder, *in_processes(2, commands, str(folder), options))


def test_the_losses_and_the_judgement_are_those_of_one(done, tmp_path):
    expected = run(done.options, output=str(tmp_path / "one"), max_steps=50, batch_size=8, **QUICK)
    assert done.first["whole"][0] == done.first["eval"][0] == 0, done.first["whole"]
    assert losses(done.folder / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(done.folder / "whole")) == 50
    metrics = json.loads((done.folder / "whole" / "metrics.json").read_text())
    assert metrics["training"]["student"]["tokens"] == expected["training"]["student"]["tokens"]
    assert metrics["models"]["student before"] == expected["models"]["student before"]
    assert metrics["models"]["student"]["kl"] == pytest.approx(expected["models"]["student"]["kl"], rel=1e-4)
    # Of 5 windows in batches of 2: the teacher, the student before and after. Of 4 for eval: the teacher, the student.
    assert done.first["forwards"] == [(2, 16), (1, 16)] * 3 + [(2, 16)] * 2
    assert done.second["forwards"] == [(2, 16)] * 5
    eval_folder = done.folder / "whole" / "eval"
    assert {path.name for path in (tmp_path / "one").iterdir()} | {"eval"} == {
        path.name for path in (done.folder / "whole").iterdir()
    }
    judged = json.loads((eval_folder / "metrics.json").read_text())["models"]
    assert main(["eval", str(done.folder / "whole"), "--eval-windows", "4"]) == 0
    assert json.loads((eval_folder / "metrics.json").read_text())["models"] == judged


def test_a_cache_terms_accumulation_and_the_labels_alone(done, tmp_path):
    settings = {"max_steps": 4, "batch_size": 8, "gradient_accumulation_steps": 2, **QUICK}
    cached = {"cache_dir": str(tmp_path / "cache"), "ce_baseline": True, "terms": ["multi_token"]}
    run(done.options, output=str(tmp_path / "one"), **settings, **cached)
    assert done.first["cached"][0] == 0, done.first["cached"]
    for name in ("student", "CE-only student"):
        assert losses(done.folder / "cached", name) == pytest.approx(losses(tmp_path / "one", name), rel=1e-5)
    assert contents(done.folder / "cache") == contents(tmp_path / "cache")


def test_teachers_that_learn_and_one_that_is_trained_first(done, tmp_path, monkeypatch):
    small_teacher(monkeypatch, done.options)
    settings = {"max_steps": 4, "batch_size": 8, "gradient_accumulation_steps": 2, **QUICK}
    more = [(mode, {"teacher_mode": mode}) for mode in MODES]
    for name, values in [*more, ("lora", {"lora_rank": 2}), ("train", {"teacher": "train", "max_steps": 20})]:
        run(done.options, output=str(tmp_path / name), **{**settings, **values})
        assert done.first[name][0] == 0, done.first[name]
        assert losses(done.folder / name) == pytest.approx(losses(tmp_path / name), rel=1e-5)
        assert names(done.folder / name) == names(tmp_path / name)


def names(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_one_process_tells_of_an_error(done):
    """The one that failed alone, or one of those that failed alike; the others print nothing, and end as it does."""
    for case in ONE_FAILS:
        (status, _, told), (same, _, silent) = done.second[case], done.first[case]
        assert (status, told) == (2, "fastkd: error: there is no room for the teacher\n")
        assert same == 2
        assert "no room" not in silent
    both = sorted(str(found["all fail"][0]) for found in done[2:])
    assert both[0] == "1"
    assert both[1].startswith("FloatingPointError: the loss is")
    assert done.first["nobody can"][0] == done.second["nobody can"][0] == 2
    assert "max_length 4000 is more than" in done.first["nobody can"][2]
    assert not (done.folder / "failed").exists()
    for name, (_, out, err) in ((name, said) for name, said in done.second.items() if isinstance(said, tuple)):
        assert out == ""
        assert name in (*ONE_FAILS, "all fail") or err == ""


def test_all_stop_after_one_step_and_resume(done):
    """Where one was interrupted; as if they had not been. Another number of processes would see other batches."""
    assert done.first["interrupted"][0] == done.second["interrupted"][0] == 130
    assert "resume with fastkd distill" in done.first["interrupted"][2]
    assert losses(done.folder / "stopped") == losses(done.folder / "whole")
    with pytest.raises(InputError, match="the number of processes changed after the run"):
        run(done.options, output=str(done.folder / "kept"), resume=True, max_steps=50, batch_size=4, **QUICK)


def test_sparse_targets_travel_between_processes(done, tmp_path):
    """Over 50 steps of rows with other numbers of labels the losses are those of one process."""
    expected = trained(tmp_path, 8, "ghost")
    for found in done[2:]:
        for values, wanted in zip(found["trained"], expected, strict=True):
            assert len(values) == 50
            assert values == pytest.approx(wanted, rel=1e-5)


def test_sparse_targets_of_two_kinds_are_not_joined():
    from accelerate.utils import concatenate

    one, other = (Taught(kind)([Ragged(windows())[0]]) for kind in ("ghost", "renormalize"))
    with pytest.raises(KeyError, match="others cannot join it"):
        concatenate([one, other])
    assert (one["teacher"] == one["teacher"]) is True  # a mapping that is compared and hashed as an object
    assert len({one["teacher"], other["teacher"]}) == 2
    assert one["teacher"].ids.max() < VOCAB


def launch(launcher, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "fastkd", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def test_torchrun(options, tmp_path):
    """A run from beginning to end, by the launcher itself."""
    path = tmp_path / "config.yaml"
    path.write_text(dump(changed(options, max_steps=2, batch_size=4, **QUICK)))
    done = launch(("torch.distributed.run", "--standalone", "--nproc-per-node", "2"), "distill", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == done.stdout.count("to train on") == 1
    assert done.stderr.count("2 of 2 steps") == 1
    assert (tmp_path / "out" / "report.html").exists()


def test_accelerate_launch(options, inputs, tmp_path):
    """A cache, of the bytes that one process writes."""
    flags = {"teacher": inputs / "teacher", "data": inputs / "text.txt", "max-length": 16, "out-of-domain": "none"}
    flags |= {"device": "cpu", "shard-tokens": 500, "batch-size": 4}
    arguments = ["cache", "write", *(f"--{name}={value}" for name, value in flags.items())]
    processes = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    done = launch(("accelerate.commands.launch", "--cpu", *processes), *arguments, f"--output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("windows of 16 tokens") == 1
    assert main([*arguments, f"--output={tmp_path / 'one'}"]) == 0
    assert len(contents(tmp_path / "one")) > 5
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
