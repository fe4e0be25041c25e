"""A finished cache is read by anyone, at any time: what does not matter to reading it does not matter."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cache import CacheError, write
from fastkd.cache import open as open_cache
from tests import cached


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def never(_batch: Any) -> torch.Tensor:
    raise AssertionError("all rows are there: the teacher is not run")


@pytest.mark.parametrize(
    ("begun", "asked"),
    [
        ({"shard_tokens": 32}, {"shard_tokens": 64}),
        ({"shard_tokens": 32}, {}),
        ({"packed": False}, {}),
        ({"k": 5}, {}),
        ({"seed": 7}, {}),
        ({"format": "dense", "dtype": torch.bfloat16}, {"format": "dense"}),
        ({"teacher_name": "./t", "teacher_fingerprint": "w"}, {"teacher_name": "/abs/t", "teacher_fingerprint": "w"}),
        ({"teacher_revision": "a", "teacher_fingerprint": "w"}, {"teacher_revision": "b", "teacher_fingerprint": "w"}),
    ],
)
def test_what_was_not_asked_for_is_what_the_cache_has(tmp_path: Path, begun: dict, asked: dict) -> None:
    """Served to read, and extended as it was begun."""
    ids = cached.sequences(4)
    write(cached.teacher, ids.split(2), tmp_path, **begun)
    before, settings = digests(tmp_path), open_cache(tmp_path).settings
    assert write(never, ids.split(2), tmp_path, **asked).settings == settings
    assert digests(tmp_path) == before
    longer = write(cached.teacher, [cached.sequences(6)], tmp_path, **asked)
    assert (longer.settings, longer.sequences, longer.complete) == (settings, 6, True)


def test_a_finished_cache_is_read_while_another_process_holds_its_lock(tmp_path: Path) -> None:
    """And is extended when it is free again."""
    ids = cached.sequences(4)
    write(cached.teacher, [ids], tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert write(never, [ids], tmp_path).sequences == 4
        with pytest.raises(CacheError, match="another process is writing the cache"):
            write(cached.teacher, [cached.sequences(5)], tmp_path)
    finally:
        os.close(descriptor)
    assert write(cached.teacher, [cached.sequences(5)], tmp_path).sequences == 5


def test_two_readers_while_a_third_extends(tmp_path: Path) -> None:
    """What was finished stays readable in every moment of a longer write."""
    ids = cached.sequences(6)
    first = write(cached.teacher, [ids[:2]], tmp_path)
    expected = first.rows(ids[0]).ids

    def batches() -> Iterator[torch.Tensor]:
        for some in ids.split(2):
            yield some
            reader = open_cache(tmp_path)
            assert torch.equal(reader.rows(ids[0]).ids, expected)
            assert torch.equal(first.rows(ids[0]).ids, expected)

    assert write(cached.teacher, batches(), tmp_path, shard_tokens=32).sequences == 6


def test_a_finished_cache_is_read_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock, no file, no directory is made."""
    ids = cached.sequences(2)
    write(cached.teacher, [ids], tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("rename", "unlink", "fsync"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(fcntl, "flock", refused)
    assert write(never, [ids], tmp_path).rows(ids[0]).ids.shape == (16, 12)
    with pytest.raises(CacheError, match=r"cannot lock .*: Read-only file system; check that"):
        write(cached.teacher, [cached.sequences(3)], tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_writing_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file is the lock: it keeps others out, goes away with the write, and a killed writer's is named."""

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    ids = cached.sequences(4)

    def batches() -> Iterator[torch.Tensor]:
        yield ids[:2]
        lock = tmp_path / ".lock"
        assert str(os.getpid()) in lock.read_text()
        with pytest.raises(
            CacheError, match=rf"another process is writing .*: process {os.getpid()} on .*delete {lock}"
        ):
            write(cached.teacher, [ids], tmp_path)
        yield ids[2:]

    cache = write(cached.teacher, batches(), tmp_path)
    assert cache.sequences == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    assert write(never, [ids], tmp_path).sequences == 4
    with pytest.raises(CacheError, match=r"process 1 on elsewhere\. Wait for it; if it is gone, delete"):
        write(cached.teacher, [cached.sequences(5)], tmp_path)
    (tmp_path / ".lock").unlink()
    assert write(cached.teacher, [cached.sequences(5)], tmp_path).sequences == 5


def test_a_writer_that_waited_sees_what_the_other_wrote(tmp_path: Path) -> None:
    """The manifest is read again under the lock: no shard is overwritten by one who saw fewer."""
    ids = cached.sequences(6)
    write(cached.teacher, [ids[:2]], tmp_path)
    entered = threading.Event()

    def batches() -> Iterator[torch.Tensor]:
        yield ids[:2]  # found: no lock is needed yet
        write(cached.teacher, [ids[2:4]], tmp_path)
        entered.set()
        yield ids[[0, 1, 4, 5]]

    cache = write(cached.teacher, batches(), tmp_path)
    assert entered.is_set()
    assert (cache.sequences, cache.tokens) == (6, 96)
    cache.verify()
