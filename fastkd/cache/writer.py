"""Running a teacher once over the data and keeping little of every row it gives."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.backend import select
from fastkd.cache.reader import Cache
from fastkd.cache.records import Bytes, Dense, Rows
from fastkd.cache.store import (
    MANIFEST,
    CacheError,
    Index,
    Manifest,
    Settings,
    locked,
    read_shard,
    sequence_key,
    write_shard,
)
from fastkd.heads import logit_chunks
from fastkd.models import project
from fastkd.sources import Projection

__all__ = ["Format", "Progress", "tokenizer_fingerprint", "write"]

Format = Literal["sampled", "topk", "dense"]
Batch = Mapping[str, Any] | Tensor
Teacher = nn.Module | Callable[[Any], Projection | Tensor]

_DEFAULT_K = {"sampled": 12, "topk": 64}
_SHARD_TOKENS, _SHARD_BYTES = 1 << 17, 1 << 28  # by default, the fewer
_LOGIT_ROWS = 1024  # of a teacher that returns logits, at a time
_DENSE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Progress(NamedTuple):
    """What `write` has behind it after a batch."""

    tokens: int  # of this call's batches, without padding; found in the cache or not
    computed: int  # of these, run through the teacher
    bytes_per_token: int


def write(
    teacher: Teacher,
    batches: Iterable[Batch],
    directory: str | Path,
    *,
    format: Format = "sampled",
    temperature: float = 1.0,
    k: int | None = None,
    packed: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    teacher_name: str | None = None,
    teacher_revision: str | None = None,
    shard_tokens: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Cache:
    """Run the teacher over all batches and keep what `format` keeps of each row; returns the finished cache.

    Costs one forward of the teacher and the product of its output head; no `[tokens, vocab]` tensor is formed of a
    Projection. Sequences that are in the cache already are not computed again: a write that was stopped goes on, and
    leaves the same files as one that was not, if it is given the same batches. A finished cache is extended by what
    is new in the batches.

    Args:
        teacher: a transformers causal LM (see `fastkd.project`; it runs in eval mode), or a function of a batch that
            returns a Projection or logits `[batch, tokens, V]`.
        batches: mappings with `input_ids` int `[batch, tokens]`, perhaps `attention_mask` (0: padding, neither
            computed nor stored), and what else the teacher takes; or the `input_ids` alone. A sequence is what is
            not padding. Row i of it is the teacher's distribution after token i, as in the model's own logits.
        directory: made where there is none. Of several that write to it at a time, all but one are refused.
        format: `"sampled"`, `"topk"` or `"dense"`; see `fastkd.cache`.
        temperature: of the softmax, that of the loss the cache is for. A dense cache is at 1 and serves any.
        k: tokens kept of a row: 12 (sampled), 64 (topk).
        packed: False stores exact fp32 values and int32 ids.
        dtype: of a dense cache, float16 or bfloat16.
        seed: of the samples. Every sequence has random numbers of its own, from the seed and its token ids.
        vocab_size: the columns that count, where the teacher's rows are padded. None: all.
        tokenizer: a transformers tokenizer, of which a fingerprint is stored for `Cache.check`.
        teacher_name, teacher_revision: stored; of a transformers model None reads them from its config.
        shard_tokens: tokens in a file, at least; what a killed write loses. None: 131,072, fewer of a dense cache.
        progress: called after each batch.

    Raises CacheError where settings differ from the directory's, it is no cache, is being written, or cannot be
    written to, and where the teacher's logits have no softmax; ValueError and TypeError for wrong arguments.
    """
    directory = Path(directory)
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory), _in_eval_mode(teacher):
        found = _manifest_of(directory)
        if vocab_size is None:
            vocab_size = found.settings.vocab_size if found else _width(teacher, first)
        config = getattr(teacher, "config", None)
        settings = _checked(
            Settings(
                format,
                _packing(format, packed, dtype),
                _DEFAULT_K.get(format) if k is None else k,
                temperature,
                vocab_size,
                seed,
                teacher_name or getattr(config, "_name_or_path", None) or None,
                teacher_revision or getattr(config, "_commit_hash", None),
                None if tokenizer is None else tokenizer_fingerprint(tokenizer),
                shard_tokens or 0,
            )
        )
        if shard_tokens is None:
            fitting = max(1, _SHARD_BYTES // settings.records().size)
            settings = replace(settings, shard_tokens=min(_SHARD_TOKENS, fitting))
        writer = _Writer(directory, teacher, settings, found)
        for batch in itertools.chain(first, rest):
            writer.add(batch if isinstance(batch, Mapping) else {"input_ids": batch})
            if progress is not None:
                progress(Progress(writer.tokens, writer.computed, writer.records.size))
        writer.finish()
    return Cache(directory)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of a transformers tokenizer's tokens and their ids: equal where every token has the same id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


class _Writer:
    """One write: what is stored, and what waits for the next shard."""

    def __init__(self, directory: Path, teacher: Teacher, settings: Settings, found: Manifest | None) -> None:
        if found is not None:
            _check_same(directory, found.settings, settings)
        self.records = settings.records()
        self.tokens = self.computed = 0
        self._directory, self._teacher, self._settings = directory, teacher, settings
        self._manifest = found or Manifest(settings)
        if found is None:
            self._manifest.save(directory)
        self._shards = [read_shard(directory, shard, self.records.size)[1:] for shard in self._manifest.shards]
        self._index = Index(self._shards)
        self._clear()

    def _clear(self) -> None:
        self._rows: list[Bytes] = []
        self._waiting: dict[bytes, int] = {}  # key → tokens

    def add(self, batch: Mapping[str, Any]) -> None:
        """Store the sequences of a batch that are new."""
        ids, real = _ids_and_mask(batch)
        sequences = [tokens[mask].cpu().numpy() for tokens, mask in zip(ids, real, strict=True)]
        keys = [sequence_key(sequence) for sequence in sequences]
        new: dict[bytes, int] = {}
        for number, (key, place) in enumerate(zip(keys, self._index.find(keys), strict=True)):
            if place is None and key not in self._waiting and len(sequences[number]):
                new.setdefault(key, number)
        if new:
            chosen = torch.zeros(len(sequences), dtype=torch.bool, device=real.device)
            chosen[list(new.values())] = True
            lengths = [len(sequences[number]) for number in new.values()]
            self._rows.append(self._records_of(batch, real & chosen[:, None], list(new), lengths))
            self._waiting.update(zip(new, lengths, strict=True))
            self.computed += sum(lengths)
        self.tokens += sum(map(len, sequences))
        if sum(self._waiting.values()) >= self._settings.shard_tokens:
            self._flush()

    def finish(self) -> None:
        if self._waiting:
            self._flush()
        if not self._manifest.complete:
            self._manifest = replace(self._manifest, complete=True)
            self._manifest.save(self._directory)

    def _flush(self) -> None:
        lengths = list(self._waiting.values())
        self._manifest = write_shard(self._directory, self._manifest, self._rows, list(self._waiting), lengths)
        keys = np.frombuffer(b"".join(self._waiting), "S16")
        self._shards.append((keys, np.r_[0, np.cumsum(lengths)]))
        self._index = Index(self._shards)
        self._clear()

    def _records_of(self, batch: Mapping[str, Any], wanted: Tensor, keys: list[bytes], lengths: list[int]) -> Bytes:
        """The records of the rows that are `wanted`, `[batch, tokens]`: the sequences of these keys and lengths."""
        source = _run(self._teacher, batch)
        if source.shape[:2] != wanted.shape or source.shape[-1] < self._settings.vocab_size:
            raise CacheError(
                f"the teacher gave logits {tuple(source.shape)} for input_ids {tuple(wanted.shape)} and "
                f"vocab_size={self._settings.vocab_size}; they must be [batch, tokens, V] with V ≥ vocab_size"
            )
        chunks = _chunks(source, wanted.to(source.device), self._settings.vocab_size)
        if isinstance(self.records, Dense):
            return np.concatenate([self.records.encode(self._dense(logits)) for _, logits in chunks])
        uniforms = _uniforms(keys, lengths, self._settings.seed)
        parts = [self._sparse(logits, uniforms[0, rows]) for rows, logits in chunks]
        rows = Rows(*map(torch.cat, zip(*parts, strict=True)))
        return self.records.encode(rows, uniforms[1].numpy())

    def _dense(self, logits: Tensor) -> Tensor:
        logprobs: Tensor = torch.ops.fastkd.log_softmax(logits.float(), 1.0)[0].cpu()
        if logprobs.isnan().any():
            raise CacheError(_NO_SOFTMAX)
        return logprobs

    def _sparse(self, logits: Tensor, uniforms: Tensor) -> Rows:
        backend, (k, temperature) = select(logits), (self._settings.k, self._settings.temperature)
        assert k is not None
        if self._settings.format == "sampled":
            rows = Rows(*backend.sample(logits, k, temperature, uniforms.to(logits.device)))
        else:
            rows = Rows(*backend.top_k(logits, k, temperature))
        if rows.summary.isnan().any():
            raise CacheError(_NO_SOFTMAX)
        return Rows(rows.ids.cpu(), rows.log_weights.float().cpu(), rows.summary.float().cpu())


_NO_SOFTMAX = "the teacher's logits hold NaN, +inf or a row of nothing but −inf: nothing can be learnt from them"


def _run(teacher: Teacher, batch: Mapping[str, Any]) -> Projection | Tensor:
    with torch.no_grad():
        if not isinstance(teacher, nn.Module):
            source = teacher(batch)
            if not isinstance(source, (Projection, Tensor)):
                raise TypeError(f"the teacher must return a Projection or logits, got {type(source).__name__}")
            return source
        device = next(teacher.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        return project(teacher, **moved)


def _chunks(source: Projection | Tensor, wanted: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """The logits of the rows that are wanted, some at a time."""
    if isinstance(source, Projection):
        yield from logit_chunks(replace(source, hidden=source.hidden[wanted]), vocab_size)
        return
    places = wanted.nonzero()
    for start in range(0, len(places), _LOGIT_ROWS):
        some = places[start : start + _LOGIT_ROWS]
        yield slice(start, start + len(some)), source.detach()[some[:, 0], some[:, 1], :vocab_size]


def _uniforms(keys: list[bytes], lengths: list[int], seed: int) -> Tensor:
    """float64 `[2, tokens]`: for the draws and the rounding of each row, from nothing but seed and sequence."""
    parts = []
    for key, length in zip(keys, lengths, strict=True):
        own = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(own, "little") >> 1)
        parts.append(torch.rand(2, length, dtype=torch.float64, device="cpu", generator=generator))
    return torch.cat(parts, 1)


def _ids_and_mask(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if "input_ids" not in batch:
        raise ValueError(f"a batch must have input_ids, got {sorted(batch)}")
    ids = _tensor(batch["input_ids"])
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers [batch, tokens], got {ids.dtype} {tuple(ids.shape)}")
    if batch.get("attention_mask") is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    mask = _tensor(batch["attention_mask"])
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must be shaped like input_ids {tuple(ids.shape)}")
    return ids, mask.bool().to(ids.device)


def _tensor(values: Any) -> Tensor:
    """A tensor as it is, on its device; anything else in main memory."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))


def _width(teacher: Teacher, first: list[Batch]) -> int:
    """The columns of the teacher's rows."""
    if not first:
        raise ValueError("batches is empty: there is nothing to write")
    batch = first[0]
    return _run(teacher, batch if isinstance(batch, Mapping) else {"input_ids": batch}).shape[-1]


@contextmanager
def _in_eval_mode(teacher: Teacher) -> Iterator[None]:
    training = isinstance(teacher, nn.Module) and teacher.training
    if isinstance(teacher, nn.Module):
        teacher.eval()
    try:
        yield
    finally:
        if isinstance(teacher, nn.Module):
            teacher.train(training)


def _packing(format: str, packed: bool, dtype: torch.dtype) -> str:
    if format != "dense":
        return "packed" if packed else "plain"
    if dtype not in _DENSE_DTYPES:
        raise ValueError(f"dtype of a dense cache must be torch.float16 or torch.bfloat16, got {dtype}")
    return _DENSE_DTYPES[dtype]


def _checked(settings: Settings) -> Settings:
    if settings.format not in (*_DEFAULT_K, "dense"):
        raise ValueError(f"format must be 'sampled', 'topk' or 'dense', got {settings.format!r}")
    if not (isinstance(settings.temperature, (int, float)) and 0 < settings.temperature < math.inf):
        raise ValueError(f"temperature must be a finite number > 0, got {settings.temperature!r}")
    if settings.format == "dense":
        if settings.temperature != 1 or settings.k is not None:
            raise ValueError(
                f"a dense cache keeps all tokens at temperature 1, which serves any; got k={settings.k} and "
                f"temperature={settings.temperature}"
            )
    elif isinstance(settings.k, bool) or not isinstance(settings.k, int) or settings.k < 1:
        raise ValueError(f"k must be an int ≥ 1, got {settings.k!r}")
    if not 1 <= settings.vocab_size < 2**31:
        raise ValueError(f"vocab_size must be in [1, 2³¹), got {settings.vocab_size}")
    if settings.shard_tokens < 0:
        raise ValueError(f"shard_tokens must be > 0, got {settings.shard_tokens}")
    return replace(settings, temperature=float(settings.temperature))


def _manifest_of(directory: Path) -> Manifest | None:
    """The manifest of a cache that was begun here, or None in an empty directory."""
    if (directory / MANIFEST).exists():
        return Manifest.load(directory)
    if any(directory.iterdir()):
        raise CacheError(f"{directory} is not empty and no fastkd cache: name another directory")
    return None


def _check_same(directory: Path, found: Settings, asked: Settings) -> None:
    for name, value in vars(found).items():
        if getattr(asked, name) != value:
            raise CacheError(
                f"{directory} was begun with {name}={value!r}, but {name}={getattr(asked, name)!r} is asked for: "
                "write to another directory, or ask for the same"
            )
