"""The command `fastkd`. Try `fastkd --help` and `fastkd distill --help`: they load no models.

A command is a module of `fastkd.training.commands`, imported when it is asked for, and a row of `_COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import shlex
import sys
from collections.abc import Sequence

import fastkd
from fastkd.training import launcher
from fastkd.training.options import InputError
from fastkd.training.plain import visible

#: Those that several processes of torchrun or accelerate can work on together.
_SEVERAL = ("distill", "cache", "eval")
#: Name → what it does.
_COMMANDS = {
    "distill": "train a small model on a teacher's predictions, and report what it learnt",
    "cache": "run a teacher once and keep what it says",
    "eval": "judge a student beside its teacher",
    "sweep": "train students over a grid of weights and temperatures, and rank them",
    "progressive": "train one student after the other, each on the one before it",
    "export": "write a student as Hugging Face model, in 4 bits or as GGUF",
    "inspect-teacher": "show what a teacher expects next",
}
_EXTRAS = ("transformers", "accelerate", "yaml", "matplotlib", "tqdm", "datasets", "numpy", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 when asked for what cannot be done, 130 when interrupted.

    A report or figure that cannot be made, with all else saved, is a warning and 0.
    """
    for stream in (sys.stdout, sys.stderr):  # what is printed is never worth a run: ASCII has no arrow
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="fastkd",
        description="Knowledge distillation of language models.",
        epilog="commands:\n" + "\n".join(f"  {name:<16} {help}" for name, help in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastkd {fastkd.__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see fastkd COMMAND --help")
    asked = parser.parse_args(arguments)

    def told(error: BaseException, text: str, status: int) -> int:
        if launcher.tells(error):
            print(visible(f"fastkd: {text}"), file=sys.stderr)
        return status

    try:
        launcher.check_launch(asked.command, asked.command in _SEVERAL)
        with launcher.quiet():
            _run(asked.command, asked.arguments)
    except InputError as error:
        return told(error, f"error: {error}", 2)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        return told(error, f"error: {name} is not installed: pip install 'fastkd[train]'", 2)
    except KeyboardInterrupt as error:
        again = shlex.join(["fastkd", asked.command, *asked.arguments])
        return told(error, str(error) or f"interrupted: start again with {again}", 130)
    except Exception as error:
        if launcher.tells(error):
            raise
        return 1  # of several processes another has told
    return 0


def _run(command: str, arguments: Sequence[str]) -> None:
    importlib.import_module(f"fastkd.training.commands.{command.replace('-', '_')}").run(arguments)
    if "fastkd.training.joining" in sys.modules:
        importlib.import_module("fastkd.training.joining").leave()


if __name__ == "__main__":
    sys.exit(main())
