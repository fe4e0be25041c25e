"""What ranks tell each other before they compute: their columns, and that all were called alike.

A call of several ranks begins with questions (`layout_of`, `agreed`). Each is one gather of numbers, of one size
whatever is asked: so ranks that ask different things find it out, where they would wait for each other. And a rank that
refuses its arguments takes part before it raises (`together`): then all raise.

Values are looked at, and so the host waits, on CPUs; on GPUs with FASTKD_DEBUG=1 (`arguments.is_checked`).
"""

from __future__ import annotations

import datetime
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkd import arguments, ranks
from fastkd.ranks import Layout
from fastkd.shards import VocabShard

__all__ = ["QUESTION_BYTES", "agreed", "checksum", "layout_of", "together"]

_NUMBERS = 16  # of a question, with its own
#: What a rank tells in one.
QUESTION_BYTES = 8 * _NUMBERS
_WITHDRAWN = -1  # in the place of a question's number, which is none below 0
_PATIENCE = datetime.timedelta(seconds=30)  # of a rank with an error, for the others: perhaps nobody else calls

_layouts: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Layout]] = weakref.WeakKeyDictionary()


class _Begun(threading.local):
    """The groups of the call at hand whose ranks have not agreed yet, and their devices."""

    def __init__(self) -> None:
        self.groups: dict[str, torch.device] = {}


_begun = _Begun()


def together(sources: Sequence[Any], call: Callable[..., Any], *given: Any) -> Any:
    """`call(*given)`, which all ranks make that share a source: where one raises before they agreed, all do."""
    if torch.compiler.is_compiling():
        return call(*given)
    groups = {source.group: source.device for source in sources if _is_asked(source)}
    if not groups:
        return call(*given)
    _begun.groups = groups
    try:
        return call(*given)
    except Exception:
        _withdraw(_begun.groups)
        raise
    finally:
        _begun.groups = {}


def layout_of(
    group: str, first: int, width: int, vocab_size: int, device: torch.device, *, again: bool = False
) -> Layout:
    """Ask all ranks for their columns. ValueError, on all, where they do not make up the vocabulary.

    Once for each cut or, with `again`, whatever is known: a rank that is given another cut is found out by the others.
    """
    known = _layouts.setdefault(ranks.members(group), {})
    key = (first, width, vocab_size)
    if again or key not in known:
        told = [numbers[:3] for numbers in _told(group, device, "columns", key)]
        held = sorted((start, start + size) for start, size, _ in told)
        starts, ends = [start for start, _ in held], [0, *(stop for _, stop in held)]
        if {total for *_, total in told} != {ends[-1]} or starts != ends[:-1]:
            each = "; ".join(f"rank {r} has [{at}, {at + size}) of {total}" for r, (at, size, total) in enumerate(told))
            _refuse(group, f"the ranks' columns do not make up one vocabulary, each on one rank: {each}")
        rank = ranks.members(group).rank()
        known[key] = Layout(group, rank, tuple(t[0] for t in told), tuple(t[1] for t in told))
    return known[key]


def agreed(
    layouts: Sequence[Layout], device: torch.device, same: dict[str, Any], least: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Check that `same` is the same on all ranks of these groups; the least of each of `least` on any of them.

    The last question of a call: from here on a rank is left alone with its errors.
    """
    own = [zlib.crc32(repr(value).encode()) for value in same.values()]
    for layout in layouts:
        told = _told(layout.group, device, ", ".join(same), (*own, *least))
        for at, (name, value) in enumerate(same.items()):
            if len({numbers[at] for numbers in told}) > 1:
                _refuse(
                    layout.group,
                    f"the ranks of a sharded loss must have the same {name}; rank {layout.rank} has {value}, others "
                    "differ",
                )
        least = tuple(min(numbers[len(own) + i] for numbers in told) for i in range(len(least)))
    _begun.groups = {}
    return least


def checksum(values: Tensor | None) -> int | None:
    """Of a vector's bits and where they stand; the same in whatever order they are added up."""
    if values is None:
        return None
    bits = values.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[values.dtype.itemsize]).to(torch.int64)
    places = torch.arange(1, len(values) + 1, dtype=torch.int64, device=values.device)
    return int((bits * places).sum())


def _is_asked(source: Any) -> bool:
    if not isinstance(source, VocabShard):
        return False
    own = source.source
    return arguments.is_checked(own if isinstance(own, Tensor) else own.hidden)


def _told(group: str, device: torch.device, question: str, numbers: Sequence[int]) -> list[list[int]]:
    """What each rank answers. ValueError on all where one has withdrawn, or was asked something else."""
    own = [zlib.crc32(question.encode()), *numbers]
    row = torch.tensor([own + [0] * (_NUMBERS - len(own))], dtype=torch.int64, device=device)
    told = ranks.gathered(row, group)[:, 0].tolist()
    if gone := [rank for rank, numbers in enumerate(told) if numbers[0] == _WITHDRAWN]:
        _refuse(group, f"rank {gone[0]} of the group raised an error before all ranks agreed: see there")
    if len({numbers[0] for numbers in told}) > 1:
        _refuse(group, "the ranks of a sharded loss must be called alike: with sources of the same kinds, cut alike")
    return [numbers[1:] for numbers in told]


def _refuse(group: str, message: str) -> NoReturn:
    """Raise what every rank of the group raises."""
    _begun.groups.pop(group, None)
    raise ValueError(message)


def _withdraw(groups: dict[str, torch.device]) -> None:
    """Let the ranks that wait in these groups know, in whatever order they ask."""
    rows = {
        group: torch.full((1, _NUMBERS), _WITHDRAWN, dtype=torch.int64, device=device)
        for group, device in groups.items()
    }
    answers = [ranks.gathering(row, group) for group, row in rows.items()]
    for arrived in answers:
        try:
            arrived(_PATIENCE)
        except RuntimeError:  # nobody came: the error that is on its way says more
            return
