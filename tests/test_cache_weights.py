"""A cache is of one teacher's weights: others are refused, whatever the teacher is called and wherever it lies."""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastkd.cache
from fastkd.cache import CacheError, write
from fastkd.cache import open as open_cache
from tests import cached

transformers = pytest.importorskip("transformers")

LENGTH = 16


def gpt2(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=97, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval().to(dtype)


def trained_further(model: nn.Module, name: str = "transformer.h.1.mlp.c_fc.weight", by: float = 1e-3) -> nn.Module:
    """A copy of which one tensor was moved, by a thousandth of its size."""
    other = copy.deepcopy(model)
    other.get_parameter(name).data.mul_(1 + by)
    return other


def windows(count: int = 6) -> Tensor:
    return torch.randint(97, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_a_fingerprint_is_of_weights_and_of_nothing_else(tmp_path: Path) -> None:
    """Not of the object, the directory, a wrapper, or whether it was loaded as float32 or bfloat16."""
    model = gpt2()
    same = fastkd.cache.fingerprint(model)
    assert len(same) == 32
    assert fastkd.cache.fingerprint(gpt2()) == same
    assert fastkd.cache.fingerprint(nn.ModuleDict({"module": model})) == same
    assert fastkd.cache.fingerprint(gpt2(dtype=torch.bfloat16)) == same
    model.save_pretrained(tmp_path / "a")
    for name in (tmp_path / "a", str(tmp_path / "." / "a")):
        assert fastkd.cache.fingerprint(transformers.AutoModelForCausalLM.from_pretrained(name)) == same
    transposed = gpt2()
    weight = transposed.get_parameter("transformer.h.0.mlp.c_fc.weight")
    weight.data = weight.data.t().contiguous().t()
    assert fastkd.cache.fingerprint(transposed) == same
    assert fastkd.cache.fingerprint(gpt2(seed=1)) != same


@pytest.mark.parametrize("name", [name for name, _ in gpt2().named_parameters() if name.endswith("weight")])
def test_training_any_tensor_further_shows(name: str) -> None:
    """By a hundredth; a norm's weights are all 1 at first, which bfloat16 tells from 1.001 by nothing."""
    model = gpt2()
    assert fastkd.cache.fingerprint(trained_further(model, name, 1e-2)) != fastkd.cache.fingerprint(model)


@pytest.mark.parametrize("part", [slice(0, 400), slice(400, 800), slice(1552 - 300, 1552)])
def test_training_part_of_a_tensor_shows(part: slice) -> None:
    """Rows of the embedding: values are sampled from all over a tensor."""
    model = gpt2()
    before = fastkd.cache.fingerprint(model)
    model.get_parameter("transformer.wte.weight").data.view(-1)[part] += 0.01
    assert fastkd.cache.fingerprint(model) != before


def test_a_fingerprint_costs_nothing_beside_a_forward() -> None:
    """Of 14 GB of weights, which are never read as a whole: they are not even in memory."""
    layer = nn.ParameterList(nn.Parameter(torch.empty(4096, 11008, dtype=torch.bfloat16), False) for _ in range(155))
    assert sum(weight.nbytes for weight in layer) > 13e9
    started = time.perf_counter()
    fastkd.cache.fingerprint(layer)
    assert time.perf_counter() - started < 5


def test_a_stale_teacher_does_not_resume_a_write(tmp_path: Path) -> None:
    """Half of the rows would be another teacher's."""

    def stopped():
        yield from windows().split(2)[:2]
        raise KeyboardInterrupt

    teacher = gpt2()
    with pytest.raises(KeyboardInterrupt):
        write(teacher, stopped(), tmp_path, shard_tokens=32)
    before = digests(tmp_path)
    with pytest.raises(CacheError, match=r"teacher with other weights \(\w{32}\) than the one at hand"):
        write(trained_further(teacher), windows().split(2), tmp_path, shard_tokens=32)
    assert digests(tmp_path) == before
    assert write(gpt2(), windows().split(2), tmp_path, shard_tokens=32).sequences == 6


def test_a_stale_teacher_is_not_served_a_finished_cache(tmp_path: Path) -> None:
    teacher = gpt2()
    cache = write(teacher, [windows()], tmp_path)
    cache.check(teacher=teacher)
    cache.check(teacher=fastkd.cache.fingerprint(teacher))
    assert cache.settings.weights == fastkd.cache.fingerprint(teacher)
    for batches in ([windows()], [windows(7)]):
        with pytest.raises(CacheError, match="teacher with other weights"):
            write(trained_further(teacher), batches, tmp_path)
    with pytest.raises(CacheError, match="teacher with other weights"):
        cache.check(teacher=trained_further(teacher))


def test_a_function_may_say_which_weights_it_has(tmp_path: Path) -> None:
    ids = cached.sequences(2)
    write(cached.teacher, [ids], tmp_path, teacher_fingerprint="first")
    assert write(cached.teacher, [ids], tmp_path, teacher_fingerprint="first").sequences == 2
    with pytest.raises(CacheError, match=r"other weights \(first\) than the one at hand \(second\)"):
        write(cached.teacher, [ids], tmp_path, teacher_fingerprint="second")
    with pytest.raises(CacheError, match="give teacher_fingerprint"):
        write(cached.teacher, [cached.sequences(3)], tmp_path)


def as_version_1(directory: Path, **changes: object) -> None:
    """The manifest as the first version of the format has it."""
    path = directory / "manifest.json"
    document = json.loads(path.read_text()) | {"fastkd_cache": 1, **changes}
    for name in ("weights", "columns", "checksum"):
        del document[name]
    path.write_text(json.dumps(document))


def test_a_cache_of_version_1_is_read_with_a_warning_and_not_written_to(tmp_path: Path) -> None:
    teacher = gpt2()
    rows = write(teacher, [windows()], tmp_path).targets(list(windows()))
    as_version_1(tmp_path)
    with pytest.warns(UserWarning, match=r"does not say which weights its teacher had \(its format version is 1\)"):
        cache = write(teacher, [windows()], tmp_path)
    assert torch.equal(cache.targets(list(windows())).ids, rows.ids)
    cache.verify()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CacheError, match="format version 1, which is read but not written to"):
            write(teacher, [windows(7)], tmp_path)
        as_version_1_incomplete = json.loads((tmp_path / "manifest.json").read_text()) | {"complete": False}
        (tmp_path / "manifest.json").write_text(json.dumps(as_version_1_incomplete))
        with pytest.raises(CacheError, match="format version 1, which is read but not written to"):
            write(teacher, [windows()], tmp_path)
    assert open_cache(tmp_path).sequences == 6


def test_names_are_compared_where_weights_are_unknown(tmp_path: Path) -> None:
    ids = cached.sequences(2)
    write(cached.teacher, [ids], tmp_path, teacher_name="one")
    with pytest.raises(CacheError, match="begun with teacher='one', but teacher='other'"):
        write(cached.teacher, [ids], tmp_path, teacher_name="other")
