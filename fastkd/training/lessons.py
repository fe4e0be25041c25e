"""What a student learns from: the teacher itself, or a cache of its predictions, which is written first."""

from __future__ import annotations

import gc
from pathlib import Path

from fastkd.cache import CacheError, Collator
from fastkd.cache.writer import begun
from fastkd.training.caching import DTYPES, write
from fastkd.training.data import Windows, collate
from fastkd.training.fit import Lessons
from fastkd.training.options import InputError
from fastkd.training.setup import Setup

__all__ = ["lessons"]


def lessons(setup: Setup) -> Lessons:
    """Lessons of `setup`'s teacher. Where they come from a cache, the teacher is freed.

    Raises InputError for a cache that is of other settings, of another tokenizer, or damaged.
    """
    options, train = setup.options.distillation, setup.materials.corpus.train
    if not options.needs_teacher:
        return Lessons(Windows(train), collate)
    if not options.cache_dir:
        return Lessons(Windows(train), collate, setup.teacher)
    vocab_size, tokenizer = setup.judge.vocab_size, setup.materials.tokenizer
    cache = write(
        setup.teacher,
        train,
        options.cache_dir,
        batch_size=setup.options.evaluation.eval_batch_size,
        format=options.cache_format,
        temperature=options.temperature,
        k=options.cache_tokens,
        dtype=DTYPES[options.cache_precision],
        seed=_seed_of_samples(options.cache_dir, setup.options.training.seed),
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        teacher_name=setup.options.models.teacher,
    )
    try:
        cache.check(tokenizer=tokenizer, vocab_size=vocab_size, temperature=options.temperature)
    except CacheError as error:
        raise InputError(str(error)) from error
    print(f"cache: {cache.sequences:,} windows in {cache.directory}, {cache.bytes / 2**20:,.1f} MiB")
    setup.teacher = None
    gc.collect()
    return Lessons(Windows(train), Collator(cache))


def _seed_of_samples(directory: str, seed: int) -> int | None:
    """The run's own; None, which is the cache's, where another run has begun it."""
    try:
        return None if Path(directory).is_dir() and begun(Path(directory)) is not None else seed
    except CacheError as error:
        raise InputError(str(error)) from error
