"""A teacher for cache tests: cheap, deterministic, and of each token it says something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd import Projection

VOCAB, HIDDEN = 301, 8


def parameters() -> tuple[Tensor, Tensor]:
    """Embedding `[VOCAB, HIDDEN]` and output head `[VOCAB, HIDDEN]`."""
    generator = torch.Generator().manual_seed(7)
    return 2 * torch.randn(VOCAB, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator)


def teacher(batch: Mapping[str, Any]) -> Projection:
    embedding, head = parameters()
    ids = batch["input_ids"]
    return Projection(embedding[ids] + 0.1 * torch.arange(ids.shape[1])[:, None], head)


def logits(ids: Tensor) -> Tensor:
    """`[tokens, VOCAB]` of one sequence."""
    return teacher({"input_ids": ids[None]}).logits()[0]


def sequences(count: int, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
