"""What a cache says of itself: `manifest.json`, its table of keys, and what must agree in it.

A directory holds `manifest.json` and `shard-00000.safetensors`, … The manifest names every shard that is complete;
a file it does not name is no part of the cache. Format version 2:

| key                                  | meaning                                                                      |
|--------------------------------------|------------------------------------------------------------------------------|
| fastkd_cache                         | the format's version                                                         |
| format, packing, k, vocab_size       | what is kept of a row, and in which record (`fastkd.cache.records`)          |
| temperature                          | of the teacher's softmax; 1 of a dense cache                                 |
| seed                                 | of the samples                                                               |
| weights                              | fingerprint of the teacher's weights (`fastkd.cache.fingerprint`), or null   |
| teacher, revision                    | its name when the cache was begun; not compared where weights are known      |
| tokenizer                            | fingerprint of tokens and ids, or null                                       |
| columns                              | what rows are found by beside token ids, such as pixel_values                |
| shard_tokens                         | tokens in a shard, at least, when the cache was begun                        |
| complete, sequences, tokens          | whether the last write reached its end, and sums over the shards             |
| shards: file, sequences, tokens,     | one entry per shard, whose files hold `rows` uint8 [tokens, record],         |
| bytes, sha256                        | `keys` uint8 [sequences, 16] and `starts` int64 [sequences + 1]              |
| checksum                             | BLAKE2b, 16 bytes, of the other keys as JSON with sorted keys                |

A manifest that was edited is refused. Version 1 has neither weights nor columns nor checksum. It is read, and not
written to.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import string
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkd.arguments import COLDEST, HOTTEST
from fastkd.cache.disk import CacheError, disk, replace_file
from fastkd.cache.records import Dense, PackedSampled, PackedTopK, Plain, Records

__all__ = ["MANIFEST", "VERSION", "Manifest", "Settings", "Shard", "checksum", "shard_name"]

VERSION = 2
MANIFEST = "manifest.json"
_DENSE = ("float16", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What every row of a cache was made with."""

    format: str  # "sampled", "topk" or "dense"
    packing: str  # "packed" or "plain"; of a dense cache "float16" or "bfloat16"
    k: int | None
    temperature: float
    vocab_size: int
    seed: int
    teacher: str | None
    revision: str | None
    weights: str | None  # fingerprint
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


class _Key(NamedTuple):
    """What a value must be: in words, and as a test."""

    what: str
    fits: Callable[[Any], bool]


def _one_of(*values: str) -> _Key:
    return _Key(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _integer(low: int, high: int = 2**63 - 1) -> _Key:
    bound = f"an integer of at least {low}" if high == 2**63 - 1 else f"an integer in [{low}, {high}]"
    return _Key(bound, lambda value: type(value) is int and low <= value <= high)


def _hexadecimal(digits: int) -> _Key:
    return _Key(
        f"{digits} hexadecimal digits",
        lambda value: isinstance(value, str) and len(value) == digits and set(value) <= set(string.hexdigits),
    )


def _or_null(key: _Key) -> _Key:
    return _Key(f"{key.what} or null", lambda value: value is None or key.fits(value))


_TEXT = _Key("a text", lambda value: isinstance(value, str))
_TEXTS = _Key("a list of texts", lambda value: isinstance(value, list) and all(map(_TEXT.fits, value)))
_TEMPERATURE = _Key(
    f"a number in [{COLDEST:g}, {HOTTEST:g}]",
    lambda value: type(value) in (int, float) and COLDEST <= value <= HOTTEST,
)

_SHARD = {
    "file": _TEXT,
    "sequences": _integer(1),
    "tokens": _integer(1),
    "bytes": _integer(1),
    "sha256": _hexadecimal(64),
}
_DOCUMENT = {
    "fastkd_cache": _integer(1, VERSION),
    "format": _one_of("sampled", "topk", "dense"),
    "packing": _one_of("packed", "plain", *_DENSE),
    "k": _or_null(_integer(1, 2**31 - 1)),
    "temperature": _TEMPERATURE,
    "vocab_size": _integer(1, 2**31 - 1),
    "seed": _Key("an integer", lambda value: type(value) is int),
    "teacher": _or_null(_TEXT),
    "revision": _or_null(_TEXT),
    "weights": _or_null(_TEXT),
    "tokenizer": _or_null(_hexadecimal(32)),
    "columns": _TEXTS,
    "shard_tokens": _integer(0),
    "complete": _Key("true or false", lambda value: isinstance(value, bool)),
    "sequences": _integer(0),
    "tokens": _integer(0),
    "shards": _Key("a list", lambda value: isinstance(value, list)),
    "checksum": _hexadecimal(32),
}
_SINCE_2: dict[str, Any] = {"weights": None, "columns": [], "checksum": None}  # key → what version 1 is read as


@dataclass(frozen=True)
class Manifest:
    settings: Settings
    shards: tuple[Shard, ...] = field(default=())
    complete: bool = False
    columns: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def with_shard(self, shard: Shard, columns: set[str]) -> Manifest:
        names = tuple(sorted(columns.union(self.columns)))
        return replace(self, shards=(*self.shards, shard), complete=False, columns=names)

    def safe(self) -> str:
        """What a failed write leaves, and how to resume it."""
        return (
            f"the {self.sequences} sequences in {len(self.shards)} complete shards are safe, and the same write again "
            "resumes from there"
        )

    def save(self, directory: Path) -> None:
        """Replace the directory's manifest, at once. CacheError where it cannot be written."""
        counts = {"complete": self.complete, "sequences": self.sequences, "tokens": self.tokens}
        shards = [asdict(shard) for shard in self.shards]
        document = {"fastkd_cache": VERSION, **asdict(self.settings), "columns": list(self.columns), **counts}
        document["shards"] = shards
        document["checksum"] = checksum(document)
        replace_file(directory / MANIFEST, (json.dumps(document, indent=1) + "\n").encode(), self.safe())

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """CacheError where the directory is no cache, its manifest is damaged, or one this version cannot read."""
        path = directory / MANIFEST
        document = _document(directory, path)
        version = document.get("fastkd_cache") if isinstance(document, dict) else None
        if type(version) is not int or not isinstance(document, dict):
            raise CacheError(f"{path} is not the manifest of a fastkd cache")
        if not 1 <= version <= VERSION:
            raise CacheError(
                f"{directory} is a cache of format version {reprlib.repr(version)}, this fastkd reads versions 1 to "
                f"{VERSION}: use the fastkd that wrote it, or write it again"
            )
        table = {name: key for name, key in _DOCUMENT.items() if version > 1 or name not in _SINCE_2}
        _check_keys(path, document, table, "")
        for number, shard in enumerate(document["shards"]):
            _check_keys(path, shard, _SHARD, f"shards[{number}]")
        if version == 1:
            document = {**document, **_SINCE_2}
        elif document["checksum"] != checksum(document):
            raise _damaged(path, "its checksum is not that of its contents: it was edited after it was written")
        settings = Settings(**{entry.name: document[entry.name] for entry in fields(Settings)})
        settings = replace(settings, temperature=float(settings.temperature))
        shards = tuple(Shard(**shard) for shard in document["shards"])
        manifest = cls(settings, shards, document["complete"], tuple(document["columns"]), version)
        manifest._check_agreement(path, document)
        return manifest

    def _check_agreement(self, path: Path, document: Mapping[str, Any]) -> None:
        """Keys that are right one by one contradict each other in no way that can be seen here."""
        settings = self.settings
        dense = settings.format == "dense"
        if dense != (settings.packing in _DENSE):
            raise _damaged(path, f"'packing' is {settings.packing!r}, which no cache of format {settings.format!r} has")
        if dense != (settings.k is None):
            raise _damaged(path, f"'k' is {settings.k}, which no cache of format {settings.format!r} has")
        if dense and settings.temperature != 1:
            raise _damaged(path, f"'temperature' is {settings.temperature}, but a dense cache is at 1")
        for number, shard in enumerate(self.shards):
            if shard.file != shard_name(number):
                raise _damaged(path, f"'file' of shards[{number}] is {_shown(shard.file)}, not {shard_name(number)!r}")
        for name, total in (("sequences", self.sequences), ("tokens", self.tokens)):
            if document[name] != total:
                raise _damaged(path, f"{name!r} is {document[name]}, but the shards have {total}")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def checksum(document: Mapping[str, Any]) -> str:
    """Of all keys but the checksum itself, in whatever order."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _document(directory: Path, path: Path) -> Any:
    with disk(f"{path} cannot be read"):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise CacheError(f"{directory} is no fastkd cache: it has no {MANIFEST}") from None
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers of thousands of digits
        raise CacheError(f"{path} cannot be read: {error}; {_AGAIN}") from error


def _check_keys(path: Path, document: Any, table: Mapping[str, _Key], place: str) -> None:
    where = f" of {place}" if place else ""
    if not isinstance(document, dict):
        raise _damaged(path, f"'{place}' is {_shown(document)}, not an object")
    for name, key in table.items():
        if name not in document:
            raise _damaged(path, f"'{name}'{where} is missing")
        if not key.fits(document[name]):
            raise _damaged(path, f"'{name}'{where} is {_shown(document[name])}, not {key.what}")
    for name in document:
        if name not in table:
            raise _damaged(path, f"{_shown(name)}{where} is no key of this format")


_AGAIN = "restore the file, or delete the cache and write it again"


def _damaged(path: Path, how: str) -> CacheError:
    return CacheError(f"{path} is damaged: {how}; {_AGAIN}")


def _shown(value: object) -> str:
    return reprlib.repr(value)  # of bounded length and depth, whatever the value
