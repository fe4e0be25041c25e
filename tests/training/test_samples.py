"""Texts that models draw: different for each prompt, and the same in every run."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastkd.training.options import EvaluationOptions
from fastkd.training.samples import samples

VOCAB, DRAWN = 200, 24


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(token)) for token in ids)


def model(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "eos_token_id": None, "bos_token_id": None}
    if kind == "gpt2":
        sizes |= {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()


def test_equal_prompts_are_continued_in_different_ways():
    options = EvaluationOptions(prompts=["3 4", "3 4", "3 4"], sample_tokens=DRAWN, top_p=1.0)
    llama = model("llama")
    state = torch.get_rng_state()
    found = samples(llama, Numbers(), options, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert samples(llama, Numbers(), options, seed=5) == found
    texts = [text.split() for text in found]
    assert [len(text) for text in texts] == [DRAWN] * 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(texts[one], texts[other], strict=True)) < DRAWN // 4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_beside_a_prompt_does_not_change_it(kind):
    """The likeliest tokens alone: prompts of different lengths are continued as each by itself."""
    prompts = ["3", "9 8 7 6 5", "", "11 12"]
    each = model(kind)

    def continued(some):
        return samples(each, Numbers(), EvaluationOptions(prompts=some, sample_tokens=DRAWN, top_p=1e-6), seed=5)

    assert continued(prompts) == [continued([prompt])[0] for prompt in prompts]
    assert len(set(continued(prompts))) == len(prompts)


def test_without_prompts_or_tokens_there_is_nothing():
    assert samples(None, None, EvaluationOptions(prompts=[]), 0) == []
    assert samples(None, None, EvaluationOptions(sample_tokens=0), 0) == []
