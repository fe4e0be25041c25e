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
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastkd.backend import select
from fastkd.call import Call
from fastkd.divergences import ForwardKL, of_spec
from fastkd.projection.columns import (
    Columns,
    States,
    columns_of,
    is_recut,
    same_on_all_ranks,
    shared_rows,
    teachers_layout,
)
from fastkd.projection.plan import ROW_ALONE, Plan, fixed_budget, plan_for
from fastkd.projection.sides import (
    Gradients,
    Head,
    RowIndex,
    autocast_dtype,
    head_size,
    part_of,
    student_side,
)
from fastkd.projection.teachers import Sparse, teacher_side, teacher_sizes
from fastkd.ranks import exchanged_bytes
from fastkd.rows import NOTHING, SparseRows, Stage, Tile, Wants, row_count, row_dtype
from fastkd.sources import Projection

__all__ = ["check_budget", "for_backward", "from_hidden_states", "logit_chunks"]


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
        if loop.states is not None:
            loop.states.keep()
        return loop.soft, loop.hard, loop.student.gradients()


def check_budget(call: Call, wants: Wants) -> None:
    """ValueError where `memory_budget` is too small for these gradients: the loop itself would find it out later."""
    columns = columns_of(call)
    _plan(call, _live_rows(call, columns), wants, columns)


def for_backward(call: Call, wants: Wants) -> Call:
    """The call as its backward can compute it again: the budget suffices, and autograd may keep the tensors."""
    if not call.on_logits:
        check_budget(call, wants)
    if not any(tensor is not None and tensor.is_inference() for tensor in call.tensors):
        return call
    kept = [x if x is None or not x.is_inference() else x.clone() for x in call.tensors]
    return Call.of(kept, call.numbers)


def _plan(call: Call, live: RowIndex, wants: Wants, columns: Columns) -> Plan:
    spread = columns.layout or teachers_layout(call)
    budget = call.memory_budget
    if budget is None and spread is not None:
        budget = fixed_budget(call.student.device)  # what is free is another number on each rank
    entries = 0 if call.teacher_ids is None else call.teacher_ids.shape[-1]
    return plan_for(
        max(_count(live), 1),
        columns.widest,
        head_size(call.student_source(), call.autocast),
        teacher_sizes(call, columns),
        wants,
        of_spec(call.divergence, call.parameters),
        call.student.device,
        budget,
        whole_teacher=call.teacher_ids is None,
        own_exponential=call.hard_scale is not None and call.temperature not in (1, 2, 3, 4),
        tiles_allowed=hasattr(select(call.student), "tile_state") and not call.teacher_mixed and not is_recut(call),
        gathered=isinstance(live, Tensor) and not _tells(call),
        shared=0 if columns.layout is None else exchanged_bytes(len(columns.layout.widths), entries),
    )


def _shared_plan(call: Call, live: RowIndex, wants: Wants, columns: Columns) -> Plan:
    """The same on all ranks that compute a row together."""
    plan, spread = _plan(call, live, wants, columns), columns.layout or teachers_layout(call)
    known = wants.any and call.row_state is not None
    if spread is None or (known and not is_recut(call)):  # then nothing is exchanged
        return plan
    # Ranks meet at each chunk. What the kernels keep depends on a rank's threads, so they may have planned others.
    whole, chunk, group, tile = same_on_all_ranks(call, (plan.strategy == "chunks", plan.chunk, plan.group, plan.tile))
    return replace(plan, strategy="chunks" if whole else "tiles", chunk=chunk, group=group, tile=tile)


def _live_rows(call: Call, columns: Columns) -> RowIndex:
    """The rows to compute: those with a scale, where their number is known, else all. All too without products."""
    count, told = row_count(call.student), call.live
    scales = [scale for scale in (call.soft_scale, call.hard_scale) if scale is not None]
    if (
        not scales
        or not _has_products(call, columns)
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


def _has_products(call: Call, columns: Columns) -> bool:
    """Whether logits are computed: else kernels skip the rows that do not count, and nothing else would be spared."""
    taught = set(teacher_sizes(call, columns))
    return not call.teacher_mixed or call.student_weight is not None or taught != {ROW_ALONE}


def _tells(call: Call) -> bool:
    """Whether values of tensors can be looked at without waiting."""
    return call.student.device.type == "cpu"


class _Loop:
    def __init__(self, call: Call, grad: Tensor | None, wants: Wants) -> None:
        self.columns = columns_of(call)
        self.live = _live_rows(call, self.columns)
        self.plan = _shared_plan(call, self.live, wants, self.columns)  # before gradients take what is free
        self.student = student_side(call, wants, grad, self.columns.width)
        self.teacher = teacher_side(call, self.columns)
        self.spec, self.wants = call.spec, wants
        self.labels, self.soft_scale, self.hard_scale = call.labels, call.soft_scale, call.hard_scale
        self.backend = select(call.student)
        count, device = row_count(call.student), call.student.device
        dtype = row_dtype(call.student.dtype)
        self.soft, self.hard = (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))
        for side in (self.student, self.teacher):
            if side is not None:
                side.allocate(self.plan.chunk, self.plan.group, self.plan.tile)
        self.shared = shared_rows(call, self.columns)
        self.states = None if self.shared is None else States(call, self.shared, wants.any)
        self.state = None if self.states is None else self.states.all
        self.known = self.states is not None and self.states.known
        tiled = self.shared is None and self.plan.strategy == "tiles"
        self.group_state = self.backend.tile_state(self.plan.group, device) if tiled else None

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
        state = self.group_state if self.state is None else self.state[rows]
        tiles = list(_steps(self.columns.width, self.plan.tile)) or [slice(0, 0)]  # a rank takes part without columns
        for stage in self._stages():
            differentiates = self.wants.any and stage in ("whole", "gradient")
            for columns in tiles:
                for part, labels, soft, hard in zip(parts, *scalars, strict=True):
                    student = self.student.logits(columns, part)
                    teacher = None if self.teacher is None else self.teacher.logits(columns, part)
                    place = self.student.gradient_place(columns, part, student) if differentiates else None
                    own, row = None if state is None else state[part], (labels, soft, hard)
                    values = self._values(stage, columns.start, student, teacher, row, place, own)
                    if place is not None:
                        self.student.take_gradient(columns, part, place)
                    if stage != "gradient" and columns.stop == self.columns.width:
                        where = part_of(rows, part)
                        self.soft[where], self.hard[where] = values
                if differentiates:
                    self.student.multiply(columns)
            if self.shared is not None and state is not None and stage in ("statistics", "terms"):
                beside = self._teacher_of_group(rows)
                self.shared.exchange(stage, state, given[0] if given[2] is not None else None, beside)
                self.soft[rows], self.hard[rows] = self.shared.values(beside, given[0], given[1], given[2], state)
        if self.state is not None and state is not None and isinstance(rows, Tensor) and not self.known:
            self.state[rows] = state
            if isinstance(self.teacher, Sparse):
                self.teacher.keep_picked()
        self.student.finish()

    def _teacher_of_group(self, rows: RowIndex) -> Tensor | SparseRows | None:
        """What is known of a group's rows; of a dense teacher no columns."""
        if self.teacher is None or not self.teacher.whole:
            return None if self.teacher is None else self.teacher.logits(slice(0, 0), slice(0, _count(rows)))
        return self.soft.new_empty(_count(rows), 0)

    def _values(
        self,
        stage: Stage | Literal["whole"],
        first: int,
        student: Tensor,
        teacher: Tensor | SparseRows | None,
        row: tuple[Tensor | None, Tensor | None, Tensor | None],
        place: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One call of the backend, or those that ranks make together."""
        if self.shared is not None and stage == "whole":
            return self.shared.kd_rows(student, teacher, *row, place, state, self.known)
        origin = self.columns.first
        tile = () if stage == "whole" or state is None else (Tile(stage, origin + first, state, origin),)
        return self.backend.kd_rows(student, teacher, *row, self.spec, place, *tile)

    def _stages(self) -> Iterator[Stage | Literal["whole"]]:
        if self.plan.strategy == "chunks":
            yield "whole"
            return
        whole_teacher = self.teacher is not None and self.teacher.whole
        if not self.known:
            yield "statistics"
        if not self.known and whole_teacher and of_spec(self.spec.divergence, self.spec.parameters).normalised:
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
    head = Head(source.detach().whole(), slice(0, vocab_size), autocast, NOTHING)
    chunk = plan_for(
        max(count, 1),
        max(vocab_size, 1),  # a rank may have none
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
