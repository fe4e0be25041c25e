"""Several processes that do one work: what one finds out reaches all, and so does its failure.

    processes = Processes(dist.new_group(backend="gloo", timeout=PATIENCE))     # or Processes() for this one alone

    found = processes.of_first(read)      # the first process reads, all get what it returns
    part = processes.agree(compute)       # every process computes; where one fails, all raise its error

An error is exchanged once. In a process that received it, `received(error)` is true: the one where it was raised tells
of it. No training step belongs in `agree`: a process that fails there leaves the others waiting in the step's own sums.
"""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

__all__ = ["PATIENCE", "Processes", "received"]

#: How long a group may wait: the first process may judge for hours meanwhile. A process that dies ends the waiting.
PATIENCE = datetime.timedelta(days=30)

Result = TypeVar("Result")


class _Said(NamedTuple):
    """What a process hands to the others."""

    value: Any
    error: Exception | None


class Processes:
    """The processes of `group`, whose collectives take objects of the host; without one, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self.size: int = 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def agree(self, work: Callable[[], Result]) -> Result:
        """`work()` in every process. Where it fails in one, all raise that one's error, of the least rank."""
        found: Result = self._exchanged(work)[0]
        return found

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """What `work()` returns in every process, by rank. Fails as `agree` does."""
        return self._exchanged(work, share=True)[1]

    def of_first(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns in the first process, in all; the others wait. Its error is raised in all."""
        found: Result = self.gather(lambda: work() if self.first else None)[0]  # type: ignore[assignment]
        return found

    def first_alone(self, work: Callable[[], Result]) -> Result | None:
        """As `of_first`, but the others get None: for what is large, or theirs alone who asked for it."""
        return self.agree(lambda: work() if self.first else None)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return any(self.gather(lambda: flag))

    def _exchanged(self, work: Callable[[], Any], share: bool = False) -> tuple[Any, list[Any]]:
        """(what `work()` returns here, what it returns in every process, if these `share`)."""
        if self.group is None:
            mine = work()
            return mine, [mine]
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            if hasattr(raised, _EXCHANGED):  # within: all know of it
                raise
            error = raised
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, _Said(value if share else None, _portable(error)), group=self.group)
        failed = [rank for rank, said in enumerate(everybody) if said.error is not None]
        if failed and failed[0] == self.rank:
            assert error is not None
            setattr(error, _EXCHANGED, False)
            raise error
        if failed:
            theirs = everybody[failed[0]].error
            setattr(theirs, _EXCHANGED, True)
            raise theirs
        return value, [said.value for said in everybody]


_EXCHANGED = "_fastkd_received"  # of an error that all processes know: whether it is another's


def received(error: BaseException) -> bool:
    """Whether an error was raised in another process, which tells of it."""
    return bool(getattr(error, _EXCHANGED, False))


def _portable(error: Exception | None) -> Exception | None:
    """An error that can be sent: itself, or its text where it cannot."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
