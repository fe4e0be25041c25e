"""What a cache cannot serve is refused by the options, the cache and the loss alike, from one table."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch

import fastkd
from fastkd.cache import CacheError, write
from fastkd.training.commands.cache import CacheOptions
from fastkd.training.commands.sweep import SweepOptions
from fastkd.training.options import DistillationOptions, InputError
from tests import cached, cases, compare

FORMATS = ("sampled", "topk", "dense")
#: All that a cache of a format can serve, written out once more: the table itself is what is tested.
SERVED = {
    "sampled": {"forward_kl"},
    "topk": set(cases.NAMES) - {"mse"},
    "dense": set(cases.NAMES) - {"mse"},
}
COMBINATIONS = [(format, name, name in SERVED[format]) for format in FORMATS for name in cases.NAMES]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ids = cached.sequences(2)
    return {
        format: write(cached.teacher, [ids], tmp_path_factory.mktemp("cache"), format=format, **settings)
        for format, settings in {"sampled": {}, "topk": {}, "dense": {}}.items()
    }


def student() -> torch.Tensor:
    return torch.randn(2, 16, cached.VOCAB, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("format", "divergence", "served"), COMBINATIONS)
def test_loss_cache_and_options_agree(caches: dict[str, Any], format: str, divergence: str, served: bool) -> None:
    kd = fastkd.KDLoss(1.0, soft_weight=1.0, hard_weight=0.0, divergence=divergence)
    targets = caches[format].targets(list(cached.sequences(2)))
    if served:
        assert math.isfinite(float(kd(student(), targets)))
        caches[format].check(loss=kd)
        DistillationOptions(divergence=divergence, cache_dir="cache", cache_format=format)
        return
    with pytest.raises(ValueError, match="cannot serve this loss"):
        kd(student(), targets)
    with pytest.raises(CacheError, match="cannot serve this loss"):
        caches[format].check(loss=kd)
    with pytest.raises(
        InputError, match=re.escape(f"divergence is '{divergence}', which a {format} cache cannot serve")
    ):
        DistillationOptions(divergence=divergence, cache_dir="cache", cache_format=format)
    DistillationOptions(divergence=divergence, cache_format=format)  # a live teacher serves it
    DistillationOptions(divergence=divergence, cache_dir="c", cache_format=format, soft_weight=0.0, hard_weight=1.0)


@pytest.mark.parametrize("where", ["as it is", "moved", "stacked", "pickled"])
def test_raw_logits_are_never_taken_from_log_probabilities(caches: dict[str, Any], where: str) -> None:
    """The teacher's logits give another loss than its log-probabilities, and mse would not tell."""
    ids = cached.sequences(2)
    logits = torch.stack([cached.logits(sequence) for sequence in ids])
    kd = fastkd.KDLoss(1.0, soft_weight=1.0, hard_weight=0.0, divergence="mse")
    exact, wrong = float(kd(student(), logits)), float(kd(student(), logits.log_softmax(-1)))
    assert wrong > 2 * exact
    targets = caches["dense"].targets(list(ids))
    ways = {
        "as it is": lambda: targets,
        "moved": lambda: targets.to("cpu", torch.float32).detach(),
        "stacked": lambda: torch.cat([targets[:1], targets[1:]]),
        "pickled": lambda: next(iter(torch.utils.data.DataLoader([0], collate_fn=lambda _: targets, num_workers=1))),
    }
    with pytest.raises(ValueError, match="compares raw logits"):
        kd(student(), ways[where]())


def test_dense_rows_serve_any_temperature_and_are_plain_to_the_loss(caches: dict[str, Any]) -> None:
    ids = cached.sequences(2)
    logits = torch.stack([cached.logits(sequence) for sequence in ids])
    for temperature in (1.0, 3.0):
        kd = fastkd.KDLoss(temperature, soft_weight=1.0, hard_weight=0.0, teacher_temperature=2.0)
        caches["dense"].check(loss=kd)
        leaf = student().requires_grad_()
        loss = kd(leaf, caches["dense"].targets(list(ids)))
        assert type(loss) is torch.Tensor
        loss.backward()
        assert type(leaf.grad) is torch.Tensor
        torch.testing.assert_close(loss.detach(), kd(student(), logits), rtol=5e-3, atol=1e-3)
        compare.assert_value(loss.detach(), kd(student(), caches["dense"].targets(list(ids)).as_subclass(torch.Tensor)))


def test_other_temperatures_are_refused_by_samples_and_top_k(caches: dict[str, Any]) -> None:
    for format in ("sampled", "topk"):
        targets = caches[format].targets(list(cached.sequences(2)))
        for kd in (fastkd.KDLoss(2.0), fastkd.KDLoss(1.0, teacher_temperature=2.0)):
            with pytest.raises(CacheError, match=r"is at temperature 1.0, the training at 2.0"):
                caches[format].check(loss=kd)
            with pytest.raises(ValueError, match=r"made at temperature 1.0, but this loss takes the teacher at 2.0"):
                kd(student(), targets, torch.zeros(2, 16, dtype=torch.int64))
        caches[format].check(loss=fastkd.KDLoss(2.0, teacher_temperature=1.0))
    with pytest.raises(CacheError, match="a vocabulary of 301, the training one of 300"):
        caches["topk"].check(loss=fastkd.KDLoss(1.0, vocab_size=300))


BAD_OPTIONS: list[tuple[type, dict[str, Any], str]] = [
    (DistillationOptions, {"divergence": "mse", "cache_dir": "c", "cache_precision": "fp16"}, "compares raw logits"),
    (DistillationOptions, {"divergence": "jsd", "cache_dir": "c"}, "or a teacher of kind .*'topk'"),
    (DistillationOptions, {"cache_dir": "c", "cache_tokens": 0}, "cache_tokens is 0"),
    (DistillationOptions, {"cache_dir": "c", "cache_format": "dense", "cache_tokens": 5}, "keeps all tokens"),
    (CacheOptions, {"cache_format": "dense", "cache_tokens": 5}, "keeps all tokens"),
    (CacheOptions, {"cache_format": "dense", "plain": True}, "plain is set, but a dense cache"),
]


@pytest.mark.parametrize(("group", "values", "message"), BAD_OPTIONS, ids=[message for *_, message in BAD_OPTIONS])
def test_options_that_contradict_a_cache(group: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        group(**values)


def test_a_sweep_is_refused_before_its_first_cell() -> None:
    with pytest.raises(InputError, match="divergence is 'reverse_kl', which a sampled cache cannot serve"):
        SweepOptions(divergence="reverse_kl", cache_dir="caches").cells()
    assert SweepOptions(divergence="reverse_kl", cache_dir="caches", cache_format="topk").cells()


def test_a_compiled_loss_takes_dense_rows(caches: dict[str, Any]) -> None:
    targets = caches["dense"].targets(list(cached.sequences(2))).float()
    kd = fastkd.KDLoss(1.0, soft_weight=1.0, hard_weight=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(kd, backend="eager")(student(), targets)
    compare.assert_value(found, kd(student(), targets))
