"""What terms have to know of a model before its first step, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Architecture", "architecture_of", "text_config"]


@dataclass(frozen=True)
class Architecture:
    """The numbers of a transformer."""

    #: Its class, for messages.
    name: str
    #: Transformer blocks. The hidden states are one more: the embedding's come first.
    blocks: int
    #: Width of the hidden states.
    width: int
    #: Attention heads: of queries, and of keys and values.
    heads: int
    kv_heads: int
    #: Width of a head.
    head_size: int
    #: `eager`, `sdpa`, `flash_attention_2`, ...; None where the configuration does not say.
    implementation: str | None
    #: Probability with which attention probabilities are dropped in training.
    dropout: float


def architecture_of(model: Any) -> Architecture:
    """Of a causal language model, or of its configuration. Raises ValueError where that does not say the numbers."""
    config = text_config(model) if isinstance(model, nn.Module) else model.get_text_config()
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    numbers = [number for field in fields if isinstance(number := getattr(config, field, None), int)]
    if len(numbers) < len(fields):
        raise ValueError(
            f"the configuration of {type(model).__name__} does not say num_hidden_layers, hidden_size and "
            "num_attention_heads, as those of transformers do"
        )
    blocks, width, heads = numbers
    dropped = [getattr(config, field, 0.0) or 0.0 for field in ("attention_dropout", "attn_pdrop")]
    return Architecture(
        name=type(model).__name__,
        blocks=blocks,
        width=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or width // heads,
        implementation=getattr(config, "_attn_implementation", None),
        dropout=max((one for one in dropped if isinstance(one, int | float)), default=0.0),
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model within a model; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
