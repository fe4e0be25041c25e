"""A batch whose rows have different teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastkd.sources import Projection, Teacher

__all__ = ["RoutedLogits", "rows_of"]


@dataclass(frozen=True)
class RoutedLogits:
    """What several teachers say of one batch, each of its own rows: `Outputs.logits` of `fastkd.teachers.Routed`.

    Args:
        parts: pairs of row indices, int64 `[n]` on the predictions' device, and one teacher's predictions
            `[n, tokens, V]` of these rows. Each row of the batch is in one part.
    """

    parts: Sequence[tuple[Tensor, Teacher]]


def rows_of(logits: Tensor | Projection, rows: Tensor) -> Tensor | Projection:
    """Some rows of logits `[batch, tokens, V]`, or of a projection; differentiable."""
    if isinstance(logits, Projection):
        return replace(logits, hidden=logits.hidden.index_select(0, rows))
    return logits.index_select(0, rows)
