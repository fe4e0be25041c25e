"""What a backend is given: how rows lie in memory, what one loss computes on each, and what a sparse teacher keeps.

Everything that knows rows imports this file, and it imports nothing of the library.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NOTHING",
    "STATE_BYTES",
    "RowLayout",
    "RowSpec",
    "SparseRows",
    "Stage",
    "StateFields",
    "Tile",
    "Wants",
    "addressable",
    "kept_dtype",
    "row_count",
    "row_dtype",
    "row_layout",
    "row_layout_of",
]

Stage = Literal["statistics", "terms", "gradient"]
#: What a backend keeps of a row between tiles, at most.
STATE_BYTES = 128


class RowSpec(NamedTuple):
    """What one loss computes on every row: numbers only, so that it crosses into C and Triton unchanged."""

    divergence: str
    parameters: tuple[float, ...]
    temperature: float
    teacher_temperature: float
    soft_weight: float  # T² included where the caller wants it
    hard_weight: float
    vocab_size: int  # columns that count; a wider (padded) row has probability 0 beyond


class SparseRows(NamedTuple):
    """A teacher that keeps K tokens of each row; all other columns are one more token, the rest, on both sides.

    The value of a row is the divergence between these K + 1 probabilities, plus `offset`. The student's rest is summed
    from its columns, never computed as 1 minus the others: that difference would cancel where the K tokens hold nearly
    all mass. `sparse.sparse_rows` makes one.
    """

    ids: Tensor  # int64 [rows, K], ascending; `vocab_size` or more where there is no entry
    logprobs: Tensor  # fp32 [rows, K] (float64 for the reference), -inf where there is no entry
    rest: Tensor  # [rows], in the same dtype
    offset: Tensor  # [rows]
    picked: Tensor  # [rows, K], memory for the student's logits at `ids`: statistics fill it

    def part(self, rows: slice | Tensor) -> SparseRows:
        """The same of some rows only."""
        return SparseRows(*(field[rows] for field in self))


@dataclass(frozen=True)
class Tile:
    """Columns [first, first + width) of every row, where rows come in parts, computed again in each stage.

    Three stages, each over the tiles from first = `origin` upwards: `"statistics"`; `"terms"`, for the divergences that
    need the normalisers before the first term (`Divergence.normalised`); `"gradient"`, if wanted. What a stage
    finds out about a row is in `state`, which the backend makes (`tile_state`) and alone reads, but for what ranks
    exchange of it (`state_fields`).
    """

    stage: Stage
    first: int
    state: Tensor
    origin: int = 0


class StateFields(NamedTuple):
    """What is known of rows after a stage, as a backend keeps it: see `Backend.state_fields`."""

    fields: dict[str, Tensor]  # [rows] each; writing to them changes the state
    units: tuple[float, float]  # by which differences of the student's and the teacher's logits enter the cross sums


class Wants(NamedTuple):
    """Which gradients a call computes."""

    hidden: bool  # or of the logits, where the student is a tensor
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


NOTHING = Wants(False, False, False)


class RowLayout(NamedTuple):
    """Row i starts at element `(i // inner)·outer_stride + (i % inner)·inner_stride`."""

    rows: int
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(tensor: Tensor) -> RowLayout | None:
    """The rows of `[..., V]` as at most two strides, or None where that cannot express them (then copy)."""
    return row_layout_of(tensor.shape, tensor.stride())


@functools.lru_cache(1024)  # asked for several times in a call, and the same in most calls
def row_layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> RowLayout | None:
    """`row_layout` of a tensor of this shape and these strides."""
    if 0 in shape:
        return RowLayout(0, 1, 0, shape[-1])
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first, mergeable neighbours merged
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner, inner_stride = levels[-1] if levels else (1, shape[-1])
    outer, outer_stride = levels[0] if len(levels) == 2 else (1, 0)
    return RowLayout(outer * inner, inner, outer_stride, inner_stride)


def addressable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where `row_layout` cannot express its rows."""
    return tensor if row_layout(tensor) is not None else tensor.contiguous()


def row_count(tensor: Tensor) -> int:
    """The rows of `[..., V]`: the product of its leading dimensions."""
    return tensor.shape[:-1].numel()


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row scalars, and of the arithmetic: fp32, or float64 where the input is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """How a parameter's gradient is kept between forward and backward: as the parameter, but fp16 in fp32.

    Sums over tokens may leave the range of fp16 on either side until the upstream gradient has scaled them.
    """
    return torch.float32 if dtype == torch.float16 else dtype
