"""A cache that several processes write together: the files of one, whatever stops them on the way."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.distributed as dist

import fastkd.cache
from fastkd.cache import CacheError
from fastkd.processes import PATIENCE
from tests.processes import run

VOCAB = 50


def batches(wrong=None):
    """Ten batches of three sequences, with padding; some come twice, some are longer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(10):
        ids = torch.randint(1, VOCAB, (3, 4 + number % 3), generator=generator)
        if number == wrong:
            ids += 1
        mask = torch.ones_like(ids)
        mask[1, 3:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return [*found[:5], found[1], *found[5:]]


class Teacher:
    """A function of the ids, that counts its batches, and fails at one of them."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError(f"call {self.calls} failed")
        weight = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
        return weight[batch["input_ids"]]


def write(directory, teacher=None, group=None, some=None, **options):
    settings = {"k": 5, "shard_tokens": 20, "teacher_fingerprint": "weights", "seed": 3} | options
    return fastkd.cache.write(teacher or Teacher(), some or batches(), directory, group=group, **settings)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(directory).iterdir())}


def refused(work):
    """The error that `work` ends with, in words."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def together(rank, folder):
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    calls, told = {}, {}
    for format in ("sampled", "topk", "dense"):
        teacher = Teacher()
        options = {"k": None} if format == "dense" else {}
        write(f"{folder}/{format}", teacher, group, format=format, **options)
        calls[format] = teacher.calls
    # One of them fails in its second shard; the first round is safe. Alone, and then together, it is resumed.
    stopped = Teacher(fails_at=3 if rank == 1 else None)
    told["teacher"] = refused(lambda: write(f"{folder}/stopped", stopped, group))
    told["batches"] = refused(lambda: write(f"{folder}/other", None, group, batches(9 if rank else None)))
    told["arguments"] = refused(lambda: write(f"{folder}/another", None, group, seed=rank))
    full = pathlib.Path(folder, "full")
    if rank == 0:
        full.mkdir()
        (full / "notes").write_text("mine")
    dist.barrier()
    told["directory"] = refused(lambda: write(full, None, group))
    more = [*batches(), torch.full((2, 30), 7) + torch.arange(2)[:, None], torch.full((1, 25), 9)]
    write(f"{folder}/sampled", None, group)  # nothing is new
    extended = Teacher()
    write(f"{folder}/topk", extended, group, more, format="topk")
    calls["extended"] = extended.calls
    return calls, told


def resumed(rank, folder):
    write(f"{folder}/stopped", None, dist.new_group(backend="gloo", timeout=PATIENCE))


def test_several_processes_write_the_files_of_one(tmp_path):
    for format in ("sampled", "topk", "dense"):
        write(tmp_path / "one" / format, format=format, **({"k": None} if format == "dense" else {}))
    assert len(contents(tmp_path / "one" / "sampled")) == 6
    (tmp_path / "two").mkdir()
    (first, told), (second, same) = run(2, together, str(tmp_path / "two"))
    more = [*batches(), torch.full((2, 30), 7) + torch.arange(2)[:, None], torch.full((1, 25), 9)]
    write(tmp_path / "one" / "topk", some=more, format="topk")
    for format in ("sampled", "topk", "dense"):
        assert contents(tmp_path / "two" / format) == contents(tmp_path / "one" / format)
        assert (first[format], second[format]) == (7, 4)  # the first runs it once more, for the width
    assert first["extended"] + second["extended"] == 2
    assert told == same  # each error reaches both
    assert told["teacher"] == "RuntimeError: call 3 failed"
    assert "see different batches" in told["batches"]
    assert "ask for different caches" in told["arguments"]
    assert "is not empty and no fastkd cache" in told["directory"]


@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_processes_resumes(tmp_path, world):
    run(2, _stop, str(tmp_path))
    begun = contents(tmp_path / "stopped")
    assert "manifest.json" in begun
    assert 2 < len(begun) < 6
    if world == 1:
        write(tmp_path / "stopped")
    else:
        run(world, resumed, str(tmp_path))
    write(tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def _stop(rank, folder):
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    stopped = Teacher(fails_at=3 if rank == 1 else None)
    with pytest.raises(RuntimeError, match="call 3 failed"):
        write(f"{folder}/stopped", stopped, group)


def test_a_cache_that_another_writes_is_refused_in_all(tmp_path):
    assert run(2, _locked_out, str(tmp_path)) == [True, True]


def _locked_out(rank, folder):
    from fastkd.cache.disk import locked

    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    directory = pathlib.Path(folder, "cache")
    directory.mkdir(exist_ok=True)
    dist.barrier()
    if rank == 1:
        with locked(directory):
            dist.barrier()
            found = refused(lambda: write(directory, None, group))
    else:
        dist.barrier()
        found = refused(lambda: write(directory, None, group))
    return found.startswith(CacheError.__name__) and "another process is writing" in found
