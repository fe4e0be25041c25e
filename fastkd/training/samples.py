"""What models say: text drawn after a prompt, and the distribution of the token that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.training.evaluation import exact_logits
from fastkd.training.options import EvaluationOptions

__all__ = ["next_token", "prompt_ids", "samples"]


def prompt_ids(tokenizer: Any, prompt: str, model: Any) -> Tensor:
    """int64 [1, tokens] on the model's device; an empty prompt is the eos token, which separates documents."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    return torch.tensor([ids], dtype=torch.int64, device=model.device)


@torch.no_grad()
def samples(model: Any, tokenizer: Any, options: EvaluationOptions, seed: int) -> list[str]:
    """A continuation of each prompt. All are drawn at once, for which each step reads the weights once.

    As many tokens follow all prompts, so a long one leaves less room to the others too. Moves no random numbers of the
    caller's; the model is in eval mode meanwhile.
    """
    if not options.sample_tokens or not options.prompts:
        return []
    training = model.training
    model.eval()
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = [prompt_ids(tokenizer, prompt, model)[0] for prompt in options.prompts]
    ids = _left_padded(rows, tokenizer.eos_token_id)
    longest = ids.shape[1] + options.sample_tokens
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = model.generate(
            input_ids=ids,
            attention_mask=_left_padded([torch.ones_like(row) for row in rows], 0),
            max_length=longest if room is None else min(longest, room),
            do_sample=True,
            top_p=options.top_p,
            top_k=0,
            temperature=1.0,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(training)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in drawn[:, ids.shape[1] :]]


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """`[rows, longest]`: padded on the left, where generation does not continue."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


@torch.no_grad()
def next_token(model: Any, tokenizer: Any, prompts: Sequence[str], vocab_size: int | None = None) -> list[Tensor]:
    """Logits of the token after each prompt: fp32 `[V]` on the CPU, of the first `vocab_size` ids."""
    training = model.training
    model.eval()
    found = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, model)
        expected = fastkd.project(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        last = replace(expected, hidden=expected.hidden[:, -1])
        found.append(exact_logits(last)[0, :vocab_size].cpu())
    model.train(training)
    return found
