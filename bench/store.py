"""Results on disk: `<question>-<allocator>.json`, each a document of pytest-benchmark cut to one question.

So a run of some questions replaces theirs and leaves the others', which keep the machine and commit they were
measured on. `failed` names the tests of the question that failed; they have no entry among its benchmarks.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from bench.names import ALLOCATORS
from bench.questions import QUESTIONS

__all__ = ["load", "replace"]


def replace(
    document: Mapping[str, Any] | None,
    failed: Mapping[str, list[str]],
    folder: pathlib.Path,
    allocator: str,
    outdated: Iterable[str],
) -> None:
    """Store one pass, a file for every question with benchmarks or failures (tests per question) in it.

    What earlier runs left of these questions goes, under every `outdated` allocator: it must not stand in for a run in
    which everything fails, which has no document, nor beside a new one.
    """
    entries = document["benchmarks"] if document else []
    for question in QUESTIONS:
        benchmarks = [entry for entry in entries if entry["extra_info"]["question"] == question]
        if not benchmarks and question not in failed:
            continue
        for name in outdated:
            _path(folder, question, name).unlink(missing_ok=True)
        if document:
            part = {**document, "benchmarks": benchmarks, "failed": failed.get(question, [])}
            _path(folder, question, allocator).write_text(json.dumps(part, indent=4))


def load(folder: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(question, allocator) → document; allocators in turn, questions in the order of the report."""
    paths = {(name, allocator): _path(folder, name, allocator) for allocator in ALLOCATORS for name in QUESTIONS}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}


def _path(folder: pathlib.Path, question: str, allocator: str) -> pathlib.Path:
    return folder / f"{question}-{allocator}.json"
