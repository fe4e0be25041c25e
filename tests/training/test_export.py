"""A student leaves in another format and comes back with the same logits, or does not leave."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastkd
from fastkd.cli import main
from fastkd.training import loading

tokenizers = pytest.importorskip("tokenizers")
TEXT = "the film was a slow and quiet story of two old friends who lost their way home in snow"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE, as GPT-2's."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    settings = {"vocab_size": 320, "special_tokens": ["<|endoftext|>"], "show_progress": False}
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator([TEXT] * 3, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **settings))
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token=end, bos_token=end, unk_token=end)


def student(kind, tokenizer, **settings):
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        sizes |= {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    else:
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"max_position_embeddings": 32}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **(sizes | settings))
    ).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2)  # biases and norms too: what is 0 or 1 hides what is not written
    return model


KINDS = [
    ("gpt2", {}),
    ("gpt2", {"vocab_size": 400}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_gguf_comes_back_equal(tmp_path, tokenizer, kind, settings):
    pytest.importorskip("gguf")
    model = student(kind, tokenizer, **settings)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), "--to", "gguf", "--output", str(tmp_path / "new")]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(len(tokenizer), (3, 32))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "new", gguf_file="model.gguf")
    text = "two friends, and the snow!\n"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.eos_token_id == tokenizer.eos_token_id


def test_a_gguf_teacher_is_asked_for_its_configuration_once(tmp_path, tokenizer, monkeypatch):
    """To read it takes seconds, and a run needs it several times; a file that is another is read again."""
    pytest.importorskip("gguf")
    place = tmp_path / "new" / "model.gguf"
    reads = []
    read = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs)
    )
    for layers, times in ((2, 1), (3, 2)):
        student("gpt2", tokenizer, n_layer=layers).save_pretrained(tmp_path / f"student-{layers}")
        tokenizer.save_pretrained(tmp_path / f"student-{layers}")
        written = tmp_path / f"written-{layers}"
        assert main(["export", str(tmp_path / f"student-{layers}"), "--to", "gguf", "--output", str(written)]) == 0
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((written / "model.gguf").read_bytes())
        first = loading.teacher_config(str(place))
        first.n_layer = 99  # whoever changes what it gets changes nothing for others
        assert loading.teacher_config(str(place)).n_layer == layers
        assert reads.count((str(place.parent),)) == times


def test_hf_is_the_same_model(tmp_path, tokenizer):
    model = student("gpt2", tokenizer)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), "--to", "hf", "--output", str(tmp_path / "new")]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_int4_is_near_and_comes_back_equal(tmp_path, tokenizer):
    pytest.importorskip("torchao")
    model = student("llama", tokenizer)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), "--to", "int4", "--output", str(tmp_path / "new")]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", device_map="cpu")
    ids = torch.randint(len(tokenizer), (3, 32))
    with torch.no_grad():
        exact, rounded = model(ids).logits, loaded(ids).logits.float()
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.5
    new, old = (
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("new", "student")
    )
    assert new < 0.7 * old


BAD = [
    ("gguf", "gpt2", {"n_positions": 2048}, "1024 of a GPT-2"),
    ("gguf", "llama", {"attention_bias": True}, "biases (attention True"),
    ("gguf", "gpt_neo", {"num_layers": 2, "attention_types": [[["global"], 2]]}, "a gpt_neo cannot be written"),
    ("int4", "gpt2", {}, "torchao"),
]


@pytest.mark.parametrize(("to", "kind", "settings", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_cannot_leave(tmp_path, tokenizer, capsys, to, kind, settings, message):
    pytest.importorskip("gguf")
    student(kind, tokenizer, **settings).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), "--to", to, "--output", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_bad_places(inputs, tmp_path, capsys):
    teacher = str(inputs / "teacher")
    assert main(["export", teacher, "--to", "gguf", "--output", str(tmp_path / "new")]) == 2
    assert "only byte-level BPE" in capsys.readouterr().err
    assert main(["export", teacher, "--to", "hf", "--output", str(tmp_path)]) == 2
    assert "exists: name a new directory" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "absent"), "--to", "hf", "--output", str(tmp_path / "new")]) == 2
    assert "cannot load" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_multi_token_heads_are_dropped_or_kept(tmp_path, tokenizer, capsys):
    model = student("llama", tokenizer)
    heads = fastkd.MultiTokenHeads(model.config, 2)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    asked = ["export", str(tmp_path / "student"), "--to"]
    assert main([*asked, "hf", "--heads", "keep", "--output", str(tmp_path / "none")]) == 2
    assert "has no multi_token_heads.safetensors" in capsys.readouterr().err
    heads.save_pretrained(tmp_path / "student")
    assert main([*asked, "gguf", "--heads", "keep", "--output", str(tmp_path / "none")]) == 2
    assert "gguf has no place for multi-token heads" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    for name, options in (("dropped", []), ("kept", ["--heads", "keep"])):
        assert main([*asked, "hf", *options, "--output", str(tmp_path / name)]) == 0
    assert not list((tmp_path / "dropped").glob("multi*"))
    found = fastkd.MultiTokenHeads.from_pretrained(tmp_path / "kept").state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in heads.state_dict().items())
