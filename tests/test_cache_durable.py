"""A cache loses nothing: killed, resumed, out of space, damaged, written twice at a time."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd.cache import CacheError, write
from fastkd.cache import open as open_cache
from fastkd.cache.manifest import checksum
from tests import cached

#: Writes 12 batches in shards of 3 and kills itself as the environment says: when the n-th batch is computed, or the
#: n-th time a file is about to be renamed or has been written in part.
WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from fastkd.cache import store, write
from tests import cached

torch.set_num_threads(1)
point, count = sys.argv[2], int(sys.argv[3])

def die_at(name):
    global count
    if name == point:
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def teacher(batch):
    die_at("batch")
    return cached.teacher(batch)

rename, fsync = Path.rename, os.fsync
def dying_rename(self, target):
    die_at("before rename")
    rename(self, target)
    die_at("after rename")
Path.rename = dying_rename
def dying_fsync(descriptor):
    die_at("written")
    fsync(descriptor)
os.fsync = dying_fsync

ids = cached.sequences(48)
ids[20] = ids[3]  # known from an earlier shard when it comes again
write(teacher, ids.split(4), sys.argv[1], seed=5, shard_tokens=3 * 4 * 16)
"""


ROOT = Path(__file__).parent.parent


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def run_writer(directory: Path, point: str = "never", count: int = 0) -> int:
    command = [sys.executable, "-c", WRITER, str(directory), point, str(count)]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("cache") / "whole"
    assert run_writer(directory) == 0
    assert len(list(directory.glob("*.safetensors"))) == 4
    return digests(directory)


def test_killed_anywhere_and_resumed(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    """The finished cache is byte by byte the uninterrupted one, and what was complete could be read in between."""
    directory = tmp_path / "cache"
    kills = [("before rename", 1, 0), ("batch", 2, 0), ("written", 1, 0), ("after rename", 1, 0)]
    kills += [("written", 3, 0), ("after rename", 2, 12), ("batch", 5, 27)]
    for point, count, sequences in kills:
        assert run_writer(directory, point, count) == -signal.SIGKILL, (point, count)
        if (directory / "manifest.json").exists():
            half = open_cache(directory)
            half.verify()
            assert not half.complete
            assert "incomplete" in repr(half)
            assert half.sequences == sequences, (point, count)
            if sequences:
                assert half.rows(cached.sequences(48)[0]).ids.shape == (16, 12)
    assert run_writer(directory) == 0
    assert digests(directory) == uninterrupted


def test_interrupted_batches(tmp_path: Path) -> None:
    """An exception, such as that of Ctrl-C, leaves a cache that goes on; the batches it lost are computed again."""
    ids, computed = cached.sequences(12), []

    def stopping(stop: bool):
        for number, batch in enumerate(ids.split(2)):
            if stop and number == 4:
                raise KeyboardInterrupt
            yield batch

    def teacher(batch):
        computed.append(len(batch["input_ids"]))
        return cached.teacher(batch)

    settings = {"shard_tokens": 96, "vocab_size": cached.VOCAB}
    with pytest.raises(KeyboardInterrupt):
        write(teacher, stopping(True), tmp_path, **settings)
    assert open_cache(tmp_path).sequences == 6
    computed.clear()
    cache = write(teacher, stopping(False), tmp_path, **settings)
    assert (cache.sequences, len(computed), cache.complete) == (12, 3, True)


def test_a_finished_cache_is_extended(tmp_path: Path) -> None:
    ids = cached.sequences(6)
    write(cached.teacher, [ids[:2]], tmp_path)
    before = open_cache(tmp_path).rows(ids[0])
    cache = write(cached.teacher, [ids], tmp_path)
    assert (cache.sequences, cache.complete) == (6, True)
    assert torch.equal(cache.rows(ids[0]).ids, before.ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "begun with seed=0, but seed=1"),
        ({"format": "topk"}, "begun with format='sampled', but format='topk'"),
        ({"k": 13}, "begun with k=12, but k=13"),
        ({"temperature": 2.0}, "begun with temperature=1.0, but temperature=2.0"),
        ({"packed": False}, "begun with packing='packed', but packing='plain'"),
        ({"vocab_size": 300}, "begun with vocab_size=301, but vocab_size=300"),
        ({"teacher_name": "other"}, "begun with teacher=None, but teacher='other'"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes, message) -> None:
    ids = cached.sequences(2)
    write(cached.teacher, [ids], tmp_path)
    before = digests(tmp_path)
    with pytest.raises(CacheError, match=message):
        write(cached.teacher, [ids + 1], tmp_path, **changes)
    assert digests(tmp_path) == before


def test_two_writers(tmp_path: Path) -> None:
    """The second is refused while the first works, and neither before nor after."""

    def batches():
        yield cached.sequences(2)
        with pytest.raises(CacheError, match="another process is writing the cache"):
            write(cached.teacher, [cached.sequences(1)], tmp_path)
        command = [sys.executable, "-c", WRITER, str(tmp_path), "never", "0"]
        child = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        assert "another process is writing the cache" in child.stderr
        yield cached.sequences(3)

    assert write(cached.teacher, batches(), tmp_path).sequences == 3
    assert write(cached.teacher, [cached.sequences(4)], tmp_path).sequences == 4


def test_foreign_directories(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="it has no manifest"):
        open_cache(tmp_path)
    with pytest.raises(CacheError, match="it has no manifest"):
        open_cache(tmp_path / "absent")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and no fastkd cache"):
        write(cached.teacher, [cached.sequences(1)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    manifest = tmp_path / "manifest.json"
    for content, message in [
        ("{", "cannot be read"),
        ("[]", "not the manifest of a fastkd cache"),
        ('{"model_type": "gpt2"}', "not the manifest of a fastkd cache"),
        ('{"fastkd_cache": 3}', r"format version 3, this fastkd reads versions 1 to 2: use the fastkd that wrote it"),
        ('{"fastkd_cache": 1}', "is damaged: 'format' is missing"),
    ]:
        manifest.write_text(content)
        with pytest.raises(CacheError, match=message):
            open_cache(tmp_path)


def edit(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip_last_byte(content: bytearray) -> None:
    content[-1] ^= 1


@pytest.mark.parametrize("number", [0, 1])
def test_damage(tmp_path: Path, number: int) -> None:
    ids = cached.sequences(8)
    cache = write(cached.teacher, ids.split(4), tmp_path, shard_tokens=64)
    cache.verify()
    path = tmp_path / f"shard-{number:05d}.safetensors"
    whole = path.read_bytes()
    edit(path, flip_last_byte)
    with pytest.raises(CacheError, match=f"{path.name} is corrupt"):
        open_cache(tmp_path).verify()
    path.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=f"{path.name} has {len(whole) - 1} bytes, but {len(whole)} were written"):
        open_cache(tmp_path)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(CacheError, match=f"{path.name} cannot be read"):
        open_cache(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match=f"{path.name} cannot be read"):
        open_cache(tmp_path)
    with pytest.raises(CacheError, match=f"{path.name} cannot be read"):
        write(cached.teacher, [ids], tmp_path, shard_tokens=64)


def test_shard_of_another_cache(tmp_path: Path) -> None:
    ids = cached.sequences(4)
    write(cached.teacher, [ids], tmp_path / "a", k=12)
    write(cached.teacher, [ids], tmp_path / "b", k=11)
    content = (tmp_path / "b" / "shard-00000.safetensors").read_bytes()
    (tmp_path / "a" / "shard-00000.safetensors").write_bytes(content)
    manifest = tmp_path / "a" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["shards"][0]["bytes"] = len(content)
    document["checksum"] = checksum(document)
    manifest.write_text(json.dumps(document))
    with pytest.raises(CacheError, match="is damaged: it holds"):
        open_cache(tmp_path / "a")


def test_full_disk(tmp_path: Path, monkeypatch) -> None:
    """The second shard does not fit: a clear error, no half file, the first shard usable; then there is room."""
    ids = cached.sequences(8)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "shard-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"No space left on device; the 4 sequences in 1 complete shards are safe"):
        write(cached.teacher, ids.split(4), tmp_path, shard_tokens=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    half = open_cache(tmp_path)
    half.verify()
    assert half.rows(ids[0]).ids.shape == (16, 12)
    monkeypatch.undo()
    assert write(cached.teacher, ids.split(4), tmp_path, shard_tokens=64).sequences == 8


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from fastkd.cache import write
from tests import cached
write(cached.teacher, cached.sequences(8).split(4), sys.argv[1], format="topk", k=40, shard_tokens=64)
"""


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """The system's own refusal in the middle of a file."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    child = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert "CacheError: cannot write" in child.stderr
    assert "File too large" in child.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert open_cache(tmp_path).sequences == 0
