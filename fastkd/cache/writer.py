"""Running a teacher once over the data and keeping little of every row it gives."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.backend import select
from fastkd.cache import keys
from fastkd.cache.asked import check_extendable, check_same, check_shard_tokens, new_settings, packing
from fastkd.cache.disk import CacheError, disk, locked, own_names
from fastkd.cache.fingerprints import fingerprint, tokenizer_fingerprint
from fastkd.cache.manifest import MANIFEST, Manifest, Shard, shard_name
from fastkd.cache.reader import Cache
from fastkd.cache.records import Bytes, Dense, KeptTokens
from fastkd.cache.store import Index, check_sum, read_shard, write_shard
from fastkd.processes import Processes
from fastkd.projection.loop import logit_chunks
from fastkd.projection.models import project
from fastkd.sources import Projection

__all__ = ["Format", "Progress", "begun", "write"]

Format = Literal["sampled", "topk", "dense"]
Batch = Mapping[str, Any] | Tensor
Teacher = nn.Module | Callable[[Any], Projection | Tensor]

_LOGIT_ROWS = 1024  # of a teacher that returns logits, at a time


class Progress(NamedTuple):
    """What `write` has done after a batch."""

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
    packed: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    teacher_name: str | None = None,
    teacher_revision: str | None = None,
    teacher_fingerprint: str | None = None,
    shard_tokens: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Cache:
    """Run the teacher over all batches and keep what `format` keeps of each row; returns the finished cache.

    Costs one forward of the teacher and the product of its output head; no `[tokens, vocab]` tensor is formed of a
    Projection. Sequences that are in the cache already are not computed again: an interrupted write resumes, and
    leaves the same files as one that was not, if it is given the same batches. A finished cache is extended by what
    is new in the batches; if nothing is, it is only read: by any number of processes, also from a directory that
    cannot be written to. Before anything is added, the checksums of all that is there are compared.

    Args:
        teacher: a transformers causal LM (see `fastkd.project`; it runs in eval mode), or a function of a batch that
            returns a Projection or logits `[batch, tokens, V]`.
        batches: mappings with `input_ids` int `[batch, tokens]`, perhaps `attention_mask` (0: padding, neither
            computed nor stored), and what else the teacher takes, `[batch, ...]` each; or the `input_ids` alone. A
            sequence is what is not padding, with its part of all else that reaches the teacher but `labels`. Row i of
            it is the teacher's distribution after token i, as in the model's own logits. A model gets its padding at
            the end, wherever it was.
        directory: made where there is none. Only one process may write to it at a time; others get a CacheError.
        format: `"sampled"`, `"topk"` or `"dense"`; see `fastkd.cache`.
        temperature: of the softmax, that of the loss the cache is for. A dense cache is at 1 and serves any.
        k: tokens kept of a row. None: as the directory's cache has it; of a new one 12 (sampled), 64 (topk).
        packed: False stores exact fp32 values and int32 ids. None: as the directory's cache has it; a new one is
            packed.
        dtype: of a dense cache, float16 or bfloat16. None: as the directory's cache has it; of a new one float16.
        seed: of the samples. Every sequence has random numbers of its own, from the seed and its key. None: as the
            directory's cache has it; of a new one 0.
        vocab_size: the columns that count, where the teacher's rows are padded. None: all.
        tokenizer: a transformers tokenizer. Its fingerprint is stored for `Cache.check`.
        teacher_name, teacher_revision: stored; of a transformers model None reads them from its config. Names are
            compared only where weights are not known.
        teacher_fingerprint: identifies the teacher's weights. None: `fastkd.cache.fingerprint` of a model; nothing for
            a function, whose changes then go unnoticed.
        shard_tokens: tokens in a file, at least; an interrupted write loses no more than these. None: as the
            directory's cache has it; of a new one 131,072, fewer if dense.
        progress: called after each batch.
        group: processes that share the work, whose collectives take objects of the host (gloo). All of them call this,
            with the same arguments and the same batches, on one file system. Each runs the teacher for whole shards in
            turn, so the files are those that one process writes, to the byte; an interrupted write loses up to a shard
            of each, and resumes with any number of processes. An error of one is raised in all.

    Raises CacheError where settings or the teacher's weights are not those of the directory's cache, it is no cache,
    is damaged, is being written, or cannot be read or written, and where the teacher's logits have no softmax;
    ValueError and TypeError for wrong arguments. A UserWarning says where a finished cache does not know its weights.
    """
    check_shard_tokens(shard_tokens)
    directory, processes = Path(directory), Processes(group)
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    config = getattr(teacher, "config", None)
    if teacher_fingerprint is None and isinstance(teacher, nn.Module):
        teacher_fingerprint = fingerprint(teacher)
    asked = {
        "format": format,
        "packing": packing(format, packed, dtype),
        "k": k,
        "temperature": temperature,
        "vocab_size": vocab_size,
        "seed": seed,
        "teacher": teacher_name or getattr(config, "_name_or_path", None) or None,
        "revision": teacher_revision or getattr(config, "_commit_hash", None),
        "weights": teacher_fingerprint,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "shard_tokens": shard_tokens,
    }

    def fill() -> None:
        lock = _Lock(directory, held)
        if processes.gather(lambda: asked).count(asked) < processes.size:
            raise CacheError("the processes of the group ask for different caches: give all of them the same arguments")
        found = processes.of_first(lambda: _found(directory, lock))
        if found is None and vocab_size is None:
            new_settings({**asked, "vocab_size": 1})  # before the teacher runs
            asked["vocab_size"] = processes.of_first(lambda: _width(teacher, first))
        writer = _Writer(directory, teacher, asked, found, lock, processes)
        for batch in itertools.chain(first, rest):
            writer.add(batch if isinstance(batch, Mapping) else {"input_ids": batch})
            if progress is not None:
                progress(Progress(writer.tokens, writer.computed, writer.records.size))
        writer.finish()

    with ExitStack() as held, _in_eval_mode(teacher):
        processes.agree(fill)
    return Cache(directory)


def _found(directory: Path, lock: _Lock) -> Manifest | None:
    """What is in the directory, which is made, and locked where there is no finished cache."""
    with disk(f"cannot make the directory {directory}", "name another, or make room for it"):
        directory.mkdir(parents=True, exist_ok=True)
    found = begun(directory)
    if found is None or not found.complete:
        lock.take()
        found = begun(directory)  # as another writer may have left it
    return found


class _Lock:
    """The directory's lock, taken once, when it is first needed."""

    def __init__(self, directory: Path, held: ExitStack) -> None:
        self.taken = False
        self._directory, self._held = directory, held

    def take(self) -> None:
        if not self.taken:
            self._held.enter_context(locked(self._directory))
            self.taken = True


class _Written(NamedTuple):
    """A shard of a round, as each process of a group knows it."""

    shard: Shard | None  # where this process has written it
    keys: bytes  # a digest of them
    columns: frozenset[str]


class _Writer:
    """One write: what is stored, and what waits for the next shard.

    A finished cache is only read, without a lock, until a sequence comes that is not in it. Of several processes each
    sees all batches, and knows all shards, but runs the teacher for its own: in a round, one shard each.
    """

    def __init__(
        self,
        directory: Path,
        teacher: Teacher,
        asked: Mapping[str, Any],
        found: Manifest | None,
        lock: _Lock,
        processes: Processes,
    ) -> None:
        self.tokens = self.computed = 0
        self._directory, self._teacher, self._asked, self._lock = directory, teacher, asked, lock
        self._processes = processes
        self._writing = False
        self._round: list[_Written] = []
        self._clear()
        if found is None:
            found = self._saved(Manifest(new_settings(asked)))
        self._take(found)
        if not found.complete:
            self._begin_writing()

    def _take(self, found: Manifest) -> None:
        """Go on from a manifest. CacheError where it is of other settings, or of another teacher."""
        check_same(self._directory, found, self._asked)
        self._manifest, self._settings = found, found.settings
        self.records = found.settings.records()
        self._shards = [read_shard(self._directory, shard, self.records.size)[1] for shard in found.shards]
        self._index = Index(self._shards)
        self._shard_tokens = self._asked["shard_tokens"]
        if self._shard_tokens is None:
            self._shard_tokens = found.settings.shard_tokens

    def _begin_writing(self) -> None:
        """From here on the cache is changed, by this process and those of its group alone."""
        newest = self._processes.of_first(self._locked)
        if newest is not None:
            self._take(newest)
        check_extendable(self._directory, self._manifest, self._asked)
        for shard in self._manifest.shards[self._processes.rank :: self._processes.size]:
            check_sum(self._directory, shard)
        self._writing = True

    def _locked(self) -> Manifest | None:
        """The manifest as another writer may have left it, if the directory was not locked before."""
        if self._lock.taken:
            return None
        self._lock.take()
        return Manifest.load(self._directory)

    def _saved(self, manifest: Manifest) -> Manifest:
        self._processes.of_first(lambda: manifest.save(self._directory))
        return manifest

    def _clear(self) -> None:
        self._rows: list[Bytes] = []
        self._waiting: dict[bytes, int] = {}  # key → tokens
        self._columns: set[str] = set()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Store the sequences of a batch that are new."""
        understood = keys.Batch.of(batch)
        examples = understood.examples()
        new = self._new(examples)
        if new and not self._writing:
            self._begin_writing()
            new = self._new(examples)
        if new:
            lengths = [len(examples[number].ids) for number in new.values()]
            if self._mine:
                real = understood.real
                if isinstance(self._teacher, nn.Module):
                    batch, real = keys.padded_at_the_end(batch, understood)
                chosen = torch.zeros(len(examples), dtype=torch.bool, device=real.device)
                chosen[list(new.values())] = True
                self._rows.append(self._records_of(batch, real & chosen[:, None], list(new), lengths))
            self._waiting.update(zip(new, lengths, strict=True))
            self._columns.update(*(examples[number].columns for number in new.values()))
            self.computed += sum(lengths)
        self.tokens += sum(len(example.ids) for example in examples)
        if self._waiting and sum(self._waiting.values()) >= self._shard_tokens:
            self._flush()

    @property
    def _mine(self) -> bool:
        """Whether the shard that is being filled is this process's."""
        return len(self._round) == self._processes.rank

    def _new(self, examples: list[keys.Example]) -> dict[bytes, int]:
        """Key → number in the batch, of the sequences that are not in the cache."""
        names = [example.key() for example in examples]
        places = self._index.find(names)
        new: dict[bytes, int] = {}
        for number, (key, place) in enumerate(zip(names, places, strict=True)):
            if place is None and key not in self._waiting and len(examples[number].ids):
                new.setdefault(key, number)
        return new

    def finish(self) -> None:
        if self._waiting:
            self._flush()
        if self._round:
            self._end_round()
        if not self._manifest.complete:
            self._manifest = self._saved(replace(self._manifest, complete=True))

    def _flush(self) -> None:
        """The shard is full: its process writes it."""
        found, lengths, shard = list(self._waiting), list(self._waiting.values()), None
        if self._mine:
            path = self._directory / shard_name(len(self._shards))
            shard = write_shard(path, self._rows, found, lengths, self._manifest.safe())
        joined = b"".join(found)
        self._round.append(_Written(shard, hashlib.blake2b(joined).digest(), frozenset(self._columns)))
        self._shards.append((np.frombuffer(joined, "S16"), np.r_[0, np.cumsum(lengths)]))
        self._index = Index(self._shards)
        self._clear()
        if len(self._round) == self._processes.size:
            self._end_round()

    def _end_round(self) -> None:
        """Name the shards of this round in the manifest, when all are there."""
        found = self._processes.gather(lambda: self._round)
        if any([one.keys for one in theirs or ()] != [one.keys for one in self._round] for theirs in found):
            raise CacheError(
                "the processes of the group see different batches: give all of them the same, in one order"
            )
        for number, one in enumerate(self._round):
            shard = found[number][number].shard
            assert shard is not None
            self._manifest = self._manifest.with_shard(shard, set(one.columns))
        if self._processes.size > 1:
            self._processes.agree(self._check_there)
        self._manifest = self._saved(self._manifest)
        self._round = []

    def _check_there(self) -> None:
        for shard in self._manifest.shards[-len(self._round) :]:
            path = self._directory / shard.file
            with disk(f"{path} is not seen by every process", "name a directory on a file system that all of them see"):
                path.stat()

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
        rows = KeptTokens(*map(torch.cat, zip(*parts, strict=True)))
        return self.records.encode(rows, uniforms[1].numpy())

    def _dense(self, logits: Tensor) -> Tensor:
        logprobs: Tensor = torch.ops.fastkd.log_softmax(logits.float(), 1.0)[0].cpu()
        if logprobs.isnan().any():
            raise CacheError(_NO_SOFTMAX)
        return logprobs

    def _sparse(self, logits: Tensor, uniforms: Tensor) -> KeptTokens:
        backend, (k, temperature) = select(logits), (self._settings.k, self._settings.temperature)
        assert k is not None
        if self._settings.format == "sampled":
            rows = KeptTokens(*backend.sample(logits, k, temperature, uniforms.to(logits.device)))
        else:
            rows = KeptTokens(*backend.top_k(logits, k, temperature))
        if rows.summary.isnan().any():
            raise CacheError(_NO_SOFTMAX)
        return KeptTokens(rows.ids.cpu(), rows.log_weights.float().cpu(), rows.summary.float().cpu())


_NO_SOFTMAX = "the teacher's logits hold NaN, +inf or a row of nothing but −inf: nothing can be learnt from them"


def _run(teacher: Teacher, batch: Mapping[str, Any]) -> Projection | Tensor:
    with torch.no_grad():
        if not isinstance(teacher, nn.Module):
            source = teacher(batch)
            if not isinstance(source, (Projection, Tensor)):
                raise TypeError(f"the teacher must return a Projection or logits, got {type(source).__name__}")
            return source
        device = next(teacher.parameters()).device
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        found: Projection = project(teacher, **moved)
        return found


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


def begun(directory: Path) -> Manifest | None:
    """The manifest of a cache that was begun in a directory; None of one that is empty or not there.

    CacheError for any other.
    """
    with disk(f"{directory} cannot be read"):
        try:
            names = {path.name for path in directory.iterdir()}
        except FileNotFoundError:
            return None
    if MANIFEST in names:
        return Manifest.load(directory)
    if not all(own_names(name) for name in names):
        raise CacheError(f"{directory} is not empty and no fastkd cache: name another directory")
    return None
