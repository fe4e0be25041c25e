"""What a student is taught from: the labels, its teacher itself, or a cache of the teacher, which is written first."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastkd.cache import CacheError, Collator
from fastkd.cache.writer import begun
from fastkd.training.caching import DTYPES, write
from fastkd.training.data import Corpus, Windows, collate
from fastkd.training.options import InputError
from fastkd.training.setup import Setup

__all__ = ["Lessons", "labels_alone", "lessons_of"]


@dataclass(frozen=True)
class Lessons:
    """Examples, and how batches are made of them; a live teacher, or none."""

    train: Dataset[Any]
    collator: Any
    teacher: Any = None


def labels_alone(corpus: Corpus) -> Lessons:
    """Lessons without any teacher."""
    return Lessons(Windows(corpus.train), collate)


def lessons_of(setup: Setup) -> Lessons:
    """Lessons of `setup`'s teacher. Where they come from a cache, the teacher is freed.

    Raises InputError for a cache that is of other settings, of another tokenizer, or damaged.
    """
    options, corpus = setup.options.distillation, setup.materials.corpus
    if not options.needs_teacher:
        return labels_alone(corpus)
    if not options.cache_dir:
        return Lessons(Windows(corpus.train), collate, setup.teacher)
    vocab_size, tokenizer = setup.judge.vocab_size, setup.materials.tokenizer
    cache = write(
        setup.teacher,
        corpus.train,
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
    return Lessons(Windows(corpus.train), Collator(cache))


def _seed_of_samples(directory: str, seed: int) -> int | None:
    """The run's own; None, which is the cache's, where another run has begun it."""
    try:
        return seed if begun(Path(directory)) is None else None
    except CacheError as error:
        raise InputError(str(error)) from error
