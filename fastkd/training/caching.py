"""The cache that a run trains from: what it must agree with, and how it is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastkd.cache
from fastkd.cache import Cache, CacheError
from fastkd.cache import Progress as Written
from fastkd.cache.asked import check_same, packing
from fastkd.cache.disk import disk
from fastkd.cache.fingerprints import fingerprint, tokenizer_fingerprint
from fastkd.cache.reader import check_weights
from fastkd.cache.writer import begun
from fastkd.training.options import InputError, Options
from fastkd.training.progress import Progress

__all__ = ["DTYPES", "check_cache", "check_teacher", "input_error", "write"]

#: cache_precision → what a dense cache stores; None asks for nothing.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, None: None}

Result = TypeVar("Result")

#: In a file: what an interrupted write loses, at most. Dense rows are large, and have a limit of their own.
_SHARD_TOKENS = 1 << 14


def write(teacher: Any, windows: Tensor, directory: str, *, batch_size: int, **options: Any) -> Cache:
    """`fastkd.cache.write` of windows [n, tokens], with its progress shown. Raises InputError for a CacheError."""
    if options["format"] == "dense":
        options["temperature"] = 1.0  # it serves any
    elif options.get("shard_tokens") is None:
        options["shard_tokens"] = _SHARD_TOKENS
    started = time.perf_counter()
    with Progress("cache", windows.numel(), "token") as shown:

        def show(written: Written) -> None:
            shown.skip(written.tokens - written.computed)
            speed = written.computed / (time.perf_counter() - started)
            shown.update(written.tokens, {"tokens/s": f"{speed:.0f}", "bytes/token": str(written.bytes_per_token)})

        try:
            return fastkd.cache.write(teacher, _batches(windows, batch_size), directory, progress=show, **options)
        except (CacheError, ValueError, TypeError) as error:
            raise InputError(str(error)) from error


def check_cache(options: Options, tokenizer: Any) -> None:
    """What can be seen of a run's cache before any work. Raises InputError.

    A cache that was begun must be of what is asked for, another one must have a place. One that an earlier run leaves
    in the output directory is not looked at where that run is overwritten.
    """
    wanted = options.distillation
    if wanted.cache_dir and wanted.needs_teacher:
        input_error(_check_directory, options, tokenizer)


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
        found = input_error(begun, Path(wanted.cache_dir))
        if found is not None:
            input_error(check_weights, Path(wanted.cache_dir), found, fingerprint(teacher))


def input_error(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`. Raises InputError for its CacheError."""
    try:
        return function(*arguments)
    except CacheError as error:
        raise InputError(str(error)) from error


def _batches(windows: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for ids in windows.split(size):
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
