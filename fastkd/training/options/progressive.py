"""The stages of a progressive distillation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from fastkd.training.options.base import InputError, option

__all__ = ["ProgressiveOptions", "as_texts"]

#: Names that are directories anywhere, and cannot be taken for a file of a run.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = ("checkpoints", "results", "progressive")


@dataclass(frozen=True)
class ProgressiveOptions:
    """The stages of `fastkd progressive`, beside the options that all of them share."""

    _argument_group_name: ClassVar[str] = "stages"

    stages: list[str] = option(
        [],
        "in the file, a list of mappings: each has a name and what it has of its own, such as student and tokens",
    )
    tokens: int | None = option(None, "tokens that a stage trains on, instead of epochs or max_steps; a stage may say")

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}; it must be at least 1")
        names = [stage["name"] for stage in self.mappings()]
        twice = sorted({name for name in names if [one.lower() for one in names].count(name.lower()) > 1})
        if twice:
            raise InputError(f"two stages are named {' and '.join(twice)}: each has a directory by its name")

    def mappings(self) -> list[dict[str, Any]]:
        """One a stage, with its `name` and `tokens` checked."""
        return [_stage(text, number) for number, text in enumerate(self.stages, 1)]


def as_texts(given: Any) -> dict[str, Any]:
    """`stages` of a YAML file → the option, whose values are texts. Raises InputError for what is no list."""
    if not isinstance(given, list):
        raise InputError(f"stages is {given!r}; it must be a list of mappings, each with a name")
    return {"stages": [one if isinstance(one, str) else json.dumps(one, default=str) for one in given]}


def _stage(text: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if not isinstance(found, dict):
        raise InputError(f"stage {number} is {found!r}; it must be a mapping, such as {{name: small, student: s.json}}")
    name, tokens = found.get("name"), found.get("tokens")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _TAKEN:
        raise InputError(
            f"stage {number} has the name {name!r}; it must be letters, digits, - and _, and none of "
            f"{', '.join(_TAKEN)}: it is the name of the stage's directory"
        )
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise InputError(f"stage {name!r} has tokens {tokens!r}; it must be a whole number of at least 1")
    return found
