"""Which labels of a batch count: none of another document's, and how many, counted where the batch is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastkd.sequences import document_starts
from fastkd.terms.term import IGNORED

__all__ = ["COUNT", "SHIFTED", "Counting", "Labels", "labels_of"]

#: Where a batch has the number of its tokens that count.
COUNT = "live_tokens"
#: Where it has labels at the positions that predict them, as transformers and accelerate call them.
SHIFTED = "shift_labels"


class Labels(NamedTuple):
    """Labels `[batch, tokens]`, and whether they are at the positions that predict them."""

    labels: Tensor
    shifted: bool

    @property
    def predicted(self) -> Tensor:
        """Those that some position predicts."""
        return self.labels if self.shifted else self.labels[..., 1:]


def labels_of(batch: Any) -> Labels | None:
    """The labels of a batch: `shift_labels` before `labels`. None where it has no tensor of them.

    Where `position_ids` of the labels' shape begin again, as in rows of several documents, nothing predicts the label.
    """
    if not isinstance(batch, Mapping):
        return None
    shifted, labels, positions = (batch.get(name) for name in (SHIFTED, "labels", "position_ids"))
    if isinstance(shifted, Tensor):
        return Labels(shifted, shifted=True)
    if not isinstance(labels, Tensor):
        return None
    # Positions of another shape, such as those of images, tell no documents apart.
    if isinstance(positions, Tensor) and positions.shape in (labels.shape, (1, *labels.shape[1:])):
        labels = labels.masked_fill(document_starts(positions).to(labels.device), IGNORED)
    return Labels(labels, shifted=False)


@dataclass(frozen=True)
class Counting:
    """A collator that counts labels while they are on the CPU. The first of a document counts for nothing."""

    collator: Callable[[Any], Any]

    def __call__(self, examples: Any) -> Any:
        """The collator's batch, with the count under `COUNT` where it has labels on the CPU."""
        batch = self.collator(examples)
        found = labels_of(batch)
        if found is None or found.labels.device.type != "cpu":
            return batch
        return {**batch, COUNT: int((found.predicted != IGNORED).sum())}
