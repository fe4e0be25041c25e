"""Does a cache cost little more than the teacher's forward to write, and next to nothing to read?"""

from __future__ import annotations

import itertools
import pathlib
import shutil
from typing import Any

import torch
from torch import Tensor

import fastkd.cache
from bench.harness import machine
from bench.harness.contender import FRESH, Contender
from bench.harness.question import Case, Question, Section, within
from bench.harness.race import Benchmark, race
from bench.rivals import teachers
from fastkd import Projection

_FORWARD = "teacher forward"
WRITE = Question(
    "cache_write",
    Section.CACHES,
    "Writing a sampled cache, k = 12, from SmolLM2-135M on 128-token windows of IMDB reviews",
    "The floor is the teacher's bare forward, its output head included; GB/s are of its logits.",
    floor=_FORWARD,
)
READ = Question(
    "cache_read",
    Section.CACHES,
    "Reading a cache, k = 12: one of many shuffled batches of 32 sequences of 128 tokens",
    "No floor is given; 8.192 ms are 500,000 tokens per second.",
    passes=0,
)
CASES = (
    Case(WRITE, 256, teachers.VOCAB, torch.float32, (within(FRESH, _FORWARD, 1.15),)),
    Case(READ, 32 * 128, 50257, torch.float32, (within(FRESH, None, 32 * 128 / 500),), in_quick=True),
)
_SEQUENCE, _BATCHES = 128, 16


def bench_cache(benchmark: Benchmark, case: Case, quick: bool, tmp_path: pathlib.Path) -> None:
    contenders = _writing if case.question == WRITE else _reading
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
        Contender(_FORWARD, forward),
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
