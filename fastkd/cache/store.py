"""A cache on disk: the manifest, shards that are written whole or not at all, sequences found by their content.

A directory holds `manifest.json` and `shard-00000.safetensors`, … The manifest names every shard that is complete;
a file it does not name is no part of the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastkd.cache.records import Bytes, Dense, PackedSampled, PackedTopK, Plain, Records

__all__ = [
    "CacheError",
    "Index",
    "Manifest",
    "Settings",
    "Shard",
    "locked",
    "read_shard",
    "sequence_key",
    "write_shard",
]

VERSION = 1
MANIFEST = "manifest.json"
_PARTIAL = ".partial"
KEY_BYTES = 16


class CacheError(ValueError):
    """A cache that cannot be written or read as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """What every row of a cache was made with. All of it must agree for a write to go on where another stopped."""

    format: str  # "sampled", "topk" or "dense"
    packing: str  # "packed" or "plain"; of a dense cache "float16" or "bfloat16"
    k: int | None
    temperature: float
    vocab_size: int
    seed: int
    teacher: str | None
    revision: str | None
    tokenizer: str | None  # fingerprint
    shard_tokens: int

    def records(self) -> Records | Dense:
        """How rows are stored."""
        if self.format == "dense":
            return Dense(self.vocab_size, getattr(torch, self.packing))
        assert self.k is not None
        if self.packing == "plain":
            return Plain(self.vocab_size, self.k)
        packed = PackedSampled if self.format == "sampled" else PackedTopK
        return packed(self.vocab_size, self.k)


@dataclass(frozen=True)
class Shard:
    file: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    settings: Settings
    shards: tuple[Shard, ...] = field(default=())
    complete: bool = False

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def save(self, directory: Path) -> None:
        """Replace the directory's manifest, at once."""
        counts = {"complete": self.complete, "sequences": self.sequences, "tokens": self.tokens}
        shards = [asdict(shard) for shard in self.shards]
        document = {"fastkd_cache": VERSION, **asdict(self.settings), **counts, "shards": shards}
        _replace_file(directory / MANIFEST, (json.dumps(document, indent=1) + "\n").encode(), self)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """CacheError where the directory is no cache, or one that this version cannot read."""
        path = directory / MANIFEST
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CacheError(f"{directory} is no fastkd cache: it has no {MANIFEST}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CacheError(f"{path} cannot be read: {error}") from error
        version = document.get("fastkd_cache") if isinstance(document, dict) else None
        if not isinstance(version, int):
            raise CacheError(f"{path} is not the manifest of a fastkd cache")
        if version != VERSION:
            raise CacheError(
                f"{directory} is a cache of format version {version}, this fastkd reads version {VERSION}: use the "
                f"{'newer' if version > VERSION else 'older'} fastkd that wrote it, or write it again"
            )
        try:
            settings = Settings(**{entry.name: document[entry.name] for entry in fields(Settings)})
            shards = tuple(Shard(**shard) for shard in document["shards"])
            return cls(settings, shards, document["complete"])
        except (KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged: {error}") from error

    def with_shard(self, shard: Shard) -> Manifest:
        return replace(self, shards=(*self.shards, shard), complete=False)


def sequence_key(token_ids: Any) -> bytes:
    """What a sequence is found by: the 16-byte BLAKE2b of its token ids as int64, little-endian."""
    return hashlib.blake2b(np.asarray(token_ids, dtype="<i8").tobytes(), digest_size=KEY_BYTES).digest()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other writers out, and take away what a killed one left half-written."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"another process is writing the cache {directory}: wait for it, or end it") from None
        for path in directory.glob(f".*{_PARTIAL}"):
            path.unlink()
        yield
    finally:
        os.close(descriptor)


def write_shard(
    directory: Path, manifest: Manifest, rows: Sequence[Bytes], keys: Sequence[bytes], lengths: Sequence[int]
) -> Manifest:
    """Add a shard, and name it in the manifest once it is there; returns that manifest."""
    content = save(
        {
            "rows": np.concatenate(rows),
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "starts": np.r_[0, np.cumsum(lengths)].astype(np.int64),
        }
    )
    name = f"shard-{len(manifest.shards):05d}.safetensors"
    _replace_file(directory / name, content, manifest)
    digest = hashlib.sha256(content).hexdigest()
    manifest = manifest.with_shard(Shard(name, len(keys), sum(lengths), len(content), digest))
    manifest.save(directory)
    return manifest


def read_shard(
    directory: Path, shard: Shard, record_bytes: int
) -> tuple[Bytes, npt.NDArray[np.bytes_], npt.NDArray[np.int64]]:
    """A memory map of the rows, the keys of the sequences, and where in the rows each begins (and the last ends)."""
    path = directory / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise CacheError(f"{path} has {size} bytes, but {shard.bytes} were written: it is truncated or replaced")
        # The torch reader maps the file, that of numpy copies it.
        with safe_open(path, framework="pt") as file:
            rows, keys, starts = (file.get_tensor(name).numpy() for name in ("rows", "keys", "starts"))
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be read: {error}") from error
    expected = ((shard.tokens, record_bytes), (shard.sequences, KEY_BYTES), (shard.sequences + 1,))
    if (rows.shape, keys.shape, starts.shape) != expected or starts[-1] != shard.tokens:
        raise CacheError(f"{path} is damaged: it holds {rows.shape}, {keys.shape}, {starts.shape}, not {expected}")
    return rows, keys.reshape(-1).view(f"S{KEY_BYTES}"), starts


class Index:
    """Where each sequence of some shards lies, by its key."""

    def __init__(self, shards: Sequence[tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]]) -> None:
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(keys for keys, _ in shards)])
        order = np.argsort(keys)
        numbers = [np.full(len(keys), number) for number, (keys, _) in enumerate(shards)]
        self._keys = keys[order]
        self._shard = np.concatenate([np.empty(0, np.int64), *numbers])[order]
        self._start = np.concatenate([np.empty(0, np.int64), *(starts[:-1] for _, starts in shards)])[order]

    def find(self, keys: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """(number of the shard, first row) of each, or None."""
        wanted = np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")
        places = np.searchsorted(self._keys, wanted)
        inside = np.minimum(places, len(self._keys) - 1)
        if len(self._keys) == 0:
            return [None] * len(keys)
        found = self._keys[inside] == wanted
        return [
            (int(self._shard[place]), int(self._start[place])) if there else None
            for place, there in zip(inside, found, strict=True)
        ]


def _replace_file(path: Path, content: bytes, manifest: Manifest) -> None:
    """Write a file under another name and rename it once it is on disk; nothing is left of one that fails."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CacheError(
            f"cannot write {path}: {error.strerror}; the {manifest.sequences} sequences in {len(manifest.shards)} "
            "complete shards are safe, and the same write again goes on from there"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
