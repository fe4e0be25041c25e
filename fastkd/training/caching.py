"""Run a teacher over text and keep what it says in a cache.

    fastkd cache write                                                  # packaged teacher and reviews
    fastkd cache write --teacher gpt2 --data reviews.txt --output gpt2  # your own
    fastkd cache info gpt2

The windows of tokens are those that `fastkd distill` trains on with the same options of the data, and the same seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import fastkd.cache
from fastkd.cache import Cache, CacheError, Progress
from fastkd.cache.asked import check_same, packing
from fastkd.cache.disk import disk
from fastkd.cache.fingerprints import fingerprint, tokenizer_fingerprint
from fastkd.cache.reader import check_weights
from fastkd.cache.writer import begun
from fastkd.training import checks, loading
from fastkd.training.command_options import CacheOptions
from fastkd.training.data import all_windows, load_corpus
from fastkd.training.options import DataOptions, InputError, ModelOptions, Options
from fastkd.training.places import check_writable

__all__ = ["DTYPES", "check_cache", "check_teacher", "open_cache", "verify", "write", "write_cache"]

#: cache_precision → what a dense cache stores; None asks for nothing.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, None: None}

Result = TypeVar("Result")

#: In a file: what an interrupted write loses, at most. Dense rows are large, and have a limit of their own.
_SHARD_TOKENS = 1 << 14


def write_cache(options: CacheOptions, models: ModelOptions, data: DataOptions) -> Cache:
    """`fastkd cache write`: write the cache, or go on with one that was stopped.

    Raises InputError, before the teacher runs, where the options cannot be met. Interrupted, it leaves a cache that
    the same call completes.
    """
    check_writable(options.output, "output")
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
        packed=False if options.plain else None,
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


def check_cache(options: Options, tokenizer: Any) -> None:
    """What can be seen of a run's cache before any work. Raises InputError.

    A cache that was begun must be of what is asked for, another one must have a place. One that an earlier run leaves
    in the output directory is not looked at where that run is overwritten.
    """
    wanted = options.distillation
    if wanted.cache_dir and wanted.needs_teacher:
        _input_error(_check_directory, options, tokenizer)


def _check_directory(options: Options, tokenizer: Any) -> None:
    wanted = options.distillation
    with disk(f"the cache_dir {wanted.cache_dir} cannot be looked at"):
        directory, output = Path(wanted.cache_dir).resolve(), Path(options.training.output).resolve()
        if options.training.overwrite and directory.is_relative_to(output):
            return
        place = next(path for path in (directory, *directory.parents) if path.exists())
        if not place.is_dir():
            raise CacheError(f"cache_dir is {wanted.cache_dir}, but {place} is a file: name a directory")
        found = begun(directory) if place == directory else None
        if (found is None or not found.complete) and not os.access(place, os.W_OK):
            raise CacheError(f"cache_dir is {wanted.cache_dir}, but {place} may not be written to: name another")
    if found is not None:
        asked = {
            "format": wanted.cache_format,
            "packing": packing(str(wanted.cache_format), None, DTYPES[wanted.cache_precision]),
            "k": wanted.cache_tokens,
            "temperature": 1.0 if wanted.cache_format == "dense" else wanted.temperature,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        check_same(directory, found, asked)


def check_teacher(options: Options, teacher: Any) -> None:
    """The cache of a run, where there is one, is of this teacher's weights. Raises InputError."""
    wanted = options.distillation
    if wanted.cache_dir and wanted.needs_teacher:
        found = _input_error(begun, Path(wanted.cache_dir))
        if found is not None:
            _input_error(check_weights, Path(wanted.cache_dir), found, fingerprint(teacher))


def open_cache(directory: str) -> Cache:
    """`fastkd.cache.open`. Raises InputError for a CacheError."""
    return _input_error(fastkd.cache.open, directory)


def verify(cache: Cache) -> None:
    """`Cache.verify`. Raises InputError for a CacheError."""
    _input_error(cache.verify)


def _input_error(function: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return function(*arguments)
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
