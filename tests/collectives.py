"""A process group that counts: which collectives it is asked for, and the bytes that each works on.

    group = counting()                       # of all processes, beside the one that `tests.processes` makes
    ... anything that communicates over it ...
    assert group.moved() == {"all_gather": 48}

It is a `ProcessGroup` of its own type, so what C++ sends is seen too, as DDP's reducer does; and a collective that it
does not know raises, since the group has nothing to run it on. A dispatch mode, as `CommDebugMode` is, would be off
inside the loss's operators.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist

__all__ = ["Counting", "counting"]


class Counting(dist.ProcessGroup):
    """Hands collectives on to a group of the same ranks."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.rank(), inner.size())
        self._inner = inner
        self._moved: Counter[str] = Counter()

    def moved(self) -> dict[str, int]:
        """Bytes since the last question, by kind: of all ranks where they gather or scatter, of one where they add."""
        found = dict(self._moved)
        self._moved.clear()
        return found

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def getBackendName(self) -> str:
        return "counting"

    def allreduce(self, tensors: list[Any], *options: Any) -> Any:
        self._moved["all_reduce"] += sum(tensor.nbytes for tensor in tensors)
        return self._inner.allreduce(tensors, *options)

    def all_gather_single(self, out: Any, own: Any, *options: Any) -> Any:
        self._moved["all_gather"] += out.nbytes
        return self._inner._allgather_base(out, own, *options)

    def reduce_scatter_single(self, out: Any, own: Any, *options: Any) -> Any:
        self._moved["reduce_scatter"] += own.nbytes
        return self._inner._reduce_scatter_base(out, own, *options)

    def allgather(self, out: list[list[Any]], own: list[Any], *options: Any) -> Any:
        self._moved["all_gather"] += sum(tensor.nbytes for tensors in out for tensor in tensors)
        return self._inner.allgather(out, own, *options)

    def broadcast(self, tensors: list[Any], *options: Any) -> Any:
        self._moved["broadcast"] += sum(tensor.nbytes for tensor in tensors)
        return self._inner.broadcast(tensors, *options)

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # older torch's names


def counting() -> Counting:
    """A group of all processes; every process makes it."""
    inner = dist.group.WORLD
    if not hasattr(dist.Backend, "COUNTING"):
        dist.Backend.register_backend("counting", lambda *_: Counting(inner), devices=["cpu"])
    group = dist.new_group(backend="counting")
    assert isinstance(group, Counting)
    return group
