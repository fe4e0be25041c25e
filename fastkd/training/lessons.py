"""What a student learns from: the teacher itself, or a cache of its predictions, which is written first."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import fastkd.cache
from fastkd.training.data import Windows, collate
from fastkd.training.fit import Lessons
from fastkd.training.options import InputError
from fastkd.training.setup import Setup

__all__ = ["lessons"]

#: In a file of the cache: what an interrupted write loses, at most. Dense rows have a limit of their own.
_SHARD_TOKENS = 1 << 14
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, None: torch.float16}


def lessons(setup: Setup) -> Lessons:
    """Lessons of `setup`'s teacher. Where they come from a cache, the teacher is freed.

    Raises InputError for a cache that is of other settings, of another tokenizer, or damaged.
    """
    options, train = setup.options.distillation, setup.materials.corpus.train
    if not options.needs_teacher:
        return Lessons(Windows(train), collate)
    if not options.cache_dir:
        return Lessons(Windows(train), collate, setup.teacher)
    try:
        cache = _written(setup)
        vocab_size, temperature = setup.judge.vocab_size, options.temperature
        cache.check(tokenizer=setup.materials.tokenizer, vocab_size=vocab_size, temperature=temperature)
    except (fastkd.cache.CacheError, ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    print(f"cache: {cache}, {cache.bytes / 2**20:,.1f} MiB")
    setup.teacher = None
    gc.collect()
    return Lessons(Windows(train), fastkd.cache.Collator(cache))


def _written(setup: Setup) -> fastkd.cache.Cache:
    """The cache in the directory asked for, with every window in it."""
    options, train = setup.options.distillation, setup.materials.corpus.train
    dense = options.cache_format == "dense"
    assert options.cache_format is not None
    with tqdm(total=train.numel(), unit="token", desc="cache", dynamic_ncols=True) as bar:
        return fastkd.cache.write(
            setup.teacher,
            _batches(train, setup.options.evaluation.eval_batch_size),
            Path(options.cache_dir),
            format=options.cache_format,
            temperature=1.0 if dense else options.temperature,
            k=options.cache_tokens,
            dtype=_DTYPES[options.cache_precision],
            seed=setup.options.training.seed,
            vocab_size=setup.judge.vocab_size,
            tokenizer=setup.materials.tokenizer,
            teacher_name=setup.options.models.teacher,
            shard_tokens=None if dense else _SHARD_TOKENS,
            progress=lambda done: bar.update(done.tokens - bar.n),
        )


def _batches(windows: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for ids in windows.split(size):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
