"""Windows of text dealt to processes in whole batches, and what they found put together in the order of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.processes import Processes

__all__ = ["Deal"]


@dataclass(frozen=True)
class Deal:
    """Batches of `batch_size` windows, the i-th for process i mod n: each is computed as one process would."""

    batch_size: int
    processes: Processes

    def mine(self, windows: Tensor) -> Sequence[Tensor]:
        """The batches of `windows` [n, length] that are this process's; none where there are more processes."""
        batches: tuple[Tensor, ...] = windows.split(self.batch_size)
        return batches[self.processes.rank :: self.processes.size]

    def together(self, found: Callable[[], list[Tensor]]) -> Tensor:
        """`[n, k]` in every process: what `found()` says of each batch `[windows of it, k]`, for all windows in order.

        All processes call this at once. The error of one is raised in all.
        """
        by_rank, size = self.processes.gather(found), self.processes.size
        batches = sum(len(theirs) for theirs in by_rank)
        return torch.cat([by_rank[number % size][number // size] for number in range(batches)])
