"""Where options point to on disk: the same place from any directory, and one that can be written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastkd.training.options import InputError

__all__ = ["anchored", "check_writable", "paths_in"]

#: Options that are paths; and those that are one where something has that name, and a name of the Hub elsewhere.
_PATHS = ("output", "cache_dir")
_MAY_BE_PATHS = ("teacher", "student", "peer", "assistant", "more_teachers", "data", "mix_data", "out_of_domain")


def anchored(group: Any) -> Any:
    """A group of options with absolute paths, as a run keeps them: it may be resumed or judged from elsewhere."""
    changes = {}
    for one in fields(group):
        value = getattr(group, one.name)
        if value and one.name in _PATHS:
            changes[one.name] = os.path.abspath(value)
        elif value and one.name in _MAY_BE_PATHS:
            changes[one.name] = [_found(name) for name in value] if isinstance(value, list) else _found(value)
    changes = {name: value for name, value in changes.items() if value != getattr(group, name)}
    return replace(group, **changes) if changes else group


def paths_in(groups: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """What groups of options read from disk: (name of the option, path), where something is there."""
    for group in groups:
        for one in fields(group):
            if one.name in _MAY_BE_PATHS:
                value = getattr(group, one.name)
                several = isinstance(value, list)
                for number, path in enumerate(value if several else [value], 1):
                    if path and os.path.exists(path):
                        yield f"{one.name} {number}" if several else one.name, path


def _found(name: str) -> str:
    return os.path.abspath(name) if os.path.exists(name) else name


def check_writable(path: str, name: str) -> None:
    """Raise InputError where no file could be written at this path, or into this directory. Leaves nothing behind."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_file() and place == Path(path).absolute():
        place = place.parent  # it is replaced
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, f"{place} is a file")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"{name} is {path!r}, but nothing can be written there: {error.strerror}") from error
