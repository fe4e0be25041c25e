"""Damage is found before a row of it is served, and named: by file, and by key."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from fastkd.cache import Cache, CacheError, write
from fastkd.cache import open as open_cache
from tests import cached

IDS = cached.sequences(12)
FORMATS = {"sampled": {}, "topk": {"k": 20, "packed": False}, "dense": {}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished cache of each format, in three shards."""
    made = {}
    for format, settings in FORMATS.items():
        made[format] = tmp_path_factory.mktemp("whole") / format
        write(cached.teacher, IDS.split(4), made[format], format=format, shard_tokens=64, **settings)
    return made


def read_all(directory: Path) -> list[torch.Tensor]:
    cache = open_cache(directory)
    rows = [cache.rows(ids) for ids in IDS]
    return [row if isinstance(row, torch.Tensor) else torch.cat((row.ids, row.logprobs), -1) for row in rows]


def test_single_bit_flips_are_never_served(whole: dict[str, Path], tmp_path: Path) -> None:
    """300 of them, anywhere in the shards: header, rows, keys and places."""
    chance = random.Random(0)
    for number in range(300):
        format = chance.choice(list(whole))
        directory = tmp_path / str(number)
        shutil.copytree(whole[format], directory)
        path = chance.choice(sorted(directory.glob("*.safetensors")))
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content) if number % 3 else min(len(content), 600))
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CacheError, match=path.name):
            read_all(directory)
        with pytest.raises(CacheError, match=path.name):
            open_cache(directory).verify()
        shutil.rmtree(directory)


def test_only_what_is_read_is_checked_and_only_once(whole: dict[str, Path], tmp_path: Path) -> None:
    """An untouched shard costs nothing; one that was right when it was first read is not read again."""
    directory = tmp_path / "cache"
    shutil.copytree(whole["topk"], directory)
    damaged = directory / "shard-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    cache = open_cache(directory)
    assert cache.rows(IDS[0]).ids.shape == (16, 20)
    with pytest.raises(CacheError, match=rf"{damaged.name} is corrupt: its checksum is .*; restore the file"):
        cache.rows(IDS[11])
    (directory / "shard-00000.safetensors").unlink()  # the map of it stays
    assert cache.rows(IDS[1]).ids.shape == (16, 20)


def test_damage_is_found_before_the_teacher_runs(whole: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    shutil.copytree(whole["sampled"], directory)
    path = directory / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    def never(_batch: Any) -> torch.Tensor:
        raise AssertionError("the teacher ran beside a damaged shard")

    with pytest.raises(CacheError, match=f"{path.name} is corrupt"):
        write(never, [cached.sequences(13)], directory)


@pytest.mark.parametrize("how", ["shifted", "descending", "empty", "short"])
def test_places_that_do_not_fit_are_found_at_open(whole: dict[str, Path], tmp_path: Path, how: str) -> None:
    """Without reading a row: the file is right to its checksum, but its places are not."""
    directory = tmp_path / "cache"
    shutil.copytree(whole["sampled"], directory)
    path = directory / "shard-00000.safetensors"
    parts = load_file(path)
    starts = parts["starts"]
    parts["starts"] = {
        "shifted": starts + np.r_[1, np.zeros(len(starts) - 1, np.int64)],
        "descending": starts[[0, 2, 1, 3, 4]],
        "empty": starts[[0, 1, 1, 3, 4]],
        "short": starts * 3 // 4,
    }[how]
    path.write_bytes(save(parts))
    with pytest.raises(CacheError, match=r"shard-00000.safetensors is damaged: its sequences do not follow"):
        open_cache(directory)


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """With the checksum of what it has become, as the format defines it: what only someone who means it would write."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    digest = hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {**rest, "checksum": digest}


STRANGE: list[Any] = [None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), float("inf")]
STRANGE += ["", "x", "../../etc/passwd", "\ud800", "0" * 64, [], [1], {}, {"a": {}}, "packed", "float16", "dense"]
#: Written as lists in lists, of which Python's own functions take no more than a thousand.
DEEP = {"deep": 3, "deeper": 400, "deepest": 100_000}


def mutated(document: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with one to three changes: other values and types, keys missing, new or swapped, shards shuffled."""
    found = copy.deepcopy(document)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        target = found if chance.random() < 0.6 or not found.get("shards") else chance.choice(found["shards"])
        if not isinstance(target, dict) or not target:
            continue
        key = chance.choice(sorted(target))
        change = chance.randrange(6)
        if change == 0:
            target[key] = copy.deepcopy(chance.choice([*STRANGE, *DEEP]))
        elif change == 1:
            del target[key]
        elif change == 2:
            target[chance.choice(["extra", "Format", ""])] = chance.choice(STRANGE)
        elif change == 3 and isinstance(target[key], (int, float)) and not isinstance(target[key], bool):
            target[key] = target[key] + chance.choice([-1, 1, 0.5, 2**40])
        elif change == 4 and isinstance(target[key], str):
            target[key] = chance.choice([target[key][:-1], target[key] + "0", target[key].upper(), target[key][::-1]])
        elif isinstance(found.get("shards"), list) and len(found["shards"]) > 1:
            found["shards"] = chance.choice([found["shards"][::-1], found["shards"][:-1], 2 * found["shards"]])
    return found


def dumped(document: dict[str, Any]) -> bytes:
    text = json.dumps(document)
    for name, depth in DEEP.items():
        text = text.replace(f'"{name}"', "[" * depth + "]" * depth)
    return text.encode()


@pytest.mark.parametrize("resigned", [False, True], ids=["edited", "edited and signed again"])
@pytest.mark.parametrize("format", FORMATS)
def test_hostile_manifests_are_cache_errors(
    whole: dict[str, Path], tmp_path: Path, format: str, resigned: bool
) -> None:
    """100 mutations each way and format: a CacheError that names the file, or the same rows; never anything else."""
    directory = tmp_path / "cache"
    shutil.copytree(whole[format], directory)
    manifest = directory / "manifest.json"
    document = json.loads(manifest.read_text())
    expected = read_all(directory)
    chance = random.Random(f"{format} {resigned}")
    refused = []
    for _ in range(100):
        changed = mutated(document, chance)
        if changed == document:
            continue
        manifest.write_bytes(dumped(signed(changed) if resigned else changed))
        try:
            found = read_all(directory)
        except CacheError as error:
            refused.append(str(error))
            continue
        assert resigned, changed
        # Nothing contradicts another name, another seed, or the temperature of the same rows.
        for before, after in zip(expected, found, strict=True):
            assert torch.equal(before, after)
    assert all(str(directory) in message and len(message) < 1000 for message in refused)
    assert len(refused) >= (50 if resigned else 85)


KEYS: list[tuple[str, Any, str]] = [
    ("temperature", 2.0, "its checksum is not that of its contents"),
    ("complete", False, "its checksum is not that of its contents"),
    ("seed", 1, "its checksum is not that of its contents"),
    ("temperature", -1.0, r"'temperature' is -1.0, not a number in \[1e-30, 1e\+06\]"),
    ("temperature", "hot", r"'temperature' is 'hot', not a number in \[1e-30, 1e\+06\]"),
    ("k", True, r"'k' is True, not an integer in \[1, 2147483647\] or null"),
    ("k", None, "'k' is None, which no cache of format 'sampled' has"),
    ("vocab_size", 2**40, r"'vocab_size' is 1099511627776, not an integer in"),
    ("packing", "float16", "'packing' is 'float16', which no cache of format 'sampled' has"),
    ("packing", "plain", r"shard-00000.safetensors is damaged: it holds"),
    ("format", ["sampled"], r"'format' is \['sampled'\], not one of sampled, topk, dense"),
    ("complete", 1, "'complete' is 1, not true or false"),
    ("shards", {}, "'shards' is {}, not a list"),
    ("shards", [[]], r"'shards\[0\]' is \[\], not an object"),
    ("tokens", 191, "'tokens' is 191, but the shards have 192"),
    ("sequences", 10**30, "'sequences' is 1000000000000000000000000000000, not an integer of at least 0"),
    ("colour", "blue", "'colour' is no key of this format"),
]


@pytest.mark.parametrize(("key", "value", "message"), KEYS, ids=[f"{key} {value}" for key, value, _ in KEYS])
def test_manifests_that_are_wrong_in_one_key(
    whole: dict[str, Path], tmp_path: Path, key: str, value: Any, message: str
) -> None:
    directory = tmp_path / "cache"
    shutil.copytree(whole["sampled"], directory)
    manifest = directory / "manifest.json"
    document = {**json.loads(manifest.read_text()), key: value}
    manifest.write_text(json.dumps(document if "checksum" in message else signed(document)))
    with pytest.raises(CacheError, match=message):
        open_cache(directory)


def test_keys_of_shards_are_named(whole: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    shutil.copytree(whole["sampled"], directory)
    manifest = directory / "manifest.json"
    document = json.loads(manifest.read_text())
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        r"'sha256' of shards\[1\] is missing": lambda shard: shard.pop("sha256"),
        r"'bytes' of shards\[1\] is '7', not an integer of at least 1": lambda shard: shard.update(bytes="7"),
        r"'file' of shards\[1\] is '../x', not 'shard-00001": lambda shard: shard.update(file="../x"),
    }
    for message, change in changes.items():
        changed = copy.deepcopy(document)
        change(changed["shards"][1])
        manifest.write_text(json.dumps(signed(changed)))
        with pytest.raises(CacheError, match=f"manifest.json is damaged: {message}"):
            open_cache(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"fastkd_cache": ' + b"9" * 5000 + b"}",
        b"null",
        b'{"fastkd_cache": true}',
    ],
    ids=["empty", "half", "no UTF-8", "deep", "5000 digits", "null", "version true"],
)
def test_manifests_that_are_no_manifests(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    for use in (open_cache, lambda directory: write(cached.teacher, [IDS], directory)):
        with pytest.raises(CacheError, match=r"manifest.json (cannot be read|is not the manifest)"):
            use(tmp_path)


def test_a_reader_of_an_edited_cache_is_refused_in_another_process_too(whole: dict[str, Path], tmp_path: Path) -> None:
    """A pickled cache is opened again, with the same checks."""
    directory = tmp_path / "cache"
    shutil.copytree(whole["sampled"], directory)
    cache = open_cache(directory)
    function, arguments = cache.__reduce__()
    assert function is Cache
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"temperature": 1.0', '"temperature": 1.5'))
    with pytest.raises(CacheError, match="edited after it was written"):
        function(*arguments)
