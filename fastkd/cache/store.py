"""The shards of a cache: rows, and the keys that sequences are found by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastkd.cache.disk import CacheError, disk, replace_file
from fastkd.cache.keys import KEY_BYTES
from fastkd.cache.manifest import Shard
from fastkd.cache.records import Bytes

__all__ = ["Index", "Places", "check_sum", "read_shard", "write_shard"]

#: Of one shard: the keys of its sequences, and where in its rows each begins (and the last ends).
Places = tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]

_READ = 1 << 20  # bytes at a time


def write_shard(path: Path, rows: Sequence[Bytes], keys: Sequence[bytes], lengths: Sequence[int], advice: str) -> Shard:
    """Write the file of a shard; returns what a manifest says of it. CacheError with `advice` where it cannot."""
    content = save(
        {
            "rows": np.concatenate(rows),
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "starts": np.r_[0, np.cumsum(lengths)].astype(np.int64),
        }
    )
    replace_file(path, content, advice)
    return Shard(path.name, len(keys), sum(lengths), len(content), hashlib.sha256(content).hexdigest())


def read_shard(directory: Path, shard: Shard, record_bytes: int) -> tuple[Bytes, Places]:
    """A memory map of the rows, and the places of the sequences in them.

    CacheError where size, shapes or places are not those of the manifest. The rows themselves are not checked here:
    `check_sum` does that.
    """
    path = directory / shard.file
    with disk(f"{path} cannot be read"):
        size = path.stat().st_size
        if size != shard.bytes:
            raise CacheError(f"{path} has {size} bytes, but {shard.bytes} were written: it is truncated or replaced")
        try:
            # The torch reader maps the file, that of numpy copies it.
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(name) for name in ("rows", "keys", "starts")]
        except SafetensorError as error:
            raise CacheError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    found = [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors]
    expected = [
        ("uint8", (shard.tokens, record_bytes)),
        ("uint8", (shard.sequences, KEY_BYTES)),
        ("int64", (shard.sequences + 1,)),
    ]
    if found != expected:
        raise CacheError(f"{path} is damaged: it holds {found}, not {expected} as its manifest says; {_AGAIN}")
    rows, keys, starts = (tensor.numpy() for tensor in tensors)
    if starts[0] != 0 or starts[-1] != shard.tokens or (np.diff(starts) < 1).any():
        raise CacheError(f"{path} is damaged: its sequences do not follow each other in {shard.tokens} rows; {_AGAIN}")
    return rows, (keys.reshape(-1).view(f"S{KEY_BYTES}"), starts)


def check_sum(directory: Path, shard: Shard) -> None:
    """Read every byte of a shard. CacheError where it is not as it was written."""
    path, digest = directory / shard.file, hashlib.sha256()
    with disk(f"{path} cannot be read"), path.open("rb") as file:
        while some := file.read(_READ):
            digest.update(some)
    if digest.hexdigest() != shard.sha256:
        raise CacheError(
            f"{path} is corrupt: its checksum is {digest.hexdigest()[:16]}…, not {shard.sha256[:16]}… as when it was "
            f"written; {_AGAIN}"
        )


_AGAIN = "restore the file, or delete the cache and write it again"


class Index:
    """Where each sequence of some shards lies, by its key."""

    def __init__(self, shards: Sequence[Places]) -> None:
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(keys for keys, _ in shards)])
        order = np.argsort(keys)
        numbers = [np.full(len(keys), number) for number, (keys, _) in enumerate(shards)]
        self._keys = keys[order]
        self._shard = np.concatenate([np.empty(0, np.int64), *numbers])[order]
        self._start = np.concatenate([np.empty(0, np.int64), *(starts[:-1] for _, starts in shards)])[order]

    def find(self, keys: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """(number of the shard, first row) of each, or None."""
        if len(self._keys) == 0:
            return [None] * len(keys)
        wanted = np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found = self._keys[places] == wanted
        return [
            (int(self._shard[place]), int(self._start[place])) if there else None
            for place, there in zip(places, found, strict=True)
        ]
