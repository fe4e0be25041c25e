"""The loss from hidden states: one loop over groups of tokens, tiles of the vocabulary and chunks of a group.

Per chunk: logits of student and teacher into reused fp32 buffers, and one fused row kernel. It writes the gradient over
the student's logits or, where products take 16 bits, beside them, rounded. Per group: the products for hidden states
and weight. A group is one chunk, except where a product with the head's gradient, which is read and written in fp32,
would be too short for its memory traffic. Under the "tiles" plan the same for one tile of columns after another, once
per stage of the kernel.

Rows that nothing depends on (masked tokens) are left out before any product. On a GPU that needs their number to be
known on the host (`Call.live`), since finding it out would be a synchronisation. Where it is not known, the kernel
skips them and the products do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fastkd.backend import select
from fastkd.call import Call
from fastkd.divergences import ForwardKL, of_spec
from fastkd.projection.plan import ROW_ALONE, Plan, plan_for
from fastkd.projection.sides import (
    Gradients,
    Head,
    RowIndex,
    autocast_dtype,
    head_size,
    part_of,
    student_side,
)
from fastkd.projection.teachers import teacher_side, teacher_sizes
from fastkd.rows import NOTHING, Stage, Tile, Wants, row_count, row_dtype
from fastkd.sources import Projection

__all__ = ["check_budget", "from_hidden_states", "logit_chunks"]


#: Where fewer than one row in so many could be left out on a GPU, all are computed: to copy the hidden states of those
#: that count, and their gradients back, moves bytes for as long as the products of about 700 rows in V take.
_FEW = 32


def from_hidden_states(call: Call, grad: Tensor | None, wants: Wants) -> tuple[Tensor, Tensor, Gradients]:
    """`Backend.kd_rows` where at least one of student and teacher is a `Projection`: soft and hard values, gradients.

    `grad` takes the gradient of a student that is a tensor, which it may be; masked rows and padding stay as they are.
    """
    with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
        loop = _Loop(call, grad, wants)
        for rows in loop.groups():
            loop.run(rows)
        return loop.soft, loop.hard, loop.student.gradients()


def check_budget(call: Call, wants: Wants) -> None:
    """ValueError where `memory_budget` is too small for these gradients: the loop itself would find it out later."""
    _plan(call, _live_rows(call), wants)


def _plan(call: Call, live: RowIndex, wants: Wants) -> Plan:
    return plan_for(
        max(_count(live), 1),
        call.vocab_size,
        head_size(call.student_source(), call.autocast),
        teacher_sizes(call),
        wants,
        of_spec(call.divergence, call.parameters),
        call.student.device,
        call.memory_budget,
        whole_teacher=call.teacher_ids is None,
        own_exponential=call.hard_scale is not None and call.temperature not in (1, 2, 3, 4),
        tiles_allowed=hasattr(select(call.student), "tile_state") and not call.teacher_mixed,
        gathered=isinstance(live, Tensor) and not _tells(call),
    )


def _live_rows(call: Call) -> RowIndex:
    """The rows to compute: those with a scale, where their number is known, else all. All too without products."""
    count, told = row_count(call.student), call.live
    scales = [scale for scale in (call.soft_scale, call.hard_scale) if scale is not None]
    if (
        not scales
        or not _has_products(call)
        or (not _tells(call) and (told is None or count - told < max(count // _FEW, 1)))
    ):
        return slice(0, count)
    counts = torch.stack([scale != 0 for scale in scales]).any(0)
    if not _tells(call) and told is not None:
        # Those that count come first, in their order. If they are fewer than `live`, what follows has no scale. One row
        # at least, so that a number that is wrong shows in the gradients.
        return torch.argsort(counts.logical_not().to(torch.uint8), stable=True)[: max(told, 1)]
    live = counts.nonzero()[:, 0]
    return slice(0, count) if len(live) == count else live


def _has_products(call: Call) -> bool:
    """Whether logits are computed: else kernels skip the rows that do not count, and nothing else would be spared."""
    return not call.teacher_mixed or call.student_weight is not None or teacher_sizes(call) != (ROW_ALONE,)


def _tells(call: Call) -> bool:
    """Whether values of tensors can be looked at without waiting."""
    return call.student.device.type == "cpu"


class _Loop:
    def __init__(self, call: Call, grad: Tensor | None, wants: Wants) -> None:
        self.live = _live_rows(call)
        self.plan = _plan(call, self.live, wants)  # before gradients take what is free
        self.student, self.teacher = student_side(call, wants, grad), teacher_side(call)
        self.spec, self.wants = call.spec, wants
        self.labels, self.soft_scale, self.hard_scale = call.labels, call.soft_scale, call.hard_scale
        self.backend = select(call.student)
        count, device = row_count(call.student), call.student.device
        dtype = row_dtype(call.student.dtype)
        self.soft, self.hard = (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))
        for side in (self.student, self.teacher):
            if side is not None:
                side.allocate(self.plan.chunk, self.plan.group, self.plan.tile)
        if self.plan.strategy == "tiles":
            self.state = self.backend.tile_state(self.plan.group, device)

    def groups(self) -> Iterator[RowIndex]:
        for part in _steps(_count(self.live), self.plan.group):
            yield part_of(self.live, part)

    def run(self, rows: RowIndex) -> None:
        """Everything about one group of tokens."""
        self.student.start(rows)
        if self.teacher is not None:
            self.teacher.start(rows)
        given = [None if x is None else x[rows] for x in (self.labels, self.soft_scale, self.hard_scale)]
        parts = list(_steps(_count(rows), self.plan.chunk))
        scalars = [[None if x is None else x[part] for part in parts] for x in given]
        for stage in self._stages():
            differentiates = self.wants.any and stage in ("whole", "gradient")
            for columns in _steps(self.spec.vocab_size, self.plan.tile):
                for part, labels, soft, hard in zip(parts, *scalars, strict=True):
                    student = self.student.logits(columns, part)
                    teacher = None if self.teacher is None else self.teacher.logits(columns, part)
                    place = self.student.gradient_place(columns, part, student) if differentiates else None
                    tile = () if stage == "whole" else (Tile(stage, columns.start, self.state[part]),)
                    values = self.backend.kd_rows(student, teacher, labels, soft, hard, self.spec, place, *tile)
                    if place is not None:
                        self.student.take_gradient(columns, part, place)
                    if stage != "gradient" and columns.stop == self.spec.vocab_size:
                        where = part_of(rows, part)
                        self.soft[where], self.hard[where] = values
                if differentiates:
                    self.student.multiply(columns)
        self.student.finish()

    def _stages(self) -> Iterator[Stage | Literal["whole"]]:
        if self.plan.strategy == "chunks":
            yield "whole"
            return
        yield "statistics"
        if (
            self.teacher is not None
            and self.teacher.whole
            and of_spec(self.spec.divergence, self.spec.parameters).normalised
        ):
            yield "terms"
        if self.wants.any:
            yield "gradient"


def _steps(count: int, step: int) -> Iterator[slice]:
    """0 … count in steps."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _count(rows: RowIndex) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


@torch.no_grad()
def logit_chunks(source: Projection, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """The first `vocab_size` logits of some tokens at a time, without gradient: (tokens, `[tokens, vocab_size]`).

    fp32, or float64 where the projection is. Tokens are the collapsed leading dimensions. Each chunk overwrites the
    one before.
    """
    count, device = source.shape[:-1].numel(), source.device
    autocast = autocast_dtype(device)
    source = source.detach().whole()
    head = Head(source, vocab_size, autocast, NOTHING)
    chunk = plan_for(
        max(count, 1),
        vocab_size,
        head_size(source, autocast),
        (),
        NOTHING,
        ForwardKL(),
        device,
        memory_budget=None,
        tiles_allowed=False,
    ).chunk
    head.allocate(min(chunk, count), min(chunk, count), vocab_size)
    for rows in _steps(count, chunk):
        with torch.autocast(device.type, enabled=False):
            head.start(rows)
            logits = head.logits(slice(0, vocab_size), slice(0, rows.stop - rows.start))
        yield rows, logits
