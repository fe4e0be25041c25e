"""What a student learns from when the teacher is in a cache."""

from __future__ import annotations

from typing import Any

from fastkd.training.data import Corpus
from fastkd.training.fit import Lessons
from fastkd.training.options import InputError, Options


def cached(teacher: Any, tokenizer: Any, corpus: Corpus, options: Options) -> Lessons:
    raise InputError(f"cache_dir {options.distillation.cache_dir!r}: caches are not there yet")


def close_enough(sizes: dict[str, int]) -> None:
    """Say so where the teacher is hardly larger than the student."""
    if sizes["teacher"] < 2 * sizes["student"]:
        print(
            f"note: the teacher has {sizes['teacher'] / sizes['student']:.1f} times the student's parameters; "
            "teachers at least 2 to 3 times as large are usual"
        )
