"""The command `fastkd`. Try `fastkd --help` and `fastkd distill --help`: they load no transformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import fastkd
from fastkd.training.options import CacheOptions, DistillOptions, InputError

if TYPE_CHECKING:
    from fastkd.cache import Cache

_DISTILL = """\
Train a small causal language model from scratch on a frozen teacher's live logits.

With no flags, the packaged SmolLM2-135M teaches a GPT-2 of 16 M parameters on the packaged IMDB reviews.
The student, its tokenizer and metrics.json are saved under --output once the run has succeeded.
"""
_EXAMPLES = """\
examples:
  fastkd distill
  fastkd distill --teacher gpt2-medium --data reviews.jsonl --steps 2000 --output runs/reviews
  fastkd distill --teacher ./teacher --student-config ./student.json --data text.txt --temperature 1
"""
_CACHE = """\
Run a frozen teacher once over text and keep little of what it says of each token: a cache to train from.
"""
_CACHE_EXAMPLES = """\
examples:
  fastkd cache write
  fastkd cache write --teacher gpt2-medium --data reviews.jsonl --documents all --temperature 2 --output cache
  fastkd cache info cache
  fastkd cache verify cache
"""
_METAVARS = {str: "NAME", int: "N", float: "X"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 when asked for what cannot be done, 130 when interrupted."""
    asked = vars(_parser().parse_args(arguments))
    run: Callable[..., int] = asked.pop("run")
    try:
        return run(**asked)
    except InputError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tqdm", "datasets", "numpy", "safetensors"):
            raise
        return _refuse(f"{error.name} is not installed: pip install 'fastkd[demo]'")


def _distill(**asked: Any) -> int:
    options = DistillOptions(**asked)
    from fastkd.training.distill import distill

    distill(options)
    return 0


def _cache_write(**asked: Any) -> int:
    options = CacheOptions(**asked)
    from fastkd.cache import CacheError
    from fastkd.training.caching import write_cache

    try:
        cache = write_cache(options)
    except CacheError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on with {options.output}", file=sys.stderr)
        return 130
    _show(cache)
    return 0


def _cache_info(directory: str) -> int:
    return _with_cache(directory, _show)


def _cache_verify(directory: str) -> int:
    def verify(cache: Cache) -> None:
        cache.verify()
        print(f"{cache!r} is as it was written")

    return _with_cache(directory, verify)


def _with_cache(directory: str, use: Callable[[Cache], None]) -> int:
    from fastkd import cache

    try:
        use(cache.open(directory))
    except cache.CacheError as error:
        return _refuse(str(error))
    return 0


def _show(cache: Cache) -> None:
    print(repr(cache))
    print(f"  {'size':<14}{cache.bytes / 2**20:,.1f} MiB, {cache.bytes / max(cache.tokens, 1):.1f} bytes per token")
    for name, value in vars(cache.settings).items():
        if value is not None:
            print(f"  {name:<14}{value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastkd", description="Knowledge distillation of language models.")
    parser.add_argument("--version", action="version", version=f"fastkd {fastkd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    distill = commands.add_parser(
        "distill",
        help="train a small model on a teacher's live logits",
        description=_DISTILL,
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    _add_options(distill, DistillOptions)
    distill.set_defaults(run=_distill)

    cache = commands.add_parser("cache", help="run a teacher once and keep what it says", description=_CACHE)
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    write = actions.add_parser(
        "write",
        help="run a teacher over text; goes on where a stopped write ended",
        description=_CACHE,
        epilog=_CACHE_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    _add_options(write, CacheOptions)
    write.set_defaults(run=_cache_write)
    for name, run, text in (
        ("info", _cache_info, "say what is in a cache"),
        ("verify", _cache_verify, "read every byte of a cache and compare checksums"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("directory", help="of the cache")
        action.set_defaults(run=run)
    return parser


def _add_options(parser: argparse.ArgumentParser, options: type[DistillOptions] | type[CacheOptions]) -> None:
    for option in fields(options):
        flag, kind, text = "--" + option.name.replace("_", "-"), type(option.default), option.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=kind, default=option.default, metavar=_METAVARS[kind], help=text)


def _refuse(reason: str) -> int:
    print(f"fastkd: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
