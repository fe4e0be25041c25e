"""What all options share: how a field is declared, the checks of one value, and their error."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import field
from typing import Any, Literal

from fastkd.arguments import COLDEST, HOTTEST

__all__ = [
    "InputError",
    "Schedule",
    "at_home",
    "at_least",
    "check_finite",
    "check_temperatures",
    "did_you_mean",
    "expand_home",
    "option",
    "switch",
]

Schedule = Literal["constant", "linear", "cosine"]


class InputError(ValueError):
    """What was asked cannot be done: the message says why and what to do. Nothing was trained or written."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a misspelt word: the nearest known one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def option(default: Any, help: str, *aliases: str) -> Any:
    """A field that is one flag, under its own name and, for configurations written elsewhere, under others."""
    spellings = [spelling for alias in aliases for spelling in dict.fromkeys((alias, alias.replace("_", "-")))]
    metadata: dict[str, Any] = {"help": help.replace("%", "%%")}
    if spellings:
        metadata["aliases"] = ["--" + spelling for spelling in spellings]
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(help: str) -> Any:
    """A field that is True, False, or None where nobody said: `--name` alone is True."""
    return field(default=None, metadata={"help": help.replace("%", "%%"), "nargs": "?", "const": True})


def check_finite(options: object) -> None:
    """No number of these options is infinite or NaN, which passes every comparison or none."""
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}; it must be a finite number")


def check_temperatures(options: object, *names: str) -> None:
    """Temperatures, one or a list under each name, are those that losses take; None is not asked for."""
    for name in names:
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not COLDEST <= value <= HOTTEST:
                raise InputError(f"{name} is {value}; it must be in [{COLDEST:g}, {HOTTEST:g}]")


def at_least(options: object, **least: float) -> None:
    for name, value in least.items():
        if getattr(options, name) < value:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least {value}")


def expand_home(options: object, *names: str) -> None:
    """Put the user's home directory where the paths of these names begin with `~`."""
    for name in names:
        object.__setattr__(options, name, at_home(getattr(options, name), name))


def at_home(path: str, name: str) -> str:
    """A path, of which a `~` at the beginning is a home directory. Raises InputError where there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InputError(f"{name} is {path!r}, but there is no such home directory: write the path out, or ./{path}")
    return expanded
