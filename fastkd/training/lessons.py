"""What a student learns from: the teacher itself, or a cache of its predictions, which is written first."""

from __future__ import annotations

from fastkd.training.data import Windows, collate
from fastkd.training.fit import Lessons
from fastkd.training.options import InputError
from fastkd.training.setup import Setup

__all__ = ["lessons"]


def lessons(setup: Setup) -> Lessons:
    """Lessons of `setup`'s teacher. With a cache the teacher is freed: what is left of it is its head in the judge."""
    options, train = setup.options.distillation, setup.materials.corpus.train
    if not options.needs_teacher:
        return Lessons(Windows(train), collate)
    if not options.cache_dir:
        return Lessons(Windows(train), collate, setup.teacher)
    raise InputError(f"cache_dir {options.cache_dir!r}: caches are not there yet")
