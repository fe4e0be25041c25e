"""Joining a cache's rows to the examples of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.cache import keys
from fastkd.cache.reader import Cache
from fastkd.sources import SparseTargets

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """A `collate_fn` for `torch.utils.data.DataLoader`: examples in, a padded batch with its teacher out.

    An example is a mapping with `input_ids` `[tokens]`, perhaps `labels` `[tokens]` (else the input_ids, as
    transformers models expect them) and `attention_mask` `[tokens]`, whose 0s are taken out; and the columns that the
    cache was written with beside these (`Cache.columns`). Other columns are left out. The whole sequence is looked up,
    then cut to `max_length`. Works in workers and with `pin_memory=True`.

    Returns `input_ids`, `attention_mask` and `labels`, int64 `[batch, tokens]`, padded at the end with
    `pad_token_id`, 0 and `label_pad`; the cache's columns `[batch, ...]`, for the student to see what the teacher saw,
    padded with 0 where they have an entry per token; and `teacher`, what `Cache.targets` returns.

    Raises ValueError for an example that does not fit together or beside the others, CacheError for one that is not
    in the cache. Position ids of an example always count, unless they are 0, 1, 2, …
    """

    cache: Cache
    pad_token_id: int = 0
    max_length: int | None = None
    label_pad: int = -100

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be ≥ 1 or None, got {self.max_length}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | SparseTargets]:
        parts = [_without_padding(example, self.cache.columns) for example in examples]
        teacher = self.cache.targets([{"input_ids": ids, **columns} for ids, _, columns in parts], self.max_length)
        ids = [part[: self.max_length] for part, _, _ in parts]
        batch: dict[str, Tensor | SparseTargets] = {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([torch.ones_like(part) for part in ids], 0),
            "labels": _padded([labels[: self.max_length] for _, labels, _ in parts], self.label_pad),
        }
        for name in self.cache.columns:
            batch[name] = self._column(name, [columns.get(name) for _, _, columns in parts])
        return {**batch, "teacher": teacher}

    def _column(self, name: str, values: list[Tensor | None]) -> Tensor:
        parts = [value for value in values if value is not None]
        if len(parts) < len(values):
            raise ValueError(
                f"{len(parts)} of the batch's {len(values)} examples have {name}: give it to all or to none"
            )
        if name in keys.PER_TOKEN:
            parts = [part[..., : self.max_length].movedim(-1, 0) for part in parts]
            return _padded(parts, 0).movedim(1, -1)
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{name} of the batch's examples has the shapes {[tuple(part.shape) for part in parts]}")
        return torch.stack(parts)


def _without_padding(example: Mapping[str, Any], names: Sequence[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    ids, real = keys.unpadded(example)
    labels = torch.as_tensor(example.get("labels", ids), dtype=torch.int64, device="cpu")
    if labels.shape != ids.shape:
        raise ValueError(
            f"input_ids and labels of an example must be [tokens] each, got {tuple(ids.shape)}, {tuple(labels.shape)}"
        )
    return ids[real], labels[real], keys.columns_of(example, names, real)


def _padded(parts: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)
