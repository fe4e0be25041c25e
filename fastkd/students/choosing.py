"""The blocks of a model that its predictions need most, by trying what each does without the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd.arguments import integer
from fastkd.losses import KDLoss
from fastkd.projection.models import project
from fastkd.students.blocks import blocks_of, check_model
from fastkd.students.layers import kept_blocks

__all__ = ["choose_layers"]


@torch.no_grad()
def choose_layers(model: Any, count: int, batches: Iterable[Mapping[str, Any]]) -> list[int]:
    """Which `count` blocks of a causal language model a student is best begun with.

    Blocks are left out one after the other: each time the one without which KL(model ‖ what is left) over the batches
    is least, at temperature 1 (SLEB: Song et al. 2024, arXiv:2402.09025). No two choices are made at once, since blocks
    that can each be spared may not be spared together. To go from n blocks to `count`, the batches are run
    (n(n+1) − count(count+1)) / 2 times. Weights are never copied.

        layers = fastkd.students.choose_layers(teacher, 20, [{"input_ids": ids} for ids in text[:8].split(4)])
        student = fastkd.students.keep_layers(teacher, layers).train()

    Args:
        model: as for `keep_layers`, with an output head that `fastkd.project` takes. It runs in eval mode and is left
            in the mode it had.
        count: of the blocks to keep.
        batches: keyword arguments of `model`: `input_ids [batch, tokens]`, `attention_mask`, ... Tokens that the mask
            leaves out do not count. Those of `make demo-layers` were 12 windows of 128 tokens.

    Returns:
        Indices from 0, ascending.

    Raises:
        TypeError: `model` is not a causal language model of transformers, has adapters or an output head that
            `fastkd.project` refuses, or `count` is not an int.
        ValueError: a count of which the model has no blocks; no batches; predictions that are not finite; or what
            `keep_layers` refuses.
    """
    check_model(model)
    kept = list(range(len(blocks_of(model)[1])))
    if not 1 <= integer("count", count) <= len(kept):
        raise ValueError(f"count must be from 1 to the model's {len(kept)} blocks, got {count}")
    training = model.training
    model.eval()
    try:
        text = [_with_mask(batch) for batch in batches]
        if not any(int((mask == 0).sum()) for _, mask in text):
            raise ValueError("batches have no tokens to compare predictions on: give some")
        whole = [project(model, **inputs) for inputs, _ in text]
        kl = KDLoss(temperature=1.0, soft_weight=1.0, hard_weight=0.0, reduction="sum")

        def change(block: int) -> float:
            """KL to the model, summed over the tokens, without this block too."""
            left = kept_blocks(model, [one for one in kept if one != block], copy=False)
            pairs = zip(text, whole, strict=True)
            total = sum(float(kl(project(left, **inputs), as_whole, mask)) for (inputs, mask), as_whole in pairs)
            if not math.isfinite(total):
                raise ValueError(f"predictions without block {block} are not finite on these batches")
            return total

        while len(kept) > count:
            kept.remove(min(kept, key=change))
    finally:
        model.train(training)
    return kept


def _with_mask(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """(what the model takes, labels int64 [batch, tokens] that leave out the tokens that do not count)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    return inputs, torch.where(mask == 0, -100, 0)
