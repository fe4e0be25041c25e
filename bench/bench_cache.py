"""Does a cache cost little more than the teacher's forward to write, and next to nothing to read?"""

from __future__ import annotations

import itertools
import pathlib
import shutil
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastkd.cache
from bench import machine, shapes, teachers
from bench.cases import Case
from bench.contenders import Contender
from bench.names import FRESH
from bench.race import race
from fastkd import Projection

CASES = shapes.CACHE_WRITE + shapes.CACHE_READ
_SEQUENCE, _BATCHES = 128, 16


def bench_cache(benchmark: BenchmarkFixture, case: Case, quick: bool, tmp_path: pathlib.Path) -> None:
    contenders = _writing if case.question == "cache_write" else _reading
    race(benchmark, contenders(case, tmp_path), case, quick=quick)


def _writing(case: Case, folder: pathlib.Path) -> list[Contender]:
    model, ids = teachers.smollm2(), teachers.windows(case.rows)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    directory = folder / "cache"

    def verify(cache: Any) -> None:
        assert cache.tokens == case.rows
        entropy = cache.targets(list(ids)).entropy
        exact = fastkd.row_statistics(teachers.rows_of(case.rows)).entropy
        torch.testing.assert_close(entropy, exact, rtol=1e-3, atol=1e-3)

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**batch, use_cache=False).logits
        return logits

    return [
        Contender(
            FRESH,
            lambda: fastkd.cache.write(model, [batch], directory, vocab_size=case.vocab),
            prepare=lambda: shutil.rmtree(directory, ignore_errors=True),
            verify=verify,
        ),
        Contender("teacher forward", forward),
    ]


def _reading(case: Case, folder: pathlib.Path) -> list[Contender]:
    """A cache of 16 batches, read in a shuffled order that never repeats within an epoch."""
    size, generator = case.rows // _SEQUENCE, machine.generator()
    ids = torch.randint(case.vocab, (size * _BATCHES, _SEQUENCE), generator=generator)
    states, head = torch.randn(case.vocab, 8, generator=generator), torch.randn(case.vocab, 8, generator=generator)

    def teacher(batch: Any) -> Projection:
        return Projection(states[batch["input_ids"]], head)

    cache = fastkd.cache.write(teacher, ids.split(8), folder / "cache", shard_tokens=1 << 15)
    order = torch.randperm(len(ids), generator=generator).tolist()
    shuffled = itertools.cycle([[ids[number] for number in order[at : at + size]] for at in range(0, len(ids), size)])

    def verify(targets: Any) -> None:
        assert targets.ids.shape == (size, _SEQUENCE, 12)

    return [Contender(FRESH, lambda: cache.targets(next(shuffled)), verify=verify)]
