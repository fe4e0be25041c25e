"""Which columns of the vocabulary a loss computes here.

All of them, where the student is whole. Where it is a `VocabShard`, those of this rank (`fastkd.ranks`). A teacher
that is whole, or spread in the same way, has its part of them at hand. Of one that is spread otherwise rows are
gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import arguments
from fastkd.agreement import agreed, checksum, layout_of
from fastkd.backend import select
from fastkd.call import Call
from fastkd.ranks import Layout, Rows
from fastkd.rows import STATE_BYTES, SparseRows, row_count, row_dtype

__all__ = [
    "Columns",
    "States",
    "columns_of",
    "in_chunks",
    "is_recut",
    "over_ranks",
    "same_on_all_ranks",
    "shared_rows",
    "teachers_layout",
    "with_room_for_state",
]


class Columns(NamedTuple):
    """Columns [first, first + width) of the vocabulary; `widest` is the most that a rank has."""

    layout: Layout | None  # None: they are all here
    first: int
    width: int
    widest: int

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.width)


def columns_of(call: Call) -> Columns:
    """Those that are computed here."""
    layout = _layout(call, "student")
    if layout is None:
        return Columns(None, 0, call.vocab_size, call.vocab_size)
    counts = layout.counts(call.vocab_size)
    return Columns(layout, layout.firsts[layout.rank], counts[layout.rank], max(counts))


def teachers_layout(call: Call) -> Layout | None:
    """How the teacher is spread, or None."""
    return _layout(call, "teacher")


def _layout(call: Call, side: str) -> Layout | None:
    cut, group = getattr(call, f"{side}_cut"), getattr(call, f"{side}_group")
    if not cut:
        return None
    weight, rows = getattr(call, f"{side}_weight"), getattr(call, side)
    return layout_of(group, cut[0], rows.shape[-1] if weight is None else weight.shape[0], cut[1], call.student.device)


def is_recut(call: Call) -> bool:
    """Whether rows of the teacher have to be made whole first: it is spread in another way than the student."""
    return bool(call.teacher_cut) and teachers_layout(call) != _layout(call, "student")


def shared_rows(call: Call, columns: Columns) -> Rows | None:
    """What computes rows of which this rank has some columns, or None where all are here."""
    return None if columns.layout is None else Rows(columns.layout, select(call.student), call.spec)


def in_chunks(call: Call) -> bool:
    """Whether rows are computed some tokens at a time: a side is no tensor of logits, or rows have to be gathered."""
    return not call.on_logits or is_recut(call)


def over_ranks(
    call: Call,
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`Backend.kd_rows` of logits of which this rank has some columns; a teacher may be whole."""
    columns = columns_of(call)
    shared = shared_rows(call, columns)
    assert columns.layout is not None
    assert shared is not None
    states = States(call, shared, known=grad is not None)
    if not states.known:
        same_on_all_ranks(call)
    own = slice(0, columns.width)
    if isinstance(teacher, Tensor):
        teacher = teacher[..., own if call.teacher_cut else columns.slice]
    place = None
    if grad is not None:
        grad[..., columns.width :] = 0
        place = grad[..., own]
    row = (labels, soft_scale, hard_scale)
    values = shared.kd_rows(student[..., own], teacher, *row, place, states.all, states.known)
    states.keep()
    return values


def with_room_for_state(call: Call) -> Call:
    """The call with memory for what a backward would otherwise have to exchange again. See `Call`."""
    if not call.student_cut:
        return call
    rows, device = row_count(call.student), call.student.device
    picked = None
    if call.teacher_ids is not None:
        entries = call.teacher_ids.shape[-1]
        picked = torch.zeros(rows, entries, dtype=row_dtype(call.student.dtype), device=device)
    return call._replace(
        row_state=torch.zeros(rows, STATE_BYTES, dtype=torch.uint8, device=device),
        picked=picked,
    )


class States:
    """What all ranks know of each row, as the backend has it, and as it outlives a call."""

    def __init__(self, call: Call, shared: Rows, known: bool) -> None:
        self.all = shared.new_state(row_count(call.student), call.student.device)
        self.known = known and call.row_state is not None and self.all is not None
        self._outside = call.row_state
        if self.known and self.all is not None and self._outside is not None:
            _bytes(self.all).copy_(self._outside[:, : _bytes(self.all).shape[1]])

    def keep(self) -> None:
        """Leave it for the backward, where the caller wants it."""
        if self._outside is not None and self.all is not None and not self.known:
            self._outside[:, : _bytes(self.all).shape[1]] = _bytes(self.all)


def _bytes(state: Tensor) -> Tensor:
    return state.view(torch.uint8)


def same_on_all_ranks(call: Call, least: tuple[int, ...] = ()) -> tuple[int, ...]:
    """ValueError where ranks were given different tokens or settings; the least of `least`.

    Of all ranks that share the student or the teacher. Not looked at on a GPU, unless FASTKD_DEBUG=1. There `least`
    does not depend on the rank.
    """
    if not arguments.is_checked(call.student):
        return least
    entries = None if call.teacher_ids is None else call.teacher_ids.shape[-1]
    form = (call.student_weight is None, bool(call.student_cut), row_dtype(call.student.dtype))
    same = {
        "number of tokens": row_count(call.student),
        "forms and dtypes of students": form,
        "kinds of teachers": (_has_teacher(call), call.teacher_kind, entries, len(call.teacher_mixed)),
        "settings of the loss": (call.spec, call.student_head, call.teacher_head, call.row_state is not None),
        "hidden states that require a gradient": call.student_weight is not None and call.student.requires_grad,
        "labels (by checksum)": checksum(call.labels),
        "weights, masks and divisors (by checksum)": [checksum(call.soft_scale), checksum(call.hard_scale)],
    }
    layouts = dict.fromkeys(layout for layout in (_layout(call, "student"), teachers_layout(call)) if layout)
    return agreed([*layouts], call.student.device, same, least)


def _has_teacher(call: Call) -> tuple[bool, ...]:
    return call.teacher is not None, call.teacher_weight is not None, bool(call.teacher_cut)
