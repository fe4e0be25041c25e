"""The commands on top of the trainer: what each may be asked, then the module that does it."""

from __future__ import annotations

import argparse
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd.training.command_options import CacheOptions, InspectOptions, SweepOptions
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import (
    GROUPS,
    DataOptions,
    EvaluationOptions,
    InputError,
    ModelOptions,
    Options,
    TrainingOptions,
    at_home,
)

__all__ = ["cache", "distill", "evaluate", "export", "inspect_teacher", "sweep"]

if TYPE_CHECKING:
    from fastkd.cache import Cache

_DISTILL = """\
Train a small causal language model on a frozen teacher's predictions and the labels.

With no options, the packaged SmolLM2-135M teaches a GPT-2 of 16 M parameters on the packaged IMDB reviews. The run's
directory gets the student in Hugging Face format, metrics.json, results.csv, samples.md, report.html and config.yaml.

examples:
  fastkd distill
  fastkd distill --teacher gpt2-medium --data reviews.jsonl --size full --epochs 5 --output runs/reviews
  fastkd distill config.yaml --temperature 3 --cache-dir cache
  fastkd distill runs/reviews/config.yaml --resume
"""
_EVAL = """\
Judge a student beside its teacher, on held-out and on other text, and write a report into its folder 'eval'.

Options begin as the run's config.yaml has them, so that the text is split as it was; those of the training have no
effect but for the seed.

examples:
  fastkd eval runs/demo
  fastkd eval runs/demo --out-of-domain news.txt --eval-windows 500
  fastkd eval ./my-student --teacher gpt2-large --data reviews.jsonl --baseline ./my-other-student
"""
_SWEEP = """\
Train a student for every weight and temperature, and rank them by cross-entropy and KL to the teacher at T = 1.

Takes the options of fastkd distill beside the grid. Writes results.csv and sweep.png. With --resume, an interrupted
sweep keeps the students that are finished.

examples:
  fastkd sweep --alpha 0 0.5 1 --temperature 1 2 4
  fastkd sweep config.yaml --alpha 0.2 0.5 0.8 --alpha-on soft --cache-dir caches
  fastkd sweep runs/distill/config.yaml --resume
"""
_INSPECT = """\
Show what a teacher expects next: its likeliest tokens, its entropy, and what temperatures make of it.

examples:
  fastkd inspect-teacher
  fastkd inspect-teacher --teacher gpt2 --prompts "The film was great" --temperatures 1 2 4 --plot teacher.png
"""
_CACHE = """\
Run a frozen teacher once over text and keep little of what it says of each token: a cache to train from.

write goes on where a stopped write ended. info says what is in a cache. verify compares its checksums.

examples:
  fastkd cache write
  fastkd cache write runs/reviews/config.yaml --temperature 2 --output cache
  fastkd cache write --teacher gpt2-medium --data reviews.jsonl --size all --documents all --output cache
  fastkd cache info cache
  fastkd cache verify cache
"""
_EXPORT = """\
Write a student in the format of where it will run.

hf: as save_pretrained writes it. int4: likewise, linear layers in 4 bits (torchao; not for GPT-2s).
gguf: one file in fp32 that llama.cpp runs and transformers loads, of a GPT-2 or a Llama.

examples:
  fastkd export runs/demo --to gguf --output demo-gguf
"""


def distill(arguments: Sequence[str]) -> None:
    """`fastkd distill`."""
    *groups, extra = Parser("distill", _DISTILL, GROUPS).parse(arguments)
    if extra.print_config:
        print(dump(groups), end="")
        return
    from fastkd.training.distill import distill as run

    run(Options(*groups), extra.config)


def evaluate(arguments: Sequence[str]) -> None:
    """`fastkd eval`."""
    parser = Parser("eval", _EVAL, GROUPS, config=False)
    parser.add("model", metavar="STUDENT", help="directory of a finished run, or of any model with its tokenizer")
    parser.add("--baseline", metavar="DIRECTORY", help="a model to compare with; a run's ce-only, if it has one")
    config = Path(parser.named(arguments).model).expanduser() / "config.yaml"
    *groups, extra = parser.parse(arguments, str(config) if config.is_file() else None)
    from fastkd.training.evaluate import evaluate as run

    baseline = extra.baseline and at_home(extra.baseline, "--baseline")
    run(at_home(extra.model, "STUDENT"), Options(*groups), baseline)


def sweep(arguments: Sequence[str]) -> None:
    """`fastkd sweep`."""
    groups = (SweepOptions, ModelOptions, DataOptions, TrainingOptions, EvaluationOptions)
    grid, models, data, training, evaluation, extra = Parser("sweep", _SWEEP, groups).parse(arguments)
    if extra.print_config:
        print(dump((grid, models, data, training, evaluation)), end="")
        return
    cells = grid.cells()
    if not cells:
        raise InputError("the grid is empty: give --alpha and --temperature")
    from fastkd.training.sweep import sweep as run

    run(Options(models, data, cells[0], training, evaluation), grid, extra.config)


def inspect_teacher(arguments: Sequence[str]) -> None:
    """`fastkd inspect-teacher`."""
    parser = Parser("inspect-teacher", _INSPECT, (InspectOptions, ModelOptions))
    inspection, models, extra = parser.parse(arguments)
    if extra.print_config:
        print(dump((inspection, models)), end="")
        return
    from fastkd.training.inspect_teacher import inspect_teacher as run

    run(models, inspection)


def export(arguments: Sequence[str]) -> None:
    """`fastkd export`."""
    parser = Parser("export", _EXPORT, (), config=False)
    parser.add("student", metavar="STUDENT", help="directory of a finished run, or of any model with its tokenizer")
    parser.add("--to", choices=("hf", "int4", "gguf"), required=True, help="the format")
    parser.add("--output", metavar="DIRECTORY", required=True, help="a new directory")
    (asked,) = parser.parse(arguments)
    from fastkd.training.export import export as run

    run(at_home(asked.student, "STUDENT"), asked.to, at_home(asked.output, "--output"))


def cache(arguments: Sequence[str]) -> None:
    """`fastkd cache write|info|verify`."""
    actions = {"write": _cache_write, "info": _cache_info, "verify": _cache_verify}
    parser = argparse.ArgumentParser(
        prog="fastkd cache", description=_CACHE, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=actions, metavar="ACTION", help="write, info or verify")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see fastkd cache write --help")
    asked = parser.parse_args(arguments)
    actions[asked.action](asked.arguments)


def _cache_write(arguments: Sequence[str]) -> None:
    kept, models, data, extra = Parser("cache write", _CACHE, (CacheOptions, ModelOptions, DataOptions)).parse(
        arguments
    )
    if extra.print_config:
        print(dump((kept, models, data)), end="")
        return
    from fastkd.training.caching import write_cache

    try:
        cache = write_cache(kept, models, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: the same command goes on with {kept.output}") from None
    _show(cache)


def _cache_info(arguments: Sequence[str]) -> None:
    from fastkd.training.caching import open_cache

    _show(open_cache(_directory("info", "Say what is in a cache.", arguments)))


def _cache_verify(arguments: Sequence[str]) -> None:
    from fastkd.training.caching import open_cache, verify

    cache = open_cache(_directory("verify", "Read every byte of a cache and compare checksums.", arguments))
    verify(cache)
    print(f"{cache!r} is as it was written")


def _directory(action: str, description: str, arguments: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(prog=f"fastkd cache {action}", description=description)
    parser.add_argument("directory", help="of the cache")
    return at_home(parser.parse_args(arguments).directory, "directory")


def _show(cache: Cache) -> None:
    print(repr(cache))
    print(f"  {'size':<14}{cache.bytes / 2**20:,.1f} MiB, {cache.bytes / max(cache.tokens, 1):.1f} bytes per token")
    for name, value in {**vars(cache.settings), "columns": ", ".join(cache.columns) or None}.items():
        if value is not None:
            print(f"  {name:<14}{value}")
