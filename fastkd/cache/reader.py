"""Reading a cache: rows of a sequence by its content, in any order and from any process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.cache.records import Bytes, Dense, Rows
from fastkd.cache.store import MANIFEST, CacheError, Index, Manifest, Settings, read_shard, sequence_key
from fastkd.sources import SparseTargets

__all__ = ["Cache", "open"]

TokenIds = Tensor | Sequence[int] | npt.NDArray[np.integer[Any]]


def open(directory: str | Path) -> Cache:
    """The cache in a directory, finished or not. CacheError where it is none, is damaged or of another version."""
    return Cache(directory)


class Cache:
    """What a teacher said of some sequences. `fastkd.cache.open` and `fastkd.cache.write` make one.

    Rows are found by the token ids of their sequence, never by position: order, subsets and workers do not matter.
    Shards are memory maps; pickled, as for a worker process, it is its directory, and opened again there.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._manifest = Manifest.load(self.directory)
        self._records = self._manifest.settings.records()
        shards = [read_shard(self.directory, shard, self._records.size) for shard in self._manifest.shards]
        self._rows: list[Bytes] = [rows for rows, _, _ in shards]
        self._index = Index([(keys, starts) for _, keys, starts in shards])

    def __reduce__(self) -> tuple[type[Cache], tuple[Path]]:
        return Cache, (self.directory,)

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        return f"Cache({str(self.directory)!r}: {self.sequences:,} sequences, {self.tokens:,} tokens{state})"

    def __contains__(self, token_ids: TokenIds) -> bool:
        return self._index.find([sequence_key(token_ids)])[0] is not None

    @property
    def settings(self) -> Settings:
        """Format, packing, k, temperature, vocab_size, seed, teacher, revision, tokenizer fingerprint."""
        return self._manifest.settings

    @property
    def complete(self) -> bool:
        """Whether the write that made it reached its end."""
        return self._manifest.complete

    @property
    def sequences(self) -> int:
        return self._manifest.sequences

    @property
    def tokens(self) -> int:
        return self._manifest.tokens

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return (self.directory / MANIFEST).stat().st_size + sum(shard.bytes for shard in self._manifest.shards)

    def rows(self, token_ids: TokenIds) -> SparseTargets | Tensor:
        """Of one sequence `[tokens]`: SparseTargets `[tokens, k]` or, of a dense cache, logits `[tokens, vocab_size]`.

        CacheError where the sequence is not in the cache.
        """
        return self._targets(self._decoded([token_ids], None), (len(token_ids),))

    def targets(self, sequences: Sequence[TokenIds], max_length: int | None = None) -> SparseTargets | Tensor:
        """Of whole sequences, cut to their first `max_length` rows and padded to the longest.

        SparseTargets `[batch, tokens, k]`, of which padding has no tokens (log-probability −inf), or logits
        `[batch, tokens, vocab_size]`, of which padding is 0. CacheError where a sequence is not in the cache.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        if max_length is not None:
            lengths = lengths.clip(max=max_length)
        longest = int(lengths.max(initial=0))
        shape = (len(lengths), longest)
        parts = self._decoded(sequences, max_length)
        if (lengths != longest).any():
            real = torch.from_numpy(np.arange(longest) < lengths[:, None])
            nothing = (0, -torch.inf, 0) if isinstance(parts, Rows) else (0,)
            padded = []
            for part, fill in zip(parts if isinstance(parts, Rows) else (parts,), nothing, strict=True):
                whole = torch.full((*shape, *part.shape[1:]), fill, dtype=part.dtype, device=part.device)
                whole[real] = part
                padded.append(whole.flatten(0, 1))
            parts = Rows(*padded) if isinstance(parts, Rows) else padded[0]
        return self._targets(parts, shape)

    def check(self, *, tokenizer: Any = None, vocab_size: int | None = None, temperature: float | None = None) -> None:
        """Raise CacheError unless the cache fits a training with these; None is not looked at.

        `tokenizer`: every token must have the id it had when the cache was written. `vocab_size`: what the loss
        counts. `temperature`: that of the loss; a dense cache serves any.
        """
        from fastkd.cache.writer import tokenizer_fingerprint

        settings = self.settings
        if vocab_size is not None and vocab_size != settings.vocab_size:
            raise CacheError(
                f"{self.directory} has a vocabulary of {settings.vocab_size}, the training one of {vocab_size}: pass "
                f"vocab_size={settings.vocab_size} to the loss if the other tokens are padding, else write it again"
            )
        if temperature is not None and settings.format != "dense" and temperature != settings.temperature:
            raise CacheError(
                f"{self.directory} is at temperature {settings.temperature}, the training at {temperature}: train at "
                f"{settings.temperature}, or write a cache at {temperature}"
            )
        if tokenizer is None:
            return
        if settings.tokenizer is None:
            raise CacheError(f"{self.directory} does not say which tokenizer it is of: write it with tokenizer=…")
        if tokenizer_fingerprint(tokenizer) != settings.tokenizer:
            raise CacheError(f"{self.directory} was written with another tokenizer: its tokens have other ids")

    def verify(self) -> None:
        """Read every byte; CacheError names the first file that is not as it was written."""
        for shard in self._manifest.shards:
            digest = hashlib.sha256((self.directory / shard.file).read_bytes()).hexdigest()
            if digest != shard.sha256:
                raise CacheError(
                    f"{self.directory / shard.file} is corrupt: its checksum is {digest[:16]}…, not "
                    f"{shard.sha256[:16]}… as when it was written; delete the cache and write it again"
                )

    def _decoded(self, sequences: Sequence[TokenIds], max_length: int | None) -> Rows | Tensor:
        """The rows of the sequences, one after another."""
        places = self._index.find([sequence_key(sequence) for sequence in sequences])
        lengths = [len(sequence) if max_length is None else min(len(sequence), max_length) for sequence in sequences]
        records = np.empty((sum(lengths), self._records.size), np.uint8)
        filled = 0
        for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
            if place is None:
                raise CacheError(self._missing(number, sequences[number]))
            shard, start = place
            records[filled : filled + length] = self._rows[shard][start : start + length]
            filled += length
        return self._records.decode(records)

    def _missing(self, number: int, sequence: TokenIds) -> str:
        begin = ", ".join(str(int(token)) for token in sequence[:8])
        state = "" if self.complete else " It is incomplete: the write that made it did not reach its end."
        return (
            f"sequence {number}, {len(sequence)} tokens [{begin}, …], is not in the cache {self.directory}.{state} "
            "Rows are found by all token ids of a sequence: were the same windows cut, by the same tokenizer?"
        )

    def _targets(self, parts: Rows | Tensor, leading: tuple[int, ...]) -> SparseTargets | Tensor:
        if isinstance(self._records, Dense):
            assert isinstance(parts, Tensor)
            return parts.view(*leading, -1)
        ids, log_weights, summary = (part.view(*leading, *part.shape[1:]) for part in parts)
        temperature = self.settings.temperature
        if self.settings.format == "sampled":
            return SparseTargets(ids, log_weights, "sampled", temperature, entropy=summary)
        return SparseTargets(ids, log_weights, "ghost", temperature, rest=summary)
