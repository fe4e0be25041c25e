"""Reading a cache: rows of a sequence by its content, in any order and from any process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import served
from fastkd.cache import keys
from fastkd.cache.disk import CacheError, disk
from fastkd.cache.fingerprints import fingerprint, tokenizer_fingerprint
from fastkd.cache.keys import TokenIds
from fastkd.cache.manifest import MANIFEST, Manifest, Settings
from fastkd.cache.records import Bytes, Dense, KeptTokens
from fastkd.cache.store import Index, check_sum, read_shard
from fastkd.losses import KDLoss
from fastkd.sources import LogProbabilities, SparseTargets

__all__ = ["Cache", "check_weights", "open"]

#: Token ids `[tokens]`; or a mapping of them, `input_ids`, perhaps an `attention_mask` `[tokens]`, and the columns
#: that the cache was written with.
AnySequence = TokenIds | Mapping[str, Any]


def open(directory: str | Path) -> Cache:
    """The cache in a directory, finished or not. CacheError where it is none, is damaged or of another version."""
    return Cache(directory)


class Cache:
    """A teacher's predictions for some sequences. `fastkd.cache.open` and `fastkd.cache.write` make one.

    Rows are found by what of their sequence reached the teacher, never by position: order, subsets and workers have no
    effect. A sequence is given as its token ids, or as a mapping of `input_ids` and whatever else of `columns` it has.
    Shards are memory maps; pickled, as for a worker process, it is its directory, and opened again there. The first
    row that a process takes of a shard has the whole shard read and its checksum compared: a damaged one is a
    CacheError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._manifest = Manifest.load(self.directory)
        self._records = self._manifest.settings.records()
        shards = [read_shard(self.directory, shard, self._records.size) for shard in self._manifest.shards]
        self._rows: list[Bytes] = [rows for rows, _ in shards]
        self._index = Index([places for _, places in shards])
        self._verified: set[int] = set()  # numbers of shards

    def __reduce__(self) -> tuple[type[Cache], tuple[Path]]:
        return Cache, (self.directory,)

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        return f"Cache({str(self.directory)!r}: {self.sequences:,} sequences, {self.tokens:,} tokens{state})"

    def __contains__(self, sequence: AnySequence) -> bool:
        return self._index.find([keys.example(sequence, self.columns).key()])[0] is not None

    @property
    def settings(self) -> Settings:
        """Format, packing, k, temperature, vocab_size, seed, teacher, revision, fingerprints of weights and tokens."""
        return self._manifest.settings

    @property
    def columns(self) -> tuple[str, ...]:
        """What beside token ids the sequences are found by."""
        return self._manifest.columns

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
        with disk(f"{self.directory / MANIFEST} cannot be read"):
            size = (self.directory / MANIFEST).stat().st_size
        return size + sum(shard.bytes for shard in self._manifest.shards)

    def rows(self, sequence: AnySequence) -> SparseTargets | LogProbabilities:
        """Of one sequence: SparseTargets `[tokens, k]` or, of a dense cache, LogProbabilities `[tokens, vocab_size]`.

        CacheError where the sequence is not in the cache, or its shard is damaged.
        """
        example = keys.example(sequence, self.columns)
        return self._targets(self._decoded([example], None), (len(example.ids),))

    def targets(
        self, sequences: Sequence[AnySequence], max_length: int | None = None
    ) -> SparseTargets | LogProbabilities:
        """Of whole sequences, cut to their first `max_length` rows and padded to the longest.

        SparseTargets `[batch, tokens, k]`, where padding has no tokens (log-probability −inf), or
        LogProbabilities `[batch, tokens, vocab_size]`, where padding is 0: a tensor that a loss takes as logits.
        CacheError where a sequence is not in the cache, or its shard is damaged.
        """
        examples = [keys.example(sequence, self.columns) for sequence in sequences]
        lengths = np.array([len(example.ids) for example in examples], np.int64)
        if max_length is not None:
            lengths = lengths.clip(max=max_length)
        longest = int(lengths.max(initial=0))
        shape = (len(lengths), longest)
        parts = self._decoded(examples, max_length)
        if (lengths != longest).any():
            real = torch.from_numpy(np.arange(longest) < lengths[:, None])
            nothing = (0, -torch.inf, 0) if isinstance(parts, KeptTokens) else (0,)
            padded = []
            for part, fill in zip(parts if isinstance(parts, KeptTokens) else (parts,), nothing, strict=True):
                whole = torch.full((*shape, *part.shape[1:]), fill, dtype=part.dtype, device=part.device)
                whole[real] = part
                padded.append(whole.flatten(0, 1))
            parts = KeptTokens(*padded) if isinstance(parts, KeptTokens) else padded[0]
        return self._targets(parts, shape)

    def check(
        self,
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        temperature: float | None = None,
        teacher: nn.Module | str | None = None,
        loss: KDLoss | None = None,
    ) -> None:
        """Raise CacheError unless the cache fits a training with these; None is not checked.

        `tokenizer`: every token must have the id it had when the cache was written. `vocab_size`: what the loss
        counts. `temperature`: the teacher's in the loss; a dense cache serves any. `teacher`: the model that the
        cache should be of, or its `fastkd.cache.fingerprint`; a cache that does not say, as those of format version 1,
        is a UserWarning. `loss`: its temperature and vocab_size, and whether its divergence can be had from this
        cache.
        """
        settings = self.settings
        if loss is not None:
            temperature = loss.temperature if loss.teacher_temperature is None else loss.teacher_temperature
            vocab_size = loss.vocab_size if vocab_size is None else vocab_size
            reason = served.refusal(served.FORMATS[settings.format], loss.divergence)
            if reason is not None:
                raise CacheError(f"{self.directory} cannot serve this loss: {reason}")
        if vocab_size is not None and vocab_size != settings.vocab_size:
            raise CacheError(
                f"{self.directory} has a vocabulary of {settings.vocab_size}, the training one of {vocab_size}: pass "
                f"vocab_size={settings.vocab_size} to the loss if the other tokens are padding, else write it again"
            )
        kind = served.SERVES[served.FORMATS[settings.format]]
        if temperature is not None and not kind.any_temperature and temperature != settings.temperature:
            raise CacheError(
                f"{self.directory} is at temperature {settings.temperature}, the training at {temperature}: train at "
                f"{settings.temperature}, or write a cache at {temperature}"
            )
        if teacher is not None:
            given = teacher if isinstance(teacher, str) else fingerprint(teacher)
            check_weights(self.directory, self._manifest, given)
        if tokenizer is None:
            return
        if settings.tokenizer is None:
            raise CacheError(f"{self.directory} does not say which tokenizer it is of: write it with tokenizer=…")
        if tokenizer_fingerprint(tokenizer) != settings.tokenizer:
            raise CacheError(f"{self.directory} was written with another tokenizer: its tokens have other ids")

    def verify(self) -> None:
        """Read every byte; CacheError names the first file that is not as it was written."""
        for number in range(len(self._manifest.shards)):
            self._verify(number)

    def _verify(self, number: int) -> None:
        check_sum(self.directory, self._manifest.shards[number])
        self._verified.add(number)

    def _decoded(self, examples: Sequence[keys.Example], max_length: int | None) -> KeptTokens | Tensor:
        """The rows of the sequences, one after another."""
        whole = [len(example.ids) for example in examples]
        places = self._index.find([example.key() for example in examples])
        lengths = [length if max_length is None else min(length, max_length) for length in whole]
        records = np.empty((sum(lengths), self._records.size), np.uint8)
        filled = 0
        for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
            if place is None:
                self.verify()  # a damaged key is found nowhere
                raise CacheError(self._missing(number, examples[number]))
            shard, start = place
            if shard not in self._verified:
                self._verify(shard)
            records[filled : filled + length] = self._rows[shard][start : start + length]
            filled += length
        return self._records.decode(records)

    def _missing(self, number: int, example: keys.Example) -> str:
        begin = ", ".join(str(token) for token in example.ids[:8].tolist())
        state = "" if self.complete else " It is incomplete: the write that made it did not reach its end."
        beside = f" and {', '.join(self.columns)}" if self.columns else ""
        has = (
            f" This one has {', '.join(sorted(example.columns)) or 'nothing'} beside them."
            if (self.columns or example.columns)
            else ""
        )
        return (
            f"sequence {number}, {len(example.ids)} tokens [{begin}, …], is not in the cache {self.directory}.{state} "
            f"Rows are found by all token ids of a sequence{beside}: were the same windows cut, by the same "
            f"tokenizer?{has}"
        )

    def _targets(self, parts: KeptTokens | Tensor, leading: tuple[int, ...]) -> SparseTargets | LogProbabilities:
        if isinstance(self._records, Dense):
            assert isinstance(parts, Tensor)
            return parts.view(*leading, -1).as_subclass(LogProbabilities)
        ids, log_weights, summary = (part.view(*leading, *part.shape[1:]) for part in parts)
        temperature = self.settings.temperature
        if self.settings.format == "sampled":
            return SparseTargets(ids, log_weights, "sampled", temperature, entropy=summary)
        return SparseTargets(ids, log_weights, "ghost", temperature, rest=summary)


def check_weights(directory: Path, manifest: Manifest, weights: str) -> None:
    """CacheError unless the cache was written by a teacher with these weights; a UserWarning where it does not say."""
    known = manifest.settings.weights
    if known is None:
        older = f" (its format version is {manifest.version})" if manifest.version == 1 else ""
        warnings.warn(
            f"the cache {directory} does not say which weights its teacher had{older}: that they are those of the "
            "teacher at hand is not checked",
            stacklevel=3,
        )
    elif known != weights:
        raise CacheError(
            f"the cache {directory} is of a teacher with other weights ({known}) than the one at hand ({weights}): it "
            "was trained further, replaced, quantised or loaded in float16. Write to another directory, or use the "
            "teacher that the cache is of"
        )
