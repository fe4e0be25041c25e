"""A student of some of its teacher's blocks: which ones, and the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastkd.arguments import integer
from fastkd.students.blocks import blocks_of, check_model, made_of, model_configuration

__all__ = ["keep_layers", "kept_blocks", "parse_layers", "spread"]

_FORMS = "indices from 0 such as 0,2,4 or 0-8,10,29, or uniform:N, last:N or every:N"

#: Settings that count the first blocks of a kind, and those that list some by index.
_COUNTS_OF_FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
_LISTS_OF_INDICES = ("mlp_only_layers",)
#: What a module is told of its place. It may differ between a block and its copy; nothing else may.
_PLACES = ("layer_idx", "block_idx", "layer_id", "layer_number", "gradient_checkpointing", "training")


def parse_layers(text: str, layers: int) -> list[int]:
    """Indices of blocks of a model that has `layers` of them, ascending.

    Args:
        text: `"0,2,4"`, with ranges `"0-8,10,29"` whose ends are included; `"uniform:N"`, N spread evenly, the
            i-th of them round(i · layers / N), as terms pair blocks; `"last:N"`; or `"every:N"`, the blocks 0, N, ...

    Raises ValueError for another form, for blocks that do not exist, and for repeated or descending ones.
    """
    rule = re.fullmatch(r"\s*(uniform|last|every):(\d+)\s*", text)
    if rule is None:
        parts = [re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part) for part in text.split(",")]
        found: list[int] = []
        for part in parts:
            if part is None:
                raise ValueError(f"layers are {text!r}; they must be {_FORMS}")
            first, end = int(part[1]), int(part[2] or part[1])
            if first > end or end >= layers:
                raise ValueError(f"layers are {text!r}, of which {part[0].strip()!r} {_not_there(layers)}")
            found += range(first, end + 1)
        return checked(found, layers)
    kind, count = rule[1], int(rule[2])
    if not 1 <= count <= layers:
        raise ValueError(f"layers are {text!r}, but N must be from 1 to the model's {layers} blocks")
    if kind == "every":
        return list(range(0, layers, count))
    if kind == "last":
        return list(range(layers - count, layers))
    return spread(count, layers)


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` blocks, spread evenly: the i-th is round(i · layers / count), and exists.

    A block is there several times where there are fewer than `count`.
    """
    return [min(round(place * layers / count), layers - 1) for place in range(count)]


def checked(layers: Sequence[int], count: int) -> list[int]:
    """Indices of some of `count` blocks. TypeError or ValueError for what is none, repeated or descends."""
    found = [integer("layers", one) for one in layers]
    if not found:
        raise ValueError("layers is empty: a student needs at least one block")
    for one in found:
        if not 0 <= one < count:
            raise ValueError(f"layers has {one}, which {_not_there(count)}")
    for one, following in itertools.pairwise(found):
        if one >= following:
            raise ValueError(f"layers has {following} after {one}; each block is taken once, in the model's order")
    return found


def _not_there(count: int) -> str:
    return f"is no block of a model that has 0 to {count - 1}"


def keep_layers(model: Any, layers: Sequence[int] | str) -> Any:
    """A copy of a causal language model with these of its blocks, in their order; all else is the model's.

    So DistilBERT was begun (Sanh et al. 2019, arXiv:1910.01108, with every second block). The student shares no memory
    with the model, has its dtypes and mode, and can be saved, loaded and run with a cache. Blocks that are left out are
    never copied.

        student = fastkd.students.keep_layers(teacher, "0-8,10,12,29").train()

    Args:
        model: of transformers, without adapters, in floating point. On the meta device the student is too.
        layers: indices from 0, ascending, or a text for `parse_layers`.

    Returns:
        A model of the same class. Its `config` has the number of blocks, and lists by block cut.

    Raises:
        TypeError: `model` is not a causal language model of transformers, or has adapters.
        ValueError: blocks that do not exist, are repeated or descend; quantised weights; or an architecture that gives
            a block another form in its new place, such as a scale by its index.
    """
    check_model(model)
    count = len(blocks_of(model)[1])
    return kept_blocks(model, parse_layers(layers, count) if isinstance(layers, str) else checked(layers, count))


def kept_blocks(model: Any, kept: Sequence[int], *, copy: bool = True) -> Any:
    """As `keep_layers`, of indices that are checked; without `copy` the weights are the model's own memory."""
    name, blocks = blocks_of(model)
    config = model_configuration(model)
    _keep(config.get_text_config(), kept)
    moved = re.compile(rf"{re.escape(name)}\.(\d+)(?=\.|$)")

    def source(module: str) -> str:
        return moved.sub(lambda found: f"{name}.{kept[int(found[1])]}", module)

    try:
        student = made_of(model, config, source, copy=copy)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} makes other blocks in other places: {error}") from error
    for place, index in enumerate(kept):
        _check_same(blocks[index], student.get_submodule(f"{name}.{place}"), f"block {index} at {place}")
    return student


def _keep(config: Any, kept: Sequence[int]) -> None:
    """Make a configuration that of a model of these blocks."""
    count = config.num_hidden_layers
    if len(kept) == count:
        return
    step = getattr(config, "decoder_sparse_step", 1)
    if step != 1:  # a mixture of experts in each block whose place is a multiple: those without are listed instead
        dense = {index for index in range(count) if (index + 1) % step}
        config.mlp_only_layers = sorted(dense | set(config.mlp_only_layers))
        config.decoder_sparse_step = 1
    for name, value in list(vars(config).items()):
        if name in _LISTS_OF_INDICES:
            setattr(config, name, [place for place, index in enumerate(kept) if index in value])
        elif name in _COUNTS_OF_FIRST and value is not None and value < count:
            setattr(config, name, sum(index < value for index in kept))
        elif "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _check_same(block: nn.Module, copied: nn.Module, what: str) -> None:
    """The modules of both have the same settings, but for their place."""
    theirs = dict(block.named_modules())
    for name, module in copied.named_modules():
        ours, given = _settings(module), _settings(theirs[name])
        for key in ours.keys() | given.keys():
            if ours.get(key) != given.get(key):
                raise ValueError(
                    f"{what} would have {name}{'.' if name else ''}{key} {ours.get(key)!r} in place of "
                    f"{given.get(key)!r}: this architecture decides it by the block's place. Leave other blocks out"
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = (int, float, str, bool, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _PLACES and not name.startswith("_") and isinstance(value, plain)
    }
