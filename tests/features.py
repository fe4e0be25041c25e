"""Small models of unequal widths, and what terms that read more of them than their logits need."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.terms import Batch, Outputs, Term, outputs_of

transformers = pytest.importorskip("transformers")

VOCAB, TOKENS, ROWS = 61, 11, 3


def gpt2(width: int = 16, blocks: int = 3, heads: int = 2, attention: str = "eager", **config: Any) -> Any:
    settings = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=width,
        n_layer=blocks,
        n_head=heads,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3, **config},
    )
    return built(settings, attention)


def llama(width: int = 24, blocks: int = 5, heads: int = 4, attention: str = "eager", **config: Any) -> Any:
    settings = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=32,
        **{"initializer_range": 0.3, **config},
    )
    return built(settings, attention)


def built(settings: Any, attention: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    return model.eval()


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def batch(padding: int = 3) -> Batch:
    """Rows of unequal lengths, padded at the end, and one whose beginning is not to be learnt."""
    ids = torch.randint(VOCAB, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, TOKENS - padding :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100
    return Batch(labels, {"input_ids": ids, "attention_mask": mask})


def counted(batch: Batch) -> Tensor:
    """Bool `[rows, tokens]`: the next token's label counts."""
    return torch.cat((batch.labels[:, 1:] != -100, torch.zeros(ROWS, 1, dtype=torch.bool)), 1)


def both(term: Term, student: nn.Module, teacher: nn.Module, given: Batch) -> tuple[Outputs, Outputs]:
    with torch.no_grad():
        theirs = outputs_of(teacher, given.inputs, term.needs)
    return outputs_of(student, given.inputs, term.needs), theirs


def value_of(term: Term, student: nn.Module, teacher: nn.Module, given: Batch) -> Tensor:
    found = term(*both(term, student, teacher, given), given)
    assert isinstance(found, Tensor)
    return found


def gradients(*modules: nn.Module) -> Tensor:
    """Of all parameters, as one row; 0 where there is none."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for module in modules:
        for one in module.parameters():
            found.append((torch.zeros_like(one) if one.grad is None else one.grad).flatten().double())
    return torch.cat(found)


def everywhere(hidden: Tensor, blocks: int = 5) -> Outputs:
    """A model whose every block gives the same."""
    return Outputs(None, {"hidden_states": (hidden,) * (blocks + 1)})


def twins(*modules: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Copies in float64 and in float32."""
    return [tuple(copy.deepcopy(module).to(dtype) for module in modules) for dtype in (torch.float64, torch.float32)]
