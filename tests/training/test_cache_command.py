"""`fastkd cache write|info|verify` with the tiny teacher."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import fastkd
from fastkd.cli import main
from fastkd.training.commands.cache import CacheOptions
from fastkd.training.options import DataOptions, InputError, ModelOptions
from tests.training.conftest import CONTEXT, run


@pytest.fixture
def flags(inputs, tmp_path):
    return {
        "--teacher": str(inputs / "teacher"),
        "--data": str(inputs / "text.txt"),
        "--output": str(tmp_path / "cache"),
        "--max-length": str(CONTEXT),
        "--out-of-domain": "none",
        "--device": "cpu",
    }


def arguments(flags, **changes):
    flags = flags | {"--" + name.replace("_", "-"): str(value) for name, value in changes.items()}
    return ["cache", "write", *(part for pair in flags.items() for part in pair)]


def test_write_info_and_verify(flags, tmp_path, capsys):
    assert main(arguments(flags, cache_format="topk", cache_tokens=5, temperature=2.0)) == 0
    shown = capsys.readouterr()
    assert "windows of 16 tokens (train documents)" in shown.out
    assert "bytes/token" in shown.err
    directory = str(tmp_path / "cache")
    assert main(["cache", "info", directory]) == 0
    shown = capsys.readouterr().out
    for line in ("temperature   2.0", "k             5", "format        topk", "bytes per token"):
        assert line in shown
    assert main(["cache", "verify", directory]) == 0
    assert "is as it was written" in capsys.readouterr().out
    shard = next((tmp_path / "cache").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["cache", "verify", directory]) == 2
    assert f"{shard.name} is corrupt" in capsys.readouterr().err
    assert main(arguments(flags, cache_format="topk", cache_tokens=6, temperature=2.0)) == 2
    assert "begun with k=5, but k=6" in capsys.readouterr().err
    assert main(["cache", "info", str(tmp_path)]) == 2
    assert "is no fastkd cache" in capsys.readouterr().err


@pytest.mark.parametrize("documents", ["train", "all"])
def test_windows_are_those_that_distill_trains_on(flags, inputs, tmp_path, documents):
    from fastkd.training.data import all_windows, load_corpus

    assert main(arguments(flags, seed=3, documents=documents)) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    data = DataOptions(data=flags["--data"], max_length=CONTEXT, out_of_domain="none")
    windows = all_windows(data, tokenizer) if documents == "all" else load_corpus(data, tokenizer, 1, 3).train
    cache = fastkd.cache.open(tmp_path / "cache")
    assert len(windows) == cache.sequences
    cache.check(tokenizer=tokenizer, vocab_size=len(tokenizer), temperature=1.0)
    targets = cache.targets(list(windows))
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    with torch.no_grad():
        exact = torch.log_softmax(teacher(windows).logits.double(), -1)
    entropy = -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close(targets.entropy.double(), entropy, rtol=1e-3, atol=1e-4)


def test_interrupted_command_goes_on(flags, tmp_path):
    """Ctrl-C while the teacher runs: a message, status 130, and the same command completes the cache."""
    slow = (
        "import signal, sys, time, fastkd.cache.writer as writer; from fastkd.cli import main; run = writer._run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs in a shell's background ignore it
        "def slow(*arguments): time.sleep(0.2); return run(*arguments)\n"
        "writer._run = slow; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, *arguments(flags, batch_size=1)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cache" / "manifest.json").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, shown = child.communicate(timeout=300)
    assert child.returncode == 130, shown
    assert f"the same command resumes {tmp_path / 'cache'}" in shown
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert main(arguments(flags, batch_size=1)) == 0


BAD_OPTIONS = [
    ({"max_length": 1}, "max_length is 1; it must be at least 2"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"shard_tokens": 0}, "shard_tokens is 0"),
    ({"cache_format": "logits"}, "invalid choice: 'logits'"),
    ({"documents": "some"}, "invalid choice: 'some'"),
    ({"max_length": 4000}, "4000 is more than the teacher's 32 positions"),
    ({"data": "absent.txt"}, "cannot read absent.txt"),
    ({"data": "text.pdf"}, "cannot tell the format"),
    ({"teacher": "absent/at/all"}, "Ways that work"),
    ({"device": "nonsense"}, "device is 'nonsense'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS, ids=[message for _, message in BAD_OPTIONS])
def test_bad_options_write_nothing(flags, tmp_path, capsys, changes, message):
    assert main(arguments(flags, **changes)) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_the_cache_refuses(inputs, tmp_path):
    from fastkd.training.commands.cache import write_cache

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes").write_text("mine")
    data = DataOptions(data=str(inputs / "text.txt"), max_length=CONTEXT, out_of_domain="none")
    models = ModelOptions(teacher=str(inputs / "teacher"), device="cpu")
    with pytest.raises(InputError, match="not empty and no fastkd cache"):
        write_cache(CacheOptions(output=str(tmp_path / "cache")), models, data)
    assert (tmp_path / "cache" / "notes").read_text() == "mine"


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_distill_reads_a_finished_cache_however_it_was_written(flags, inputs, options, tmp_path, monkeypatch):
    """By a teacher spelt otherwise, exactly stored, in other shards, while another process holds its lock."""
    monkeypatch.chdir(inputs.parent)
    assert main([*arguments(flags, teacher=f"./{inputs.name}/teacher", shard_tokens=64), "--plain"]) == 0
    directory = tmp_path / "cache"
    before = digests(directory)
    assert len(before) > 3
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        for number, teacher in enumerate((f"{inputs.name}/teacher", str(inputs / "teacher"))):
            metrics = run(
                options, max_steps=2, teacher=teacher, cache_dir=str(directory), output=str(tmp_path / str(number))
            )
            assert metrics["training"]["student"]["steps"] == 2
    finally:
        os.close(descriptor)
    assert digests(directory) == before
    (directory / "manifest.json").write_text("damaged")
    assert main(["eval", str(tmp_path / "0"), "--eval-windows", "1"]) == 0  # which reads no cache


def test_other_weights_at_the_same_path_are_refused(flags, inputs, options, tmp_path):
    """By distill before it judges anything, and by cache write before it computes anything."""
    teacher = tmp_path / "teacher"
    shutil.copytree(inputs / "teacher", teacher)
    assert main(arguments(flags, teacher=teacher)) == 0
    before = digests(tmp_path / "cache")
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    model.save_pretrained(teacher)
    with pytest.raises(InputError, match="is of a teacher with other weights"):
        run(options, teacher=str(teacher), cache_dir=str(tmp_path / "cache"), max_steps=2)
    assert main(arguments(flags, teacher=teacher)) == 2
    assert digests(tmp_path / "cache") == before
    assert not (tmp_path / "out").exists()


BAD_CACHES = [
    ({"temperature": 2.0}, "begun with temperature=1.0, but temperature=2.0"),
    ({"cache_tokens": 5}, "begun with k=12, but k=5"),
    ({"cache_format": "topk"}, "begun with format='sampled', but format='topk'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CACHES, ids=[message for _, message in BAD_CACHES])
def test_a_cache_of_something_else_is_refused_before_the_teacher_is_loaded(
    flags, options, tmp_path, monkeypatch, changes, message
):
    from fastkd.training import loading

    assert main(arguments(flags)) == 0

    def never(*_):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(loading, "load_teacher", never)
    with pytest.raises(InputError, match=message):
        run(options, cache_dir=str(tmp_path / "cache"), **changes)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match=r"notes is a file: name a directory"):
        run(options, cache_dir=str(tmp_path / "notes" / "cache"))
    with pytest.raises(InputError, match="is not empty and no fastkd cache"):
        run(options, cache_dir=str(tmp_path))


@pytest.mark.parametrize("words", [["cache", "--help"], ["cache", "write", "--help"], ["cache", "info", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 0
    assert "usage: fastkd cache" in capsys.readouterr().out


def test_missing_package_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("fastkd.cache", "fastkd.training.caching"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("fastkd.training.caching", raising=False)
    monkeypatch.delattr(fastkd, "cache", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["cache", "info", "somewhere"]) == 2
    assert "safetensors is not installed: pip install 'fastkd[train]'" in capsys.readouterr().err
