"""What a visit finds, written when it is found: one JSON object a line, in a file of each process.

Every finding has a `kind`: `facts`, `check`, `race`, `left` (what the time did not suffice for), `table`, `profile`,
`error`, `ended` (a process). The module that writes a kind says what is in it.
"""

from __future__ import annotations

import json
import pathlib
import traceback
from typing import Any

__all__ = ["Findings", "brief", "read"]

Finding = dict[str, Any]
_CAUSES, _LENGTH = 3, 600  # of an error that are told, and characters of each


class Findings:
    """A file that takes findings. Each is on disk before `say` returns: a process that dies has lost none."""

    def __init__(self, path: pathlib.Path, **everywhere: Any) -> None:
        """`everywhere` is part of every finding."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._everywhere = path.open("a"), everywhere

    def say(self, kind: str, **facts: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **self._everywhere, **facts}, ensure_ascii=False) + "\n")
        self._file.flush()

    def error(self, what: str, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        self.say("error", what=what, error=brief(error), trace=trace[-4000:])


def brief(error: BaseException) -> str:
    """An error and its causes in a line."""
    told: list[str] = []
    seen = error
    while len(told) < _CAUSES:
        told.append(f"{type(seen).__name__}: {' '.join(str(seen).split())[-_LENGTH:]}")
        if (cause := seen.__cause__ or seen.__context__) is None:
            break
        seen = cause
    return " <- ".join(told)


def read(folder: pathlib.Path) -> list[Finding]:
    """All findings of a folder. A line that a process died in the middle of is left out."""
    found = []
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in path.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found
