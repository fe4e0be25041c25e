"""Results on disk: `<question>-<allocator>.json`, each a document of pytest-benchmark cut to one question.

So a run of some questions replaces theirs and leaves the others', which keep the machine and commit they were
measured on. `failed` names the tests of the question that failed; they have no entry among its benchmarks.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from bench.names import ALLOCATORS
from bench.questions import QUESTIONS

__all__ = ["drop", "load", "split"]


def split(document: Mapping[str, Any], failed: Mapping[str, list[str]], folder: pathlib.Path, allocator: str) -> None:
    """Store one pass: a file for every question that has benchmarks or failures (test names per question) in it."""
    for question in QUESTIONS:
        benchmarks = [entry for entry in document["benchmarks"] if entry["extra_info"]["question"] == question]
        if benchmarks or question in failed:
            part = {**document, "benchmarks": benchmarks, "failed": failed.get(question, [])}
            _path(folder, question, allocator).write_text(json.dumps(part, indent=4))


def load(folder: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(question, allocator) → document; allocators in turn, questions in the order of the report."""
    paths = {(name, allocator): _path(folder, name, allocator) for allocator in ALLOCATORS for name in QUESTIONS}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}


def drop(folder: pathlib.Path, question: str, allocator: str) -> None:
    """Forget what an earlier run left: it must not stand in for a run in which everything fails."""
    _path(folder, question, allocator).unlink(missing_ok=True)


def _path(folder: pathlib.Path, question: str, allocator: str) -> pathlib.Path:
    return folder / f"{question}-{allocator}.json"
