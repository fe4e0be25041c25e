"""Low-rank adapters: what cannot be merged is refused before any work; a merge that changes a student is an error."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from fastkd.training import setup
from fastkd.training.options import InputError
from tests.training.conftest import CONTEXT, STUDENT, run

peft = pytest.importorskip("peft")


@pytest.fixture
def llama(tmp_path):
    """Writes the configuration of a small Llama student."""

    def written(*, tied):
        config = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": tied,
        }
        (tmp_path / "llama.json").write_text(json.dumps(config))
        return str(tmp_path / "llama.json")

    return written


@pytest.fixture
def no_work(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(setup, "load_corpus", fail)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "lm_head"]])
def test_tied_weights_are_not_adapted(options, llama, tmp_path, no_work, targets):
    with pytest.raises(InputError, match=r"whose weight is also that of '(lm_head|model\.embed_tokens)'"):
        run(options, student=llama(tied=True), lora_rank=2, lora_targets=targets)
    assert not (tmp_path / "out").exists()


def test_tied_weights_of_a_gpt2_are_not_adapted(options, no_work):
    assert STUDENT["model_type"] == "gpt2"
    with pytest.raises(InputError, match=r"'transformer\.wte', whose weight is also that of 'lm_head'"):
        run(options, lora_rank=2, lora_targets=["wte"])


def test_an_output_head_is_not_adapted(options, llama, no_work):
    with pytest.raises(InputError, match="'lm_head', the output head"):
        run(options, student=llama(tied=False), lora_rank=2, lora_targets=["lm_head"])


@pytest.mark.parametrize("target", ["no_such_layer", "input_layernorm", "mlp"])
def test_layers_that_cannot_be_adapted_are_refused(options, llama, no_work, target):
    with pytest.raises(InputError, match="cannot adapt"):
        run(options, student=llama(tied=False), lora_rank=2, lora_targets=[target])


@pytest.mark.parametrize(
    ("tied", "targets"), [(False, ["embed_tokens", "v_proj"]), (True, ["q_proj", "down_proj"]), (True, [])]
)
def test_the_merged_student_is_the_trained_one(options, llama, tmp_path, targets, tied):
    found = run(options, student=llama(tied=tied), lora_rank=4, lora_targets=targets, eval_windows=500)
    models = found["models"]
    assert models["student"]["perplexity"] < models["student before"]["perplexity"]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.num_parameters() == models["student"]["parameters"]


def test_a_merge_that_changes_the_student_is_an_error_that_keeps_the_adapter(options, llama, tmp_path, monkeypatch):
    def wrong(self, *arguments, **settings):
        whole = original(self, *arguments, **settings)
        with torch.no_grad():
            whole.model.layers[0].self_attn.v_proj.weight.mul_(1.1)
        return whole

    original = peft.tuners.lora.LoraModel.merge_and_unload
    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", wrong)
    with pytest.raises(InputError, match="merging the adapters changes the student") as raised:
        run(options, student=llama(tied=False), lora_rank=4, lora_targets=["q_proj"], max_steps=5)
    folder = tmp_path / "out" / "checkpoints" / "student" / "adapter"
    assert str(folder) in str(raised.value)
    assert (folder / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
