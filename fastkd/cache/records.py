"""Tokens kept of a row as bytes: one record of fixed size per row, and how exactly it gives them back.

A record holds ids, log-weights and one number more (`KeptTokens`); see the table in `fastkd.cache`. Everything is
vectorised over rows, and little-endian on every machine.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Dense", "KeptTokens", "PackedSampled", "PackedTopK", "Plain", "Records"]

Bytes = npt.NDArray[np.uint8]

#: Weights of a sample: ½·2^((code − 254) ÷ 14), 5 % apart down to 1.8e-6; code 0 for none, 255 for the largest.
_STEPS, _TOP, _LARGEST = 14, 254, 255
_WEIGHTS = np.r_[0.0, 0.5 * 2.0 ** ((np.arange(1, _TOP + 1) - _TOP) / _STEPS), 0.0]
_LOG_WEIGHTS = np.r_[-math.inf, np.log(_WEIGHTS[1:_LARGEST]), math.nan].astype(np.float32)
#: Log-probabilities of a top-k: −32·(code ÷ 65534)², denser where tokens are likely, and a last code for none.
_LOWEST, _CODES = 32.0, 65534
_LOGPROBS = np.r_[-_LOWEST * (np.arange(_CODES + 1) / _CODES) ** 2, -math.inf].astype(np.float32)


class KeptTokens(NamedTuple):
    """What was kept of N rows, as `fastkd.backend.Backend` selects it."""

    ids: Tensor  # int64 [N, k]
    log_weights: Tensor  # fp32 [N, k], −inf where there is no token
    summary: Tensor  # fp32 [N]: entropy of a sample, log of the mass not kept of a top-k


class Records(Protocol):
    """A way to store rows in `size` bytes each."""

    size: int

    def encode(self, rows: KeptTokens, uniforms: npt.NDArray[np.float64]) -> Bytes:
        """`[N, size]`. `uniforms [N]` in [0, 1) decide what is rounded up."""
        ...

    def decode(self, records: Bytes) -> KeptTokens:
        """Of `[N, size]`; the ids of a row ascending, tokens that are not there last."""
        ...


class Plain:
    """int32 ids, fp32 log-weights and an fp32 summary: exact."""

    def __init__(self, vocab_size: int, k: int) -> None:
        self.size = 8 * k + 4
        self._k = k

    def encode(self, rows: KeptTokens, uniforms: npt.NDArray[np.float64]) -> Bytes:
        return _joined(rows.ids.numpy().astype("<i4"), rows.log_weights.numpy(), rows.summary.numpy()[:, None])

    def decode(self, records: Bytes) -> KeptTokens:
        ids, log_weights = (_part(records, start, 4 * self._k) for start in (0, 4 * self._k))
        summary = _part(records, 8 * self._k, 4).view("<f4")[:, 0]
        return _kept(ids.view("<i4").astype(np.int64), log_weights.view("<f4"), summary)


class PackedTopK:
    """Ids at the bits they need, log-probabilities in 16 bits, the log of the mass not kept in fp32."""

    def __init__(self, vocab_size: int, k: int) -> None:
        self._ids = _Ids(vocab_size, k)
        self._k = k
        self.size = self._ids.size + 2 * k + 4

    def encode(self, rows: KeptTokens, uniforms: npt.NDArray[np.float64]) -> Bytes:
        logprobs = rows.log_weights.numpy()
        codes = np.rint(_CODES * np.sqrt(np.clip(-logprobs, 0, _LOWEST) / _LOWEST)).astype("<u2")
        codes[np.isneginf(logprobs)] = _CODES + 1
        return _joined(self._ids.encode(rows.ids.numpy()), codes, rows.summary.numpy()[:, None])

    def decode(self, records: Bytes) -> KeptTokens:
        start = self._ids.size
        logprobs = _LOGPROBS[_part(records, start, 2 * self._k).view("<u2")]
        rest = _part(records, start + 2 * self._k, 4).view("<f4")[:, 0]
        return _kept(self._ids.decode(records[:, :start]), logprobs, rest)


class PackedSampled:
    """Ids at the bits they need, weights in 8 bits, the entropy in fp16.

    The largest weight of a row is 1 minus the others. The others are rounded up or down at random, so that they stay
    right in expectation, and systematically: among the first tokens in descending order of weight, as many are rounded
    up as are expected to be, give or take less than one. So their sum is off by less than the largest step, which is
    less than the largest weight: what is left of 1 is never negative.
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        self._ids = _Ids(vocab_size, k)
        self._k = k
        self.size = self._ids.size + k + 2

    def encode(self, rows: KeptTokens, uniforms: npt.NDArray[np.float64]) -> Bytes:
        order = np.argsort(-rows.log_weights.numpy(), axis=-1, kind="stable")
        ids = np.take_along_axis(rows.ids.numpy(), order, -1)
        log_weights = np.take_along_axis(rows.log_weights.numpy(), order, -1)[:, 1:].astype(np.float64)
        places = _TOP + _STEPS * (log_weights / math.log(2) + 1)
        below = np.clip(np.floor(places), 0, _TOP - 1).astype(np.int64)
        share = (np.exp(log_weights) - _WEIGHTS[below]) / (_WEIGHTS[below + 1] - _WEIGHTS[below])
        reached = np.floor(np.clip(share, 0, 1).cumsum(-1) + uniforms[:, None])
        rounded = below + np.diff(reached, axis=-1, prepend=0.0).astype(np.int64)
        codes = np.concatenate((np.full((len(ids), 1), _LARGEST), rounded), -1)
        # Ascending ids, and what was rounded to nothing at the end: as losses want them, without sorting.
        ids = np.where(codes == 0, 0, ids)
        order = np.argsort(np.where(codes == 0, np.iinfo(np.int64).max, ids), axis=-1, kind="stable")
        ids, codes = np.take_along_axis(ids, order, -1), np.take_along_axis(codes, order, -1)
        entropy = rows.summary.numpy().astype("<f2")
        return _joined(self._ids.encode(ids), codes.astype(np.uint8), entropy[:, None])

    def decode(self, records: Bytes) -> KeptTokens:
        start, end = self._ids.size, self._ids.size + self._k
        codes = records[:, start:end]
        log_weights = _LOG_WEIGHTS[codes]
        log_weights[codes == _LARGEST] = np.log(1 - _WEIGHTS[codes].sum(-1))
        entropy = _part(records, end, 2).view("<f2")[:, 0].astype(np.float32)
        return _kept(self._ids.decode(records[:, :start]), log_weights, entropy)


class Dense:
    """Log-probabilities of the whole vocabulary in fp16 or bf16."""

    def __init__(self, vocab_size: int, dtype: torch.dtype) -> None:
        self.size = 2 * vocab_size
        self.dtype = dtype

    def encode(self, logprobs: Tensor) -> Bytes:
        """`[N, size]` of `[N, vocab_size]`."""
        return _joined(logprobs.to(self.dtype).view(torch.int16).numpy())

    def decode(self, records: Bytes) -> Tensor:
        """`[N, vocab_size]` of `[N, size]`."""
        return torch.from_numpy(_part(records, 0, self.size).view("<i2")).view(self.dtype)


class _Ids:
    """k ids below vocab_size: their whole low bytes, then the bits beyond them, k tokens in a row."""

    def __init__(self, vocab_size: int, k: int) -> None:
        bits = max(1, (vocab_size - 1).bit_length())
        self._k, self._bytes, self._bits = k, bits // 8, bits % 8
        self.size = k * self._bytes + -(-k * self._bits // 8)

    def encode(self, ids: npt.NDArray[np.int64]) -> Bytes:
        as_bytes = ids.astype("<i8").view(np.uint8).reshape(len(ids), self._k, 8)
        low = as_bytes[..., : self._bytes].reshape(len(ids), -1)
        if not self._bits:
            return low
        high = (ids >> (8 * self._bytes))[..., None] >> np.arange(self._bits) & 1
        return np.concatenate((low, np.packbits(high.astype(np.uint8).reshape(len(ids), -1), axis=-1)), -1)

    def decode(self, packed: Bytes) -> npt.NDArray[np.int64]:
        count, low = len(packed), self._k * self._bytes
        as_bytes = np.zeros((count, self._k, 8), np.uint8)
        as_bytes[..., : self._bytes] = packed[:, :low].reshape(count, self._k, self._bytes)
        ids = as_bytes.reshape(count, -1).view("<i8").astype(np.int64, copy=False)
        if self._bits:
            high = np.unpackbits(packed[:, low:], axis=-1, count=self._k * self._bits)
            for bit, plane in enumerate(np.moveaxis(high.reshape(count, self._k, self._bits), -1, 0)):
                ids |= plane.astype(np.int64) << (8 * self._bytes + bit)
        return ids


def _joined(*parts: npt.NDArray[np.generic]) -> Bytes:
    """The bytes of each row's parts, one after another."""
    little = (np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<")) for part in parts)
    return np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in little], -1)


def _part(records: Bytes, start: int, size: int) -> Bytes:
    return np.ascontiguousarray(records[:, start : start + size])


def _kept(
    ids: npt.NDArray[np.int64], log_weights: npt.NDArray[np.float32], summary: npt.NDArray[np.float32]
) -> KeptTokens:
    parts = (np.ascontiguousarray(part) for part in (ids, log_weights, summary))
    return KeptTokens(*map(torch.from_numpy, parts))
