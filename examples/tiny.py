"""What the examples train on without a model hub: a short text, a tokenizer of bytes, tiny models.

In a script of yours, `AutoTokenizer.from_pretrained` and `AutoModelForCausalLM.from_pretrained` take this file's place.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

#: Jane Austen, Pride and Prejudice (1813), the beginning.
TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of
a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this
truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some
one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield
Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here,
and she told me all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?" cried his wife
impatiently. "You want to tell me, and I have no objection to hearing it." This was invitation enough."""

CAPITALS = {"France": "Paris", "Italy": "Rome", "Kenya": "Nairobi", "Peru": "Lima", "Japan": "Tokyo", "Cuba": "Havana"}

CHAT_TEMPLATE = """{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and two more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def model(width: int, seed: int = 0) -> transformers.LlamaForCausalLM:
    """A Llama of one layer, with random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 256, 257
    return transformers.LlamaForCausalLM(config)


def windows(length: int = 32) -> torch.Tensor:
    """The text as token ids, int64 `[windows, length]`."""
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def teacher(steps: int = 60) -> transformers.LlamaForCausalLM:
    """A wider model that has learnt the text, frozen and in eval mode."""
    learner = model(64, seed=1)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for _ in range(steps):
        learner(windows(), labels=windows()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return learner.eval().requires_grad_(False)
