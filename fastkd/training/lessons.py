"""What a student is taught from: the labels, a live teacher, or a cache of it, which is written first."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastkd.cache import CacheError, Collator
from fastkd.cache.writer import begun
from fastkd.teachers import Cached, TeacherMode
from fastkd.terms import Term
from fastkd.training.caching import DTYPES, write
from fastkd.training.data import Corpus, Windows, collate
from fastkd.training.joining import joined
from fastkd.training.options import InputError
from fastkd.training.setup import Setup
from fastkd.training.teaching import teacher_of, terms_of

__all__ = ["Lessons", "free", "labels_alone", "lessons_of"]


@dataclass(frozen=True)
class Lessons:
    """Examples, and how batches are made of them; who teaches, and the terms beside the first."""

    train: Dataset[Any]
    collator: Any
    teacher: TeacherMode | None = None
    terms: Sequence[Term] = ()
    listens: bool = False  # whether the teacher's predictions or features are read


def labels_alone(corpus: Corpus) -> Lessons:
    """Lessons without any teacher."""
    return Lessons(Windows(corpus.train), collate)


def lessons_of(setup: Setup, student: Any) -> Lessons:
    """Lessons of `setup`'s teacher for a student. A teacher that is not needed any more is freed.

    Raises InputError for terms and teachers that the models cannot have, and for a cache that is of other settings, of
    another tokenizer, or damaged.
    """
    options, teaching, corpus = setup.options.distillation, setup.options.teaching, setup.materials.corpus
    if not setup.options.learns:
        free(setup)
        return labels_alone(corpus)
    if not options.cache_dir:
        mode = teacher_of(setup, student)
        terms = terms_of(setup, student, mode)
        if not (options.needs_teacher or any(term.needs_teacher for term in terms)):
            del mode  # which has the teacher
            free(setup)
            return Lessons(Windows(corpus.train), collate, terms=terms)
        if teaching.of_itself:
            free(setup)
        columns = {}
        if "corpus" in mode.columns:
            assert corpus.origins is not None  # as many corpora as teachers are asked for
            columns["corpus"] = corpus.origins
        return Lessons(Windows(corpus.train, **columns), collate, mode, terms, listens=True)
    terms = terms_of(setup, student, Cached())
    if not options.needs_teacher:
        free(setup)
        return Lessons(Windows(corpus.train), collate, terms=terms)
    vocab_size, tokenizer, processes = setup.vocab_size, setup.materials.tokenizer, joined()
    cache = write(
        setup.teacher,
        corpus.train,
        options.cache_dir,
        batch_size=setup.options.evaluation.eval_batch_size,
        format=options.cache_format,
        temperature=options.temperature,
        k=options.cache_tokens,
        dtype=DTYPES[options.cache_precision],
        seed=processes.of_first(lambda: _seed_of_samples(options.cache_dir, setup.options.training.seed)),
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        teacher_name=setup.options.models.teacher,
        group=processes.group,
    )
    try:
        cache.check(tokenizer=tokenizer, vocab_size=vocab_size, temperature=options.temperature)
    except CacheError as error:
        raise InputError(str(error)) from error
    print(f"cache: {cache.sequences:,} windows in {cache.directory}, {cache.bytes / 2**20:,.1f} MiB")
    free(setup)
    return Lessons(Windows(corpus.train), Collator(cache), terms=terms, listens=True)


def free(setup: Setup) -> None:
    """Let go of the teacher, and of what only circles of references still hold, such as a trainer that is done."""
    setup.teacher = None
    gc.collect()


def _seed_of_samples(directory: str, seed: int) -> int | None:
    """The run's own; None, which is the cache's, where another run has begun it."""
    try:
        return seed if begun(Path(directory)) is None else None
    except CacheError as error:
        raise InputError(str(error)) from error
