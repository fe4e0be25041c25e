"""Which columns of the vocabulary a loss computes here.

All of them, where the student is whole. Where it is a `VocabShard`, those of this rank (`fastkd.ranks`). A teacher
that is whole, or spread in the same way, has its part of them at hand. Of one that is spread otherwise rows are
gathered.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastkd.backend import select
from fastkd.call import Call
from fastkd.ranks import Layout, Rows, agreed, layout_of
from fastkd.rows import SparseRows, row_count

__all__ = [
    "Columns",
    "columns_of",
    "in_chunks",
    "is_recut",
    "over_ranks",
    "same_on_all_ranks",
    "shared_rows",
    "teachers_layout",
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
    same_on_all_ranks(call, columns.layout)
    own = slice(0, columns.width)
    if isinstance(teacher, Tensor):
        teacher = teacher[..., own if call.teacher_cut else columns.slice]
    place = None
    if grad is not None:
        grad[..., columns.width :] = 0
        place = grad[..., own]
    state = call.row_state
    if state is None:
        state = shared.new_state(row_count(student), student.device)
    known = call.row_state is not None
    return shared.kd_rows(student[..., own], teacher, labels, soft_scale, hard_scale, place, state, known)


def same_on_all_ranks(call: Call, layout: Layout, least: tuple[int, ...] = ()) -> tuple[int, ...]:
    """ValueError where ranks were given different tokens or settings; the least of `least`. See `ranks.agreed`."""
    same = {
        "number of tokens": row_count(call.student),
        "settings of the loss": call.spec,
        "labels": None if call.labels is None else int(call.labels.sum()),
        "weights, masks and divisors": [
            None if scale is None else float(scale.double().sum()) for scale in (call.soft_scale, call.hard_scale)
        ],
        "kinds of teachers": (call.teacher is None, call.teacher_kind, len(call.teacher_mixed)),
    }
    return agreed(layout, call.student, same, least)
