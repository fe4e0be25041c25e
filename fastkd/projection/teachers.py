"""The teacher's side of a loss from hidden states: one teacher's rows, or those of several, mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.backend import Backend, select
from fastkd.call import Call
from fastkd.projection.columns import Columns, is_recut, teachers_layout
from fastkd.projection.plan import ROW_ALONE, HeadSize, padded
from fastkd.projection.sides import Head, Logits, RowIndex, TeacherSide, head_size, held
from fastkd.ranks import Layout, all_columns
from fastkd.rows import NOTHING, SparseRows, row_dtype
from fastkd.sources import Mixture, Projection, SparseTargets, Teacher, VocabShard
from fastkd.sparse import sparse_rows

__all__ = ["rows_at_hand", "teacher_side", "teacher_sizes"]


def teacher_side(call: Call, columns: Columns) -> TeacherSide | None:
    """Of the columns that are computed here."""
    source = call.teacher_source()
    if isinstance(source, Mixture):
        mixed = MixedRows(source, call)
        return mixed if columns.layout is None else Cut(mixed, call.vocab_size, columns)
    if isinstance(source, VocabShard):
        layout = teachers_layout(call)
        assert layout is not None
        own = _side(source.source, slice(0, layout.counts(call.vocab_size)[layout.rank]), call)
        if layout == columns.layout:
            return own
        return Cut(Gathered(own, layout, call.vocab_size), call.vocab_size, columns)
    if isinstance(source, (Tensor, Projection)):
        return _side(source, columns.slice, call)
    rows = rows_at_hand(source, call)
    return Sparse(rows) if isinstance(rows, SparseRows) else None


def _side(source: Tensor | Projection, own: slice, call: Call) -> Head | Logits:
    if isinstance(source, Projection):
        return Head(source, own, call.autocast, NOTHING)
    return Logits(source, None, own)


def teacher_sizes(call: Call, columns: Columns) -> tuple[HeadSize, ...]:
    """What memory and arithmetic depend on, of each buffer of logits that the teacher's side has."""
    source = call.teacher_source()
    members = source.teachers if isinstance(source, Mixture) else (source,)
    sizes = tuple(size for member in members if (size := head_size(member, call.autocast)) is not None)
    sizes = sizes or ((ROW_ALONE,) if isinstance(source, Mixture) else ())
    # Rows that are made whole are as wide as several tiles: those of a mixture; of a gathered teacher twice.
    if isinstance(source, Mixture):
        return sizes * -(-call.vocab_size // columns.widest)
    return sizes + (ROW_ALONE,) * (1 + 2 * -(-call.vocab_size // columns.widest) if is_recut(call) else 0)


def rows_at_hand(teacher: Teacher | None, call: Call) -> Tensor | SparseRows | None:
    """What a backend is given of a teacher that needs no product. Raises TypeError for a source it does not know."""
    if isinstance(teacher, VocabShard):
        teacher = teacher.source
    if isinstance(teacher, SparseTargets):
        dtype = row_dtype(call.student.dtype)
        rows = sparse_rows(teacher, call.soft_scale, call.vocab_size, dtype, select(call.student))
        return rows if call.picked is None else rows._replace(picked=call.picked)
    if teacher is None or isinstance(teacher, Tensor):
        return teacher
    raise TypeError(f"no backend is given rows of a {type(teacher).__name__}")


class Sparse:
    """A sparse teacher: no logits, but what is known of each row."""

    whole: bool = False

    def __init__(self, rows: SparseRows) -> None:
        self._all = rows

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        """Nothing is needed."""

    def start(self, rows: RowIndex) -> None:
        self._rows = rows
        self._group = self._all.part(rows)  # once, since what the tiles pick of the student is kept in it

    def logits(self, columns: slice, part: slice) -> SparseRows:
        return self._group.part(part)

    def keep_picked(self) -> None:
        """Of a group that is no slice, and so a copy."""
        self._all.picked[self._rows] = self._group.picked


class Gathered:
    """A teacher that is spread over ranks: whole rows of it."""

    whole: bool = True

    def __init__(self, own: Head | Logits, layout: Layout, vocab_size: int) -> None:
        self._own, self._layout, self._vocab_size = own, layout, vocab_size
        self._count = layout.counts(vocab_size)[layout.rank]

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        self._own.allocate(chunk, group, self._count)

    def start(self, rows: RowIndex) -> None:
        self._own.start(rows)

    def logits(self, columns: slice, part: slice) -> Tensor:
        own = self._own.logits(slice(0, self._count), part)
        return all_columns(own, self._layout, self._vocab_size)[:, columns]


class Cut:
    """Some columns of a teacher whose rows are computed whole."""

    whole: bool = True

    def __init__(self, rows: Gathered | MixedRows, vocab_size: int, columns: Columns) -> None:
        self._rows, self._vocab_size, self._first = rows, vocab_size, columns.first

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        self._rows.allocate(chunk, group, self._vocab_size)

    def start(self, rows: RowIndex) -> None:
        self._rows.start(rows)

    def logits(self, columns: slice, part: slice) -> Tensor:
        whole = self._rows.logits(slice(0, self._vocab_size), part)
        return whole[:, self._first + columns.start : self._first + columns.stop]


class MixedRows:
    """Several teachers, mixed over the logits of the first projection or, if there is none, in a buffer for that."""

    whole: bool = True

    def __init__(self, mixture: Mixture, call: Call) -> None:
        pairs = sorted(mixture.pairs(), key=lambda pair: not isinstance(pair[0], Projection))
        self._sides = [_side(teacher, slice(0, call.vocab_size), call) for teacher, _ in pairs]
        self._weights = [weight for _, weight in pairs]
        self._temperature, self._scale = call.teacher_temperature, call.soft_scale
        self._backend: Backend = select(call.student)
        self._student = call.student

    def allocate(self, chunk: int, group: int, tile: int) -> None:
        for side in self._sides:
            side.allocate(chunk, group, tile)
        if isinstance(self._sides[0], Logits):
            dtype, device = row_dtype(self._student.dtype), self._student.device
            self._buffer = torch.empty(chunk, padded(tile), dtype=dtype, device=device)

    def start(self, rows: RowIndex) -> None:
        self._scales = None if self._scale is None else self._scale[rows]
        for side in self._sides:
            side.start(rows)

    def logits(self, columns: slice, part: slice) -> Tensor:
        rows = [side.logits(columns, part) for side in self._sides]
        out = held(self._buffer, columns, part) if isinstance(self._sides[0], Logits) else rows[0]
        scales = None if self._scales is None else self._scales[part]
        self._backend.mix_rows(rows, self._weights, self._temperature, scales, out)
        return out
