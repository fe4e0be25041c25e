"""Texts that models draw: each prompt has random numbers of its own, and the same ones in every run."""

from __future__ import annotations

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


def test_each_prompt_has_a_seed_of_its_own():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    options = EvaluationOptions(prompts=["3 4", "3 4", "3 4"], sample_tokens=DRAWN, top_p=1.0)
    state = torch.get_rng_state()
    found = samples(model, Numbers(), options, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert samples(model, Numbers(), options, seed=5) == found
    texts = [text.split() for text in found]
    assert [len(text) for text in texts] == [DRAWN] * 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(texts[one], texts[other], strict=True)) < DRAWN // 4
