"""The command `fastkd`. Try `fastkd --help` and `fastkd distill --help`: they load no transformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

import fastkd
from fastkd.training.options import DistillOptions, InputError

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
_METAVARS = {str: "NAME", int: "N", float: "X"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 when asked for what cannot be done."""
    asked = vars(_parser().parse_args(arguments))
    del asked["command"]
    try:
        options = DistillOptions(**asked)
        from fastkd.training.distill import distill

        distill(options)
    except InputError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tqdm"):
            raise
        return _refuse(f"{error.name} is not installed: pip install 'fastkd[demo]'")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastkd", description="Knowledge distillation of language models.")
    parser.add_argument("--version", action="version", version=f"fastkd {fastkd.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    distill = commands.add_parser(
        "distill",
        help="train a small model on a teacher's live logits",
        description=_DISTILL,
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    for option in fields(DistillOptions):
        flag, kind, text = "--" + option.name.replace("_", "-"), type(option.default), option.metadata["help"]
        if kind is bool:
            distill.add_argument(flag, action="store_true", help=text)
        else:
            distill.add_argument(flag, type=kind, default=option.default, metavar=_METAVARS[kind], help=text)
    return parser


def _refuse(reason: str) -> int:
    print(f"fastkd: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
