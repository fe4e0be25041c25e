"""Run a teacher over text and keep what it says in a cache.

    fastkd cache write                                                  # packaged teacher and reviews
    fastkd cache write --teacher gpt2 --data reviews.txt --output gpt2  # your own
    fastkd cache info gpt2

The windows of tokens are those that `fastkd distill` trains on with the same options of the data, and the same seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastkd.cache
from fastkd.cache import Cache, CacheError, Progress
from fastkd.training import checks, loading
from fastkd.training.command_options import CacheOptions
from fastkd.training.data import all_windows, load_corpus
from fastkd.training.options import DataOptions, InputError, ModelOptions

__all__ = ["open_cache", "verify", "write", "write_cache"]

#: In a file: what an interrupted write loses, at most. Dense rows are large, and have a limit of their own.
_SHARD_TOKENS = 1 << 14


def write_cache(options: CacheOptions, models: ModelOptions, data: DataOptions) -> Cache:
    """`fastkd cache write`: write the cache, or go on with one that was stopped.

    Raises InputError, before the teacher runs, where the options cannot be met. Interrupted, it leaves a cache that
    the same call completes.
    """
    device = loading.device_of(models)
    config, tokenizer = loading.teacher_config(models.teacher), loading.load_tokenizer(models.teacher)
    checks.check_tokenizers(tokenizer, tokenizer)
    checks.common_vocabulary(config, config, tokenizer)
    checks.check_context(data.max_length, teacher=config)
    if options.documents == "all":
        windows = all_windows(data, tokenizer)
    else:
        windows = load_corpus(data, tokenizer, 1, options.seed).train
    print(f"data: {len(windows):,} windows of {data.max_length} tokens ({options.documents} documents)")
    teacher = loading.load_teacher(models, device)
    return write(
        teacher,
        windows,
        options.output,
        batch_size=options.batch_size,
        format=options.cache_format,
        temperature=options.temperature,
        k=options.cache_tokens,
        packed=not options.plain,
        seed=options.seed,
        shard_tokens=options.shard_tokens,
        tokenizer=tokenizer,
        teacher_name=models.teacher,
    )


def write(teacher: Any, windows: Tensor, directory: str, *, batch_size: int, **settings: Any) -> Cache:
    """`fastkd.cache.write` of windows [n, tokens], with a progress bar. Raises InputError for a CacheError."""
    if settings["format"] == "dense":
        settings["temperature"] = 1.0  # it serves any
    elif settings.get("shard_tokens") is None:
        settings["shard_tokens"] = _SHARD_TOKENS
    with tqdm(total=windows.numel(), desc="cache", unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        try:
            return fastkd.cache.write(
                teacher, _batches(windows, batch_size), directory, progress=_Shown(bar), **settings
            )
        except (CacheError, ValueError, TypeError) as error:
            raise InputError(str(error)) from error


def open_cache(directory: str) -> Cache:
    """`fastkd.cache.open`. Raises InputError for a CacheError."""
    try:
        return fastkd.cache.open(directory)
    except CacheError as error:
        raise InputError(str(error)) from error


def verify(cache: Cache) -> None:
    """`Cache.verify`. Raises InputError for a CacheError."""
    try:
        cache.verify()
    except CacheError as error:
        raise InputError(str(error)) from error


def _batches(windows: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for ids in windows.split(size):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Shown:
    """Progress on a bar, whose rate and time left are those of the tokens that had to be computed."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._started = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        self._bar.initial = progress.tokens - progress.computed  # tqdm leaves these out of its rate
        self._bar.n = progress.tokens
        speed = progress.computed / (time.perf_counter() - self._started)
        self._bar.set_postfix({"tokens/s": f"{speed:.0f}", "bytes/token": progress.bytes_per_token})
