"""Queries, keys and values of a model's attention, as each block hands them to the attention function.

Models of transformers look their attention function up by name at each call (`ALL_ATTENTION_FUNCTIONS`). While a model
is recorded, the name stands for a function that keeps what it is given, rotary embedding included, and then calls
the one it stands for. So fused implementations stay fused. Models are duck-typed; transformers is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Heads", "check_recordable", "recorded"]

_TABLE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True)
class Heads:
    """What one block's attention is computed from."""

    #: `[batch, heads, tokens, head size]`.
    queries: Tensor
    #: `[batch, heads of keys and values, tokens, head size]`.
    keys: Tensor
    values: Tensor
    #: Factor of the products of queries and keys.
    scaling: float
    #: c of c · tanh(products / c), what the softmax is taken of, where there is one.
    softcap: float | None = None
    #: How many keys a query sees, itself and those before it; None: all.
    window: int | None = None


def check_recordable(model: nn.Module) -> None:
    """Raise ValueError for a model that does not look its attention function up in transformers' table."""
    tables, names = _looked_up(model)
    if "eager" in names and not all(hasattr(table, "get_interface") for table in tables.values()):
        raise ValueError(  # only the others were looked up
            f"{type(model).__name__} with attn_implementation='eager' cannot be recorded before transformers 5.1: "
            "upgrade it, or take attn_implementation='sdpa'"
        )


#: What a block's kind of attention calls its window in the configuration.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def _window(module: nn.Module, number: int) -> int | None:
    """The window of a block that the attention function is not told of, since the mask alone has it."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    # Without kinds (PhiMoE) the window is of all blocks; Mistral, Qwen 2 and others say it to the function too.
    field = _WINDOWS.get(kinds[number]) if kinds else "sliding_window"
    window = getattr(config, field, None) if field else None
    return window if isinstance(window, int) else None


def _looked_up(model: nn.Module) -> tuple[dict[int, Any], set[str]]:
    """(the tables by their ids, the names of the functions that the model looks up in them)."""
    files = {type(module).__module__: sys.modules.get(type(module).__module__) for module in model.modules()}
    tables = {id(table): table for file in files.values() if (table := getattr(file, _TABLE, None)) is not None}
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = {name for config in configs if isinstance(name := getattr(config, "_attn_implementation", None), str)}
    if not (tables and names):
        raise ValueError(f"{type(model).__name__} has no attention that can be recorded: it does not use {_TABLE}")
    return tables, names


@contextmanager
def recorded(model: nn.Module, blocks: Collection[int] | None = None) -> Iterator[dict[int, Heads]]:
    """Run the model within: the dict then has, by their numbers, what the blocks computed; of `blocks` alone, if given.

    Raises ValueError for a model that does not look its attention function up in transformers' table.
    """
    found: dict[int, Heads] = {}
    tables, names = _looked_up(model)
    known = {id(module) for module in model.modules()}

    def recording(original: Any) -> Any:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            number = getattr(module, "layer_idx", None)
            if id(module) in known and isinstance(number, int) and (blocks is None or number in blocks):
                scaling = options.get("scaling")
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                window = options.get("sliding_window") or _window(module, number)
                found[number] = Heads(query, key, value, scaling, options.get("softcap"), window)
            # Eager attention is no row of the table, but a function beside each model.
            forward = original or sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
            return forward(module, query, key, value, *args, **options)

        return attend

    before = {key: dict(table._local_mapping) for key, table in tables.items()}
    for table in tables.values():
        for name in names:
            table[name] = recording(table.get(name))
    try:
        yield found
    finally:
        for key, table in tables.items():
            table._local_mapping = before[key]
