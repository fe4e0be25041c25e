"""The key of a sequence: everything of it that reaches the teacher, without padding.

These are its token ids and its *columns*, such as the pixels of an image. Sequences with the same ids and different
columns are different. Not part of the key: `attention_mask`, which says what is padding; `labels`; and position ids
that only count the tokens, as models do without them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "KEY_BYTES",
    "PER_TOKEN",
    "Batch",
    "Example",
    "TokenIds",
    "columns_of",
    "example",
    "padded_at_the_end",
    "unpadded",
]

KEY_BYTES = 16
TokenIds = Tensor | Sequence[int] | npt.NDArray[np.integer[Any]]

#: Columns with an entry per token, on their last axis: padding is taken out of them.
PER_TOKEN = frozenset({"position_ids", "token_type_ids"})
POSITIONS = "position_ids"
#: What is not looked at: it does not change what the teacher says of a sequence.
_NO_COLUMNS = {"input_ids", "attention_mask", "labels", "use_cache", "return_dict"}


class Example(NamedTuple):
    """One sequence without padding."""

    ids: npt.NDArray[np.int64]  # [tokens]
    columns: dict[str, Tensor]  # name → its part of that column; PER_TOKEN [..., tokens]

    def key(self) -> bytes:
        """BLAKE2b of the token ids as int64, little-endian; and of name, shape and values of each column."""
        ids = np.ascontiguousarray(self.ids, "<i8").tobytes()
        if not self.columns:
            return hashlib.blake2b(ids, digest_size=KEY_BYTES).digest()
        digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"columns")
        digest.update(f"{len(ids)}:".encode() + ids)
        for name in sorted(self.columns):
            values = self.columns[name].detach().cpu()
            if values.is_floating_point():
                array = values.to(torch.float32).numpy().astype("<f4")
            else:
                array = values.to(torch.int64).numpy().astype("<i8")
            digest.update(f"{name}:{array.dtype.str}:{array.shape}:".encode() + array.tobytes())
        return digest.digest()


class Batch(NamedTuple):
    """A batch whose columns are understood."""

    ids: Tensor  # integers [batch, tokens]
    real: Tensor  # bool [batch, tokens]: what is not padding
    columns: dict[str, Tensor]  # name → [batch, ...]; PER_TOKEN [batch, ..., tokens]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Batch:
        """Raises ValueError, naming the column, for what cannot be told apart by sequence."""
        ids, real = _ids_and_mask(batch)
        given = {name: value for name, value in batch.items() if name not in _NO_COLUMNS and value is not None}
        columns = {name: _column(name, value, real) for name, value in given.items()}
        return cls(ids, real, columns)

    def examples(self) -> list[Example]:
        """The sequences, without padding."""
        found = []
        for number, (ids, real) in enumerate(zip(self.ids, self.real, strict=True)):
            parts = {name: _without_padding(name, column[number], real) for name, column in self.columns.items()}
            found.append(Example(ids[real].cpu().numpy(), _telling(parts)))
        return found


def padded_at_the_end(batch: Mapping[str, Any], understood: Batch) -> tuple[Mapping[str, Any], Tensor]:
    """The same sequences with all padding behind them, where models number tokens from 0; and what is no padding."""
    ids, real, columns = understood
    if not bool((real[:, 1:] > real[:, :-1]).any()):
        return batch, real
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    ids, real = ids.gather(1, order), real.gather(1, order)
    moved = {"input_ids": ids, "attention_mask": real.to(torch.int64)}
    for name in columns.keys() & PER_TOKEN:
        column = columns[name]
        if column.dim() == 2:
            moved[name] = column.gather(1, order)
        else:
            moved[name] = column.gather(2, order[:, None].expand_as(column)).movedim(1, 0)
    return {**batch, **moved}, real


def example(sequence: TokenIds | Mapping[str, Any], names: Iterable[str] = ()) -> Example:
    """Of token ids `[tokens]`, or of a mapping with `input_ids`, perhaps `attention_mask`, and columns.

    Of the columns those called `names` count, and position ids always. Raises ValueError for parts that do not fit
    together.
    """
    if not isinstance(sequence, Mapping):
        return Example(np.asarray(sequence, dtype=np.int64), {})
    ids, real = unpadded(sequence)
    return Example(ids[real].numpy(), _telling(columns_of(sequence, names, real)))


def columns_of(sequence: Mapping[str, Any], names: Iterable[str], real: Tensor) -> dict[str, Tensor]:
    """The parts of an example that are called `names`, and its position ids, without what is not `real`."""
    found = {name: sequence[name] for name in {*names, POSITIONS} if sequence.get(name) is not None}
    return {name: _without_padding(name, _tensor(name, value), real) for name, value in found.items()}


def unpadded(sequence: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The `input_ids` of an example, int64 `[tokens]`, and which of them are no padding."""
    ids = torch.as_tensor(sequence["input_ids"], dtype=torch.int64, device="cpu")
    mask = sequence.get("attention_mask")
    real = (
        torch.ones_like(ids, dtype=torch.bool)
        if mask is None
        else torch.as_tensor(mask, dtype=torch.bool, device="cpu")
    )
    if ids.dim() != 1 or real.shape != ids.shape:
        raise ValueError(
            f"input_ids and attention_mask of an example must be [tokens] each, got {tuple(ids.shape)} and "
            f"{tuple(real.shape)}"
        )
    return ids, real


def _as_tensor(value: Any) -> Tensor:
    """A tensor as it is, on its device; anything else in main memory, Python's numbers with a fraction in float32."""
    if isinstance(value, Tensor):
        return value
    found = torch.from_numpy(np.asarray(value))
    return found.float() if found.dtype == torch.float64 and not isinstance(value, np.ndarray) else found


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return _as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name!r} is {type(value).__name__}, by which no sequence can be found again: give tensors, or take it out"
        ) from None


def _column(name: str, value: Any, real: Tensor) -> Tensor:
    """`[batch, ...]`, its tokens on the last axis if it is PER_TOKEN."""
    found = _tensor(name, value)
    batch, shape = len(real), tuple(found.shape)
    if name in PER_TOKEN:
        if found.dim() == 3:  # one kind of position after another, [kinds, batch, tokens]
            found = found.movedim(0, 1)
        if found.dim() == 2 and len(found) == 1:
            found = found.expand(batch, -1)
        if found.dim() < 2 or len(found) != batch or found.shape[-1] != real.shape[1]:
            raise ValueError(f"{name} {shape} must have an entry for each of the input_ids {tuple(real.shape)}")
        return found.to(real.device)
    if found.dim() == 0 or len(found) != batch:
        raise ValueError(
            f"{name!r} {shape} beside input_ids {tuple(real.shape)}: which part of it belongs to which sequence cannot "
            "be told, and rows are found by all that reaches the teacher; give it as [batch, ...], or let the teacher "
            "be a function that makes it of what a batch has"
        )
    if found.shape[:2] == real.shape and not bool(real.all()):
        raise ValueError(
            f"{name!r} {shape} may have an entry per token, whose padding would have to be taken out; that is known of "
            f"{' and '.join(sorted(PER_TOKEN))} alone: give batches without padding"
        )
    return found


def _without_padding(name: str, part: Tensor, real: Tensor) -> Tensor:
    if name not in PER_TOKEN:
        return part
    if part.dim() == 0 or part.shape[-1:] != real.shape:
        raise ValueError(f"{name} {tuple(part.shape)} must have an entry for each of {len(real)} input_ids")
    return part[..., real]


def _telling(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns that say something: not positions as they are without any."""
    positions = columns.get(POSITIONS)
    if positions is not None:
        counted = torch.arange(positions.shape[-1], dtype=torch.int64, device=positions.device)
        if bool((positions == counted).all()):
            return {name: part for name, part in columns.items() if name != POSITIONS}
    return columns


def _ids_and_mask(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`input_ids` [batch, tokens] and what of them is no padding. Raises ValueError for other shapes and values."""
    if "input_ids" not in batch:
        raise ValueError(f"a batch must have input_ids, got {sorted(batch)}")
    ids = _as_tensor(batch["input_ids"])
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers [batch, tokens], got {ids.dtype} {tuple(ids.shape)}")
    if batch.get("attention_mask") is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    mask = _as_tensor(batch["attention_mask"]).to(ids.device)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must be shaped like input_ids {tuple(ids.shape)}")
    real = mask.bool()
    if not bool((mask == real).all()):
        raise ValueError(
            "attention_mask must hold 0 (padding) and 1: other values, as of packed sequences, are unknown"
        )
    return ids, real
