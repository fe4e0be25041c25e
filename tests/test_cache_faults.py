"""The disk fails at any point of a write or a read: a CacheError that says where and why, and nothing is lost."""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cache import Cache, CacheError, store, write
from fastkd.cache import open as open_cache
from tests import cached

IDS = cached.sequences(8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A teacher this small only waits for other threads, hundreds of times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Disk:
    """Counts every file operation below a directory, and lets the n-th one fail as the system would."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.below, self.seen, self.fails_at, self.number = str(directory), [], 0, errno.EIO
        for module, names in {os: "open mkdir stat listdir scandir rename unlink fsync", fcntl: "flock"}.items():
            for name in names.split():
                # What is synced is never lost here, and syncing is most of the time.
                function = getattr(module, name) if name != "fsync" else lambda _: None
                monkeypatch.setattr(module, name, self.failing(name, function))
        monkeypatch.setattr(io, "open", self.failing("open file", builtins.open, wrap=True))
        monkeypatch.setattr(store, "safe_open", self.failing("map", store.safe_open))

    def start(self, fails_at: int = 0, number: int = errno.EIO) -> None:
        self.seen, self.fails_at, self.number = [], fails_at, number

    def count(self, name: str, path: str) -> None:
        if path.startswith(self.below):
            self.seen.append(f"{name} {os.path.basename(path)}")
            if len(self.seen) == self.fails_at:
                raise OSError(self.number, os.strerror(self.number), path)

    def failing(self, name: str, function: Callable[..., Any], wrap: bool = False) -> Callable[..., Any]:
        def failing(place: Any, *arguments: Any, **settings: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
            self.count(name, str(path))
            found = function(place, *arguments, **settings)
            return File(self, found, str(path)) if wrap and str(path).startswith(self.below) else found

        return failing


class File:
    """An open file whose reads and writes are counted too."""

    def __init__(self, disk: Disk, file: Any, path: str) -> None:
        self.disk, self.file, self.path = disk, file, path

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "write", "flush"):
            self.disk.count(name, self.path)
        return getattr(self.file, name)


def digests(directory: Path) -> dict[str, str]:
    names = sorted(os.listdir(directory))
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def write_in_two_parts(directory: Path) -> Cache:
    """A finished cache of two shards that is extended by a third."""
    write(cached.teacher, IDS[:4].split(2), directory, shard_tokens=32)
    return write(cached.teacher, IDS.split(2), directory, shard_tokens=32)


def use(directory: Path) -> None:
    cache = open_cache(directory)
    assert cache.bytes > 0
    for ids in IDS:
        assert cache.rows(ids).ids.shape == (16, 12)
    cache.verify()


def assert_clear(error: CacheError, disk: Disk, directory: Path) -> None:
    """It says where, in the system's words why, and what to do."""
    message = str(error)
    assert str(directory) in message
    assert os.strerror(disk.number) in message
    assert message.split(os.strerror(disk.number), 1)[1].startswith("; ")


def test_a_write_fails_clearly_at_every_point_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at one point, broken at the next; and the same write again ends in the same bytes."""
    disk = Disk(tmp_path, monkeypatch)
    write_in_two_parts(tmp_path / "whole")
    points, kept, swallowed = len(disk.seen), 0, []
    expected = digests(tmp_path / "whole")
    assert points > 80
    for point in range(1, points + 1):
        directory, number = tmp_path / str(point), (errno.ENOSPC, errno.EIO)[point % 2]
        disk.start(point, number)
        failed = None
        try:
            write_in_two_parts(directory)
        except CacheError as error:
            failed = error
        if failed is None:
            swallowed.append(disk.seen[point - 1].split()[0])
            continue
        disk.start(number=number)
        assert_clear(failed, disk, tmp_path)
        if (directory / "manifest.json").exists():
            half = open_cache(directory)
            half.verify()
            assert half.sequences >= kept  # what a complete shard held after an earlier point it holds after this one
            kept = half.sequences
        if point % 3 == 0:
            write_in_two_parts(directory)
            assert digests(directory) == expected, point
    assert kept == len(IDS)
    assert swallowed == ["mkdir"]  # of a directory that is there


def test_a_read_fails_clearly_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    write_in_two_parts(tmp_path / "whole")
    disk.start()
    use(tmp_path / "whole")
    points = len(disk.seen)
    assert points > 20
    for point in range(1, points + 1):
        disk.start(point)
        with pytest.raises(CacheError) as raised:
            use(tmp_path / "whole")
        assert_clear(raised.value, disk, tmp_path)
    disk.start()
    use(tmp_path / "whole")


def test_directories_that_cannot_be_made_or_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(CacheError, match=r"cannot make the directory .*; name another"):
            write(cached.teacher, [IDS], place)
        with pytest.raises(CacheError, match="is no fastkd cache"):
            open_cache(place)
    assert (tmp_path / "file").read_text() == "mine"
