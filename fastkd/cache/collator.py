"""Joining a cache's rows to the examples of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.cache.reader import Cache
from fastkd.sources import SparseTargets

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """A `collate_fn` for `torch.utils.data.DataLoader`: examples in, a padded batch with its teacher out.

    An example is a mapping with `input_ids` `[tokens]`, perhaps `labels` `[tokens]` (else the input_ids, as
    transformers models expect them) and `attention_mask` `[tokens]`, whose 0s are taken out. The whole sequence is
    looked up, then cut to `max_length`. Works in workers and with `pin_memory=True`.

    Returns `input_ids`, `attention_mask` and `labels`, int64 `[batch, tokens]`, padded at the end with
    `pad_token_id`, 0 and `label_pad`; and `teacher`, what `Cache.targets` returns.

    Raises ValueError for an example that does not fit together, CacheError for one that is not in the cache.
    """

    cache: Cache
    pad_token_id: int = 0
    max_length: int | None = None
    label_pad: int = -100

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be ≥ 1 or None, got {self.max_length}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | SparseTargets]:
        pairs = [_without_padding(example) for example in examples]
        sequences = [ids for ids, _ in pairs]
        teacher = self.cache.targets(sequences, self.max_length)
        ids, labels = ([part[: self.max_length] for part in parts] for parts in zip(*pairs, strict=True))
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([torch.ones_like(part) for part in ids], 0),
            "labels": _padded(labels, self.label_pad),
            "teacher": teacher,
        }


def _without_padding(example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids = _integers(example["input_ids"])
    labels, mask = _integers(example.get("labels", ids)), _integers(example.get("attention_mask", torch.ones_like(ids)))
    if ids.dim() != 1 or labels.shape != ids.shape or mask.shape != ids.shape:
        raise ValueError(
            f"input_ids, labels and attention_mask of an example must be [tokens] each, got {tuple(ids.shape)}, "
            f"{tuple(labels.shape)} and {tuple(mask.shape)}"
        )
    return ids[mask != 0], labels[mask != 0]


def _integers(tokens: Any) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64, device="cpu")


def _padded(parts: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)
