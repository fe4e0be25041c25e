"""Rows whose columns are on several ranks: what ranks tell each other of a row. Who has which is asked in `agreement`.

A rank is a tile. It sweeps its own columns (`rows.Tile`), and what it knows of a row then goes to all ranks, packed,
once; each merges the same numbers in the same order, so that all have the same bits. Divergences that need
the normalisers first exchange once more, after their terms. Then each writes the gradient of its own columns.

Merged is in float64: exponentials relative to a rank's maxima are moved to those of all ranks, as from tile to tile.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastkd.backend import Backend
from fastkd.divergences import of_spec
from fastkd.rows import RowSpec, SparseRows, Stage, Tile, row_count

__all__ = [
    "Layout",
    "Rows",
    "all_columns",
    "exchanged_bytes",
    "gathered",
    "gathering",
    "members",
    "normaliser_of_ranks",
    "stages",
    "statistics_of_ranks",
    "sum_of_ranks",
]

#: Bytes that an exchange holds at most, but for those of one row.
_EXCHANGED_AT_ONCE = 64 << 20
_LEAST = -torch.finfo(torch.float32).max  # a maximum of no columns, so that differences are no NaN


class Layout(NamedTuple):
    """Which columns of a vocabulary each rank of a group has."""

    group: str
    rank: int
    firsts: tuple[int, ...]
    widths: tuple[int, ...]

    def counts(self, vocab_size: int) -> tuple[int, ...]:
        """How many of its columns are among the first `vocab_size`, for each rank."""
        return tuple(
            max(0, min(width, vocab_size - first)) for first, width in zip(self.firsts, self.widths, strict=True)
        )


# --- collectives ------------------------------------------------------------------------------------------------


def members(group: str) -> Any:
    """The process group of this name."""
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore


def gathered(values: Tensor, group: str) -> Tensor:
    """`[ranks, *values.shape]`, by rank."""
    return gathering(values, group)()


def gathering(values: Tensor, group: str) -> Callable[..., Tensor]:
    """`gathered`, begun: call what is returned to wait for it, perhaps only so long."""
    own, out = values.contiguous(), values.new_empty((members(group).size(), *values.shape))
    if not values.numel():
        return lambda *_: out
    dist = torch.distributed
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # newer torch renames it
    work = all_gather(out.flatten(0, 1), own, group=members(group), async_op=True)

    def arrived(*patience: datetime.timedelta) -> Tensor:
        work.wait(*patience)
        return out if own.numel() else own  # `own` has to live until here

    return arrived


def sum_of_ranks(values: Tensor, group: str) -> Tensor:
    """Σ over ranks, the same on each; 16-bit values are added in fp32."""
    total = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
    torch.distributed.all_reduce(total, group=members(group))
    return total.to(values.dtype)


def all_columns(own: Tensor, layout: Layout, vocab_size: int) -> Tensor:
    """`[rows, vocab_size]` of each rank's `[rows, columns that count]`."""
    counts = layout.counts(vocab_size)
    padded = own.new_zeros(own.shape[0], max(counts))
    padded[:, : own.shape[1]] = own
    everyone = gathered(padded, layout.group)
    out = own.new_empty(own.shape[0], vocab_size)
    for rows, first, count in zip(everyone, layout.firsts, counts, strict=True):
        out[:, first : first + count] = rows[:, :count]
    return out


# --- rows -------------------------------------------------------------------------------------------------------


def stages(spec: RowSpec, teacher: object) -> tuple[Stage, ...]:
    """Those after which ranks exchange what they found."""
    normalised = isinstance(teacher, Tensor) and of_spec(spec.divergence, spec.parameters).normalised
    return ("statistics", "terms") if normalised else ("statistics",)


def exchanged_bytes(ranks: int, entries: int = 0) -> int:
    """What `Rows.exchange` holds of a row at its peak, at most; `entries`: of a sparse teacher.

    Eight numbers of each rank and the entries, as they come, in fp32 on GPUs, and in float64; and what merging makes.
    """
    return ranks * ((4 + 8) * (8 + entries) + 8 * 10)


class Rows(NamedTuple):
    """`Backend.kd_rows` of rows whose columns are cut in this way."""

    layout: Layout
    backend: Backend
    spec: RowSpec

    @property
    def first(self) -> int:
        """The first column of this rank."""
        return self.layout.firsts[self.layout.rank]

    def kd_rows(
        self,
        student: Tensor,
        teacher: Tensor | SparseRows | None,
        labels: Tensor | None,
        soft_scale: Tensor | None,
        hard_scale: Tensor | None,
        grad: Tensor | None,
        state: Tensor | None,
        known: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Student, teacher and grad hold this rank's columns that count; all else is the row's.

        `state`: `Backend.tile_state`, filled; None where the backend has none. `known`: it is filled already.
        """
        row = (labels, soft_scale, hard_scale)
        if state is None:
            return self._gathered(student, teacher, *row, grad)
        for stage in () if known else stages(self.spec, teacher):
            self.backend.kd_rows(student, teacher, *row, self.spec, None, Tile(stage, self.first, state, self.first))
            self.exchange(stage, state, labels if hard_scale is not None else None, teacher)
        if grad is None:
            return self.values(teacher, *row, state)
        tile = Tile("gradient", self.first, state, self.first)
        return self.backend.kd_rows(student, teacher, *row, self.spec, grad, tile)

    def values(
        self,
        teacher: Tensor | SparseRows | None,
        labels: Tensor | None,
        soft_scale: Tensor | None,
        hard_scale: Tensor | None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Those of whole rows, of which all is known: a tile without columns."""
        student = state.new_empty(len(state), 0, dtype=torch.float32)
        beside = student if isinstance(teacher, Tensor) else teacher
        tile = Tile("gradient", self.first, state, self.first)
        return self.backend.kd_rows(student, beside, labels, soft_scale, hard_scale, self.spec, None, tile)

    def new_state(self, rows: int, device: torch.device) -> Tensor | None:
        """For `kd_rows`."""
        return self.backend.tile_state(rows, device) if hasattr(self.backend, "tile_state") else None

    def _gathered(
        self,
        student: Tensor,
        teacher: Tensor | SparseRows | None,
        labels: Tensor | None,
        soft_scale: Tensor | None,
        hard_scale: Tensor | None,
        grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        def whole(own: Tensor) -> Tensor:
            return all_columns(own.reshape(row_count(own), own.shape[-1]), self.layout, self.spec.vocab_size)

        rows = whole(student)
        out = None if grad is None else torch.empty_like(rows)
        beside = whole(teacher) if isinstance(teacher, Tensor) else teacher
        values = self.backend.kd_rows(rows, beside, labels, soft_scale, hard_scale, self.spec, out)
        if grad is not None and out is not None:
            grad.copy_(out[:, self.first : self.first + grad.shape[-1]].view(grad.shape))
        return values

    def exchange(self, stage: Stage, state: Tensor, labels: Tensor | None, teacher: Tensor | SparseRows | None) -> None:
        """Make of what this rank knows of each row what all know together. Many ranks do so for some rows at a time."""
        sparse = teacher if isinstance(teacher, SparseRows) else None
        of_row = exchanged_bytes(len(self.layout.widths), 0 if sparse is None else sparse.ids.shape[-1])
        count, step = len(state), max(_EXCHANGED_AT_ONCE // of_row, 1)
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            beside = teacher if sparse is None else sparse.part(rows)
            self._exchange(stage, state[rows], None if labels is None else labels[rows], beside)

    def _exchange(
        self, stage: Stage, state: Tensor, labels: Tensor | None, teacher: Tensor | SparseRows | None
    ) -> None:
        kind: Literal["absent", "dense", "sparse"] = "absent" if teacher is None else "dense"
        if isinstance(teacher, SparseRows):
            kind = "sparse"
        fields, units = self.backend.state_fields(state, self.spec, kind, labels is not None, stage)
        columns = [*fields.values()]
        picked = teacher if isinstance(teacher, SparseRows) and stage == "statistics" else None
        wide = max((field.dtype for field in columns), key=lambda dtype: dtype.itemsize)
        packed = torch.stack([field.to(wide) for field in columns], -1)
        if picked is not None:
            packed = torch.cat([packed, picked.picked.to(wide)], -1)
        everyone = gathered(packed, self.layout.group).double()
        found = dict(zip(fields, everyone.unbind(-1)[: len(columns)], strict=True))
        if stage == "terms":
            merged = {name: values.sum(0) for name, values in found.items()}
        else:
            merged = _merged(found, units, self.spec)
            if labels is not None:
                merged["label_logit"] = self._of_owner(found["label_logit"][..., None], labels[:, None], math.nan)[:, 0]
        for name, field in fields.items():
            field.copy_(merged[name])
        if picked is not None:
            picked.picked.copy_(self._of_owner(everyone[..., len(columns) :], picked.ids, -math.inf))

    def _of_owner(self, values: Tensor, ids: Tensor, absent: float) -> Tensor:
        """Of `[ranks, rows, K]` those of the ranks that have the ids `[rows, K]`."""
        out = torch.full_like(values[0], absent)
        counts = self.layout.counts(self.spec.vocab_size)
        for told, first, count in zip(values, self.layout.firsts, counts, strict=True):
            out = torch.where((ids >= first) & (ids < first + count), told, out)
        return out


def statistics_of_ranks(own: Sequence[Tensor], labels: Tensor | None, temperature: float, layout: Layout) -> Any:
    """`Backend.row_statistics` of whole rows, from what it says of this rank's columns."""
    log_sum_exp, entropy, argmax, label_logprob, normaliser = own
    first = layout.firsts[layout.rank]
    told = gathered(
        torch.stack([*normaliser.double().unbind(-1), entropy, label_logprob, argmax + first], -1), layout.group
    )
    maxima, log2_totals, entropies, logprobs, columns = told.unbind(-1)
    (top, log2_total), apart = _normalised(maxima, log2_totals, temperature)
    share = apart.exp()
    entropy_of_all = _moved(entropies - apart, share).sum(0)
    where = torch.where(maxima == top, columns, math.inf).amin(0).nan_to_num(posinf=0.0)
    logprob = torch.full_like(top, math.nan)
    if labels is not None:
        for values, start, width in zip(logprobs + apart, layout.firsts, layout.widths, strict=True):
            logprob = torch.where((labels >= start) & (labels < start + width), values, logprob)
    found = (top / temperature + log2_total * math.log(2), entropy_of_all, where, logprob)
    return tuple(x.to(like.dtype) for x, like in zip(found, (log_sum_exp, entropy, argmax, label_logprob), strict=True))


def normaliser_of_ranks(own: Tensor, temperature: float, group: str) -> tuple[Tensor, Tensor]:
    """That of whole rows, `[rows, 2]` as of `Backend.log_softmax`; and what this rank's log-probabilities are short."""
    maxima, log2_totals = gathered(own.double(), group).unbind(-1)
    found, apart = _normalised(maxima, log2_totals, temperature)
    rank = torch.distributed.get_rank(members(group))
    return torch.stack(found, -1).to(own.dtype), apart[rank].to(own.dtype)


def _normalised(maxima: Tensor, log2_totals: Tensor, temperature: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(maximum, log2 of the sum) of whole rows; and of each rank the log of its share of the sum."""
    top, up = _raised(maxima)
    log_totals = log2_totals * math.log(2) - up / temperature
    log_total = torch.logsumexp(log_totals, 0)
    return (top, log_total / math.log(2)), log_totals - log_total


def _merged(found: dict[str, Tensor], units: tuple[float, float], spec: RowSpec) -> dict[str, Tensor]:
    """The statistics of whole rows from those of their parts, `[ranks, rows]` each."""
    merged: dict[str, Tensor] = {}
    to_base_2 = math.log2(math.e)
    if "value" in found:  # of raw logits
        merged["value"] = found["value"].sum(0)
    if "student_max" not in found:
        return merged
    top, up_s = _raised(found["student_max"])
    merged["student_max"] = top
    if "hard" in found:
        merged["hard"] = _moved(found["hard"], torch.exp2(-up_s * to_base_2)).sum(0)
    if "student" not in found:
        return merged
    by_s = torch.exp2(-up_s * (to_base_2 / spec.temperature))
    merged["student"] = _moved(found["student"], by_s).sum(0)
    if "teacher" not in found:
        return merged
    merged["teacher_max"], up_t = _raised(found["teacher_max"])
    by_t = torch.exp2(-up_t * (to_base_2 / spec.teacher_temperature))
    merged["teacher"] = _moved(found["teacher"], by_t).sum(0)
    apart = up_s * units[0] - up_t * units[1]
    if "gap" in found:
        merged["gap"] = (_moved(found["gap"], by_s) + found["teacher"] * (by_s - by_t)).sum(0)
    if "forward" in found:
        merged["forward"] = _moved(found["forward"] + found["teacher"] * apart, by_t).sum(0)
    if "reverse" in found:
        merged["reverse"] = _moved(found["reverse"] - found["student"] * apart, by_s).sum(0)
    for name in {"top_student", "top_teacher"} & found.keys():
        merged[name] = torch.where(up_s == 0, found[name], -math.inf).amax(0)
    return merged


def _raised(maxima: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of all ranks, and how far it is above each."""
    top = maxima.amax(0)
    return top, top.clamp(min=_LEAST) - maxima.clamp(min=_LEAST)


def _moved(sums: Tensor, by: Tensor) -> Tensor:
    """A sum that vanishes becomes 0 even where it was infinite."""
    return torch.where(by == 0, 0.0, sums * by)
