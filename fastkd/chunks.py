"""The loss from hidden states: one loop over chunks of tokens and tiles of the vocabulary.

Per chunk: logits of student and teacher into reused fp32 buffers, one fused row kernel that writes the gradient over
the student's, then the products for hidden states and weight. Under the "tiles" plan the same for one tile of columns
after another, once per stage of the kernel.

On the CPU, rows that nothing depends on (masked tokens) are left out before any product. On a GPU that would need
their number, a synchronisation: there the kernel skips them, the products do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkd.backend import SparseRows, Tile, select
from fastkd.call import Call
from fastkd.divergences import TABLE
from fastkd.heads import Head
from fastkd.plan import NOTHING, Plan, Side, Wants, padded, plan_for
from fastkd.sources import Projection, SparseTargets
from fastkd.sparse import sparse_rows

__all__ = ["Gradients", "check_budget", "kd_rows"]

Rows = slice | Tensor


class Gradients(NamedTuple):
    """Of the student: of its logits or hidden states, and of its head."""

    student: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class _Logits:
    """A tensor of logits, offering what `Head` offers. The gradient goes to `grad`, which may be the logits."""

    def __init__(self, logits: Tensor, grad: Tensor | None) -> None:
        self._logits, self._grad = _as_matrix(logits), None if grad is None else _as_matrix(grad)

    def start(self, rows: Rows, slope: Tensor | None) -> None:
        self._rows = rows

    def logits(self, columns: slice, out: Tensor | None) -> Tensor:
        return self._logits[self._index(self._logits, columns)]

    def gradient_place(self, columns: slice, logits: Tensor, narrow: Tensor | None) -> Tensor:
        """Where the kernel is to write: the gradient itself, or over rows that had to be gathered."""
        assert self._grad is not None
        return self._grad[self._rows, columns] if self._in_reach(self._grad) else logits

    def add_gradient(self, columns: slice, grad: Tensor) -> None:
        assert self._grad is not None
        if not self._in_reach(self._grad):
            self._grad[self._index(self._grad, columns)] = grad

    def finish(self) -> None:
        """Nothing is left to do."""

    def _in_reach(self, tensor: Tensor) -> bool:
        return isinstance(self._rows, slice) and tensor.dim() == 2

    def _index(self, tensor: Tensor, columns: slice) -> tuple[Rows, ...]:
        rows = self._rows
        if tensor.dim() == 2:
            return rows, columns
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=tensor.device)
        return (*torch.unravel_index(rows, tensor.shape[:-1]), columns)


class _Sparse:
    """A teacher of which K tokens are known, likewise: no logits, but the rows of a chunk."""

    def __init__(self, rows: SparseRows) -> None:
        self._all = rows

    def start(self, rows: Rows, slope: Tensor | None) -> None:
        self._chunk = self._all.part(rows)  # once, since what the tiles pick of the student is kept in it

    def logits(self, columns: slice, out: Tensor | None) -> SparseRows:
        return self._chunk


def _as_matrix(tensor: Tensor) -> Tensor:
    """`[rows, V]` without a copy; as it is where its strides do not allow that. Copied where columns lie apart."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return tensor


def kd_rows(call: Call, grad: Tensor | None, wants: Wants) -> tuple[Tensor, Tensor, Gradients]:
    """`Backend.kd_rows` where at least one of student and teacher is a `Projection`: soft and hard values, gradients.

    `grad` takes the gradient of a student that is a tensor, which it may be; masked rows and padding stay as they are.
    """
    with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
        loop = _Loop(call, grad, wants)
        for rows in loop.chunks():
            loop.run(rows)
        return loop.soft, loop.hard, loop.gradients()


def check_budget(call: Call, wants: Wants) -> None:
    """ValueError where `memory_budget` is too small for these gradients: `Backend.kd_rows` would find it out later."""
    sides = [
        Head(source, call.vocab_size, call.autocast, NOTHING).side if isinstance(source, Projection) else None
        for source in (call.student_source(), call.teacher_source())
    ]
    _plan(call, sides, _count(_live_rows(call)), wants)


def _plan(call: Call, sides: Sequence[Side | None], rows: int, wants: Wants) -> Plan:
    student, teacher = sides
    return plan_for(
        max(rows, 1),
        call.vocab_size,
        student,
        teacher,
        wants,
        TABLE[call.divergence](*call.parameters),
        call.student.device,
        call.memory_budget,
        whole_teacher=call.sparse_ids is None,
        own_exponential=call.hard_scale is not None and call.temperature not in (1, 2, 3, 4),
        tiles_allowed=hasattr(select(call.student), "tile_state"),
    )


def _live_rows(call: Call) -> Rows:
    """The rows to compute: all, or on the CPU those with a scale."""
    count = call.student.shape[:-1].numel()
    scales = [scale for scale in (call.soft_scale, call.hard_scale) if scale is not None]
    if call.student.device.type != "cpu" or not scales:
        return slice(0, count)
    live = torch.stack([scale != 0 for scale in scales]).any(0).nonzero()[:, 0]
    return slice(0, count) if len(live) == count else live


class _Loop:
    def __init__(self, call: Call, grad: Tensor | None, wants: Wants) -> None:
        student, teacher = call.student_source(), call.teacher_source()
        self.spec, self.wants = call.spec, wants
        self.labels, self.soft_scale, self.hard_scale = call.labels, call.soft_scale, call.hard_scale
        self.device = call.student.device
        self.backend = select(call.student)
        count = call.student.shape[:-1].numel()
        dtype = torch.float64 if call.student.dtype == torch.float64 else torch.float32
        self.soft, self.hard = (torch.zeros(count, dtype=dtype, device=self.device) for _ in range(2))
        self.live = _live_rows(call)
        self.student: Head | _Logits
        self.teacher: Head | _Logits | _Sparse | None = None
        if isinstance(student, Projection):
            self.student = Head(student, call.vocab_size, call.autocast, wants)
        else:
            self.student = _Logits(student, grad)
        if isinstance(teacher, Projection):
            self.teacher = Head(teacher, call.vocab_size, call.autocast, NOTHING)
        elif isinstance(teacher, SparseTargets):
            self.teacher = _Sparse(sparse_rows(teacher, self.soft_scale, call.vocab_size, dtype))
        elif teacher is not None:
            self.teacher = _Logits(teacher, None)
        sides = [side.side if isinstance(side, Head) else None for side in (self.student, self.teacher)]
        self.plan = _plan(call, sides, _count(self.live), wants)
        self._allocate()

    def _allocate(self) -> None:
        def buffer(side: Head | _Logits | _Sparse | None, dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
            if not isinstance(side, Head) or not wanted:
                return None
            return torch.empty(self.plan.chunk, padded(self.plan.tile), dtype=dtype, device=self.device)

        student, dtype = self.student, self.soft.dtype
        self.student_buffer, self.teacher_buffer = buffer(student, dtype), buffer(self.teacher, dtype)
        self.slope_buffer = self.narrow_buffer = None
        if isinstance(student, Head) and self.wants.any:
            capped = student.softcap is not None
            self.slope_buffer = buffer(student, dtype, capped)
            self.narrow_buffer = buffer(student, student.operand, not capped and student.operand != dtype)
        if self.plan.strategy == "tiles":
            self.state = self.backend.tile_state(self.plan.chunk, self.device)

    def chunks(self) -> Iterator[Rows]:
        end, step = _count(self.live), self.plan.chunk
        for start in range(0, end, step):
            part = slice(start, min(start + step, end))
            yield part if isinstance(self.live, slice) else self.live[part]

    def run(self, rows: Rows) -> None:
        """Everything about one chunk of tokens."""
        count = _count(rows)
        self.student.start(rows, None if self.slope_buffer is None else self.slope_buffer[:count])
        if self.teacher is not None:
            self.teacher.start(rows, None)
        labels, soft_scale, hard_scale = (
            None if x is None else x[rows] for x in (self.labels, self.soft_scale, self.hard_scale)
        )
        for stage in self._stages():
            for columns in self._tiles():
                student = self.student.logits(columns, _part(self.student_buffer, count, columns))
                teacher: Tensor | SparseRows | None = None
                if self.teacher is not None:
                    teacher = self.teacher.logits(columns, _part(self.teacher_buffer, count, columns))
                place = None
                if self.wants.any and stage in ("whole", "gradient"):
                    place = self.student.gradient_place(columns, student, _part(self.narrow_buffer, count, columns))
                tile = () if stage == "whole" else (Tile(stage, columns.start, self.state[:count]),)
                values = self.backend.kd_rows(student, teacher, labels, soft_scale, hard_scale, self.spec, place, *tile)
                if place is not None:
                    self.student.add_gradient(columns, place)
            if stage != "gradient":
                self.soft[rows], self.hard[rows] = values
        self.student.finish()

    def _stages(self) -> Iterator[Literal["whole", "statistics", "terms", "gradient"]]:
        if self.plan.strategy == "chunks":
            yield "whole"
            return
        yield "statistics"
        if isinstance(self.teacher, Head | _Logits) and TABLE[self.spec.divergence].normalised:
            yield "terms"
        if self.wants.any:
            yield "gradient"

    def _tiles(self) -> Iterator[slice]:
        for start in range(0, self.spec.vocab_size, self.plan.tile):
            yield slice(start, min(start + self.plan.tile, self.spec.vocab_size))

    def gradients(self) -> Gradients:
        if isinstance(self.student, Head):
            return Gradients(*self.student.gradients())
        return Gradients()


def _count(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


def _part(buffer: Tensor | None, rows: int, columns: slice) -> Tensor | None:
    return None if buffer is None else buffer[:rows, : columns.stop - columns.start]
