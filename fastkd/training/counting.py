"""How many labels of a batch count, counted where the batch is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["COUNT", "Counting"]

#: Where a batch has the number of its tokens that count.
COUNT = "live_tokens"


@dataclass(frozen=True)
class Counting:
    """A collator that counts labels while they are on the CPU. The first of a row counts for nothing."""

    collator: Callable[[Any], Any]
    ignore_index: int

    def __call__(self, examples: Any) -> Any:
        """The collator's batch, with the count under `COUNT` where it has labels on the CPU."""
        batch = self.collator(examples)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.device.type != "cpu":
            return batch
        return {**batch, COUNT: int((labels[..., 1:] != self.ignore_index).sum())}
