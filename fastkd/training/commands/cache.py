"""`fastkd cache write|info|verify`: run a teacher over text once, and keep what it says in a cache.

The windows of tokens are those that `fastkd distill` trains on with the same options of the data, and the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

import fastkd
from fastkd import training
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import (
    DataOptions,
    InputError,
    ModelOptions,
    at_home,
    at_least,
    check_finite,
    check_kept,
    check_temperatures,
    expand_home,
    option,
)

if TYPE_CHECKING:
    from fastkd.cache import Cache

__all__ = ["CacheOptions", "run", "write_cache"]

_DESCRIPTION = """\
Run a frozen teacher once over text and keep a few bytes of its prediction for each token: a cache to train from.

write resumes a write that was stopped. info says what is in a cache. verify compares its checksums.

examples:
  fastkd cache write
  fastkd cache write runs/reviews/config.yaml --temperature 2 --output cache
  fastkd cache write --teacher gpt2-medium --data reviews.jsonl --size all --documents all --output cache
  fastkd cache info cache
  fastkd cache verify cache
"""


@dataclass(frozen=True)
class CacheOptions:
    """What `fastkd cache write` keeps, and where."""

    _argument_group_name: ClassVar[str] = "cache"

    output: str = option("runs/cache", "directory of the cache; a write that was stopped is resumed there")
    documents: Literal["train", "all"] = option(
        "train", "train: those that fastkd distill trains on with the same data and seed; all: all"
    )
    temperature: float = option(1.0, "temperature of the training the cache is for")
    cache_format: Literal["sampled", "topk", "dense"] = option("sampled", "what is kept of each prediction", "format")
    cache_tokens: int | None = option(None, "tokens that are kept of each prediction [sampled: 12, topk: 64]", "k")
    plain: bool = option(False, "store exact numbers: 8 bytes per kept token rather than 3 or 4")
    batch_size: int = option(8, "windows per forward pass of the teacher")
    shard_tokens: int | None = option(
        None, "tokens per file: a stopped write computes the last, unfinished one again [16,384, or fewer if dense]"
    )
    seed: int = option(0, "seed of the split and of the samples")

    def __post_init__(self) -> None:
        expand_home(self, "output")
        check_finite(self)
        at_least(self, batch_size=1)
        check_kept(self.cache_format, self.cache_tokens)
        if self.plain and self.cache_format == "dense":
            raise InputError("plain is set, but a dense cache stores 16 bits of every token: leave one of them away")
        if self.shard_tokens is not None:
            at_least(self, shard_tokens=1)
        check_temperatures(self, "temperature")


def run(arguments: Sequence[str]) -> None:
    """`fastkd cache`: one of its actions."""
    actions = {"write": _write, "info": _info, "verify": _verify}
    parser = argparse.ArgumentParser(
        prog="fastkd cache", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=actions, metavar="ACTION", help="write, info or verify")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see fastkd cache write --help")
    asked = parser.parse_args(arguments)
    actions[asked.action](asked.arguments)


def _write(arguments: Sequence[str]) -> None:
    parser = Parser("cache write", _DESCRIPTION, (CacheOptions, ModelOptions, DataOptions))
    kept, models, data, extra = parser.parse(arguments)
    if extra.print_config:
        print(dump((kept, models, data)), end="")
        return
    try:
        cache = write_cache(kept, models, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: the same command resumes {kept.output}") from None
    _show(cache)


def write_cache(options: CacheOptions, models: ModelOptions, data: DataOptions) -> Cache:
    """Write the cache, or resume the writing of one that was stopped.

    Raises InputError, before the teacher runs, where the options cannot be met. Interrupted, it leaves a cache that
    the same call completes.
    """
    training.launcher.check_launch("cache write", several=True)
    with training.launcher.quiet():
        processes = training.joining.joined(models)
        windows, tokenizer, teacher = processes.agree(lambda: _read(options, models, data))
        return training.caching.write(
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
            group=processes.group,
        )


def _read(options: CacheOptions, models: ModelOptions, data: DataOptions) -> tuple[Tensor, Any, Any]:
    """(windows, tokenizer, teacher), checked."""
    checks, loading = training.checks, training.loading
    training.places.check_writable(options.output, "output")
    device = loading.device_of(models)
    config, tokenizer = loading.teacher_config(models.teacher), loading.load_tokenizer(models.teacher)
    checks.check_tokenizers(tokenizer, tokenizer)
    checks.common_vocabulary({"teacher": config}, tokenizer)
    checks.check_context(data.max_length, {"teacher": config})
    if options.documents == "all":
        windows = training.data.all_windows(data, tokenizer)
    else:
        windows = training.data.load_corpus(data, tokenizer, 1, options.seed).train
    print(f"data: {len(windows):,} windows of {data.max_length} tokens ({options.documents} documents)")
    return windows, tokenizer, loading.load_teacher(models, device)


def _info(arguments: Sequence[str]) -> None:
    _show(_opened("info", "Say what is in a cache.", arguments))


def _verify(arguments: Sequence[str]) -> None:
    cache = _opened("verify", "Read every byte of a cache and compare checksums.", arguments)
    training.caching.input_error(cache.verify)
    print(f"{cache!r} is as it was written")


def _opened(action: str, description: str, arguments: Sequence[str]) -> Cache:
    parser = argparse.ArgumentParser(prog=f"fastkd cache {action}", description=description)
    parser.add_argument("directory", help="of the cache")
    directory = at_home(parser.parse_args(arguments).directory, "directory")
    return training.caching.input_error(fastkd.cache.open, directory)


def _show(cache: Cache) -> None:
    print(repr(cache))
    print(f"  {'size':<14}{cache.bytes / 2**20:,.1f} MiB, {cache.bytes / max(cache.tokens, 1):.1f} bytes per token")
    for name, value in {**vars(cache.settings), "columns": ", ".join(cache.columns) or None}.items():
        if value is not None:
            print(f"  {name:<14}{value}")
