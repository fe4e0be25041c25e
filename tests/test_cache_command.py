"""`fastkd cache write|info|verify` with a teacher made on the spot."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastkd
from fastkd.cli import main
from fastkd.training.options import CacheOptions, InputError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")

TEXT = "the film was a slow and quiet story of two old friends who lost their way home in snow"
WORDS = TEXT.split()
CONTEXT = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a random Llama `teacher`, its word-level tokenizer and `text.txt`."""
    path = tmp_path_factory.mktemp("inputs")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(WORDS, tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"]))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2 * CONTEXT,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path / "teacher")
    fast.save_pretrained(path / "teacher")
    words = random.Random(0)
    lines = [" ".join(words.choices(WORDS, k=words.randint(5, 30))) for _ in range(60)]
    (path / "text.txt").write_text("\n".join(lines))
    return path


@pytest.fixture
def flags(inputs, tmp_path):
    return {
        "--teacher": str(inputs / "teacher"),
        "--data": str(inputs / "text.txt"),
        "--output": str(tmp_path / "cache"),
        "--context": str(CONTEXT),
        "--device": "cpu",
    }


def arguments(flags, **changes):
    flags = flags | {"--" + name: str(value) for name, value in changes.items()}
    return ["cache", "write", *(part for pair in flags.items() for part in pair)]


def test_write_info_and_verify(flags, tmp_path, capsys):
    assert main(arguments(flags, format="topk", k=5, temperature=2.0)) == 0
    shown = capsys.readouterr()
    assert "57 of 60 documents (train)" in shown.out
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
    assert main(arguments(flags, format="topk", k=6)) == 2
    assert "begun with k=5, but k=6" in capsys.readouterr().err
    assert main(["cache", "info", str(tmp_path)]) == 2
    assert "is no fastkd cache" in capsys.readouterr().err


def test_windows_are_those_that_distill_trains_on(flags, inputs, tmp_path):
    from fastkd.cache import open as open_cache
    from fastkd.training.data import read_documents, split, token_windows

    assert main(arguments(flags, seed=3)) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    train, _ = split(read_documents(flags["--data"]), 3)
    windows = token_windows(train, tokenizer, CONTEXT, 10**6)
    cache = open_cache(tmp_path / "cache")
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
        "import sys, time, fastkd.cache.writer as writer; from fastkd.cli import main; run = writer._run\n"
        "def slow(*arguments): time.sleep(0.2); return run(*arguments)\n"
        "writer._run = slow; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, *arguments(flags, **{"batch-size": 1})]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cache" / "manifest.json").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, shown = child.communicate(timeout=60)
    assert child.returncode == 130, shown
    assert f"the same command goes on with {tmp_path / 'cache'}" in shown
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert main(arguments(flags, **{"batch-size": 1})) == 0


BAD_OPTIONS = [
    ({"context": 1}, "context is 1; it must be at least 2"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"shard_tokens": 0}, "shard_tokens is 0"),
    ({"format": "logits"}, "format is 'logits'; it must be one of sampled, topk, dense"),
    ({"documents": "some"}, "documents is 'some'; it must be one of train, all"),
    ({"context": 4000}, "4000 is more than the teacher's 32 positions"),
    ({"data": "absent.txt"}, "cannot read absent.txt"),
    ({"data": "text.pdf"}, "cannot tell the format"),
    ({"teacher": "absent/at/all"}, "Ways that work"),
    ({"device": "nonsense"}, "cannot use the device 'nonsense'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS, ids=[message for _, message in BAD_OPTIONS])
def test_bad_options_write_nothing(flags, tmp_path, changes, message):
    from fastkd.training.caching import write_cache

    options = {name.removeprefix("--"): value for name, value in flags.items()} | {"context": CONTEXT}
    with pytest.raises(InputError, match=message):
        write_cache(dataclasses.replace(CacheOptions(**options), **changes))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["parquet", "arrow", "directory"])
def test_documents_that_datasets_opens(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    from fastkd.training.data import read_documents

    data = datasets.Dataset.from_dict({"text": ["the old film", "", "NA", "the old film"]})
    path = tmp_path / f"text.{form}"
    if form == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path if form == "directory" else tmp_path / "saved")
        if form == "arrow":
            next((tmp_path / "saved").glob("*.arrow")).rename(path)
    assert read_documents(str(path)) == ["the old film", "NA"]
    datasets.Dataset.from_dict({"text": [None]}).save_to_disk(tmp_path / "empty")
    with pytest.raises(InputError, match="row 1: this row has no 'text' string"):
        read_documents(str(tmp_path / "empty"))
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match="holds the splits a, b"):
        read_documents(str(tmp_path / "splits"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="cannot read"):
        read_documents(str(tmp_path / "nothing"))


@pytest.mark.parametrize("words", [["cache", "--help"], ["cache", "write", "--help"], ["cache", "info", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    if "write" in words:
        for field in dataclasses.fields(CacheOptions):
            assert "--" + field.name.replace("_", "-") in shown


def test_missing_package_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("fastkd.cache")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastkd, "cache", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["cache", "info", "somewhere"]) == 2
    assert "safetensors is not installed: pip install 'fastkd[demo]'" in capsys.readouterr().err
