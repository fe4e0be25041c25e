"""Results on disk: `results.json` of a machine's folder, which holds a line for every pass and for every case.

A run of some questions replaces their cases and leaves the others', which keep the machine and commit that they were
measured on: those are the pass's. A pass also names the tests that failed; they have no case.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.harness import machine
from bench.harness.question import Bar
from bench.harness.results import Result, in_order, results_of

__all__ = ["Pass", "Stored", "load", "one_a_line", "replace_asked"]

_DIGITS = 9  # of a stored number: tables round it once more, and rounding twice can differ from rounding once


@dataclass(frozen=True)
class Pass:
    """One run of pytest under one allocator, and the questions whose results are still of it."""

    allocator: str
    date: str  # UTC, to the minute
    commit: str
    machine: dict[str, Any]  # `machine.facts()`
    questions: tuple[str, ...]
    failed: dict[str, list[str]] = field(default_factory=dict)  # question → tests


@dataclass(frozen=True)
class Stored:
    """Everything of a machine; allocators in turn."""

    passes: tuple[Pass, ...] = ()
    results: tuple[Result, ...] = ()

    def without(self, questions: Iterable[str], allocators: Iterable[str]) -> Stored:
        outdated = {(question, allocator) for question in questions for allocator in allocators}
        passes = (
            replace(
                each,
                questions=tuple(name for name in each.questions if (name, each.allocator) not in outdated),
                failed={name: tests for name, tests in each.failed.items() if (name, each.allocator) not in outdated},
            )
            for each in self.passes
        )
        return Stored(
            tuple(each for each in passes if each.questions),
            tuple(result for result in self.results if (result.question, result.allocator) not in outdated),
        )


def replace_asked(
    document: Mapping[str, Any] | None,
    failed: Mapping[str, list[str]],
    folder: pathlib.Path,
    allocator: str,
    outdated: Iterable[str],
) -> None:
    """Store one pass: what pytest-benchmark made of it, and the tests that failed per question.

    What earlier runs left of the questions it asked goes, under every `outdated` allocator: it must not stand in for a
    run in which everything fails, which has no document, nor beside a new one.
    """
    results = results_of(document, allocator) if document else []
    asked = in_order([*(result.question for result in results), *failed])
    stored = load(folder).without(asked, outdated)
    if document and asked:
        commit = document.get("commit_info", {})
        new = Pass(
            allocator,
            document["datetime"][:16],
            str(commit.get("id"))[:10] + (", with uncommitted changes" if commit.get("dirty") else ""),
            document["machine_info"]["bench"],
            tuple(asked),
            dict(failed),
        )
        stored = Stored((*stored.passes, new), (*stored.results, *results))
    _save(stored, folder)


def load(folder: pathlib.Path) -> Stored:
    """Nothing where there is no file."""
    path = folder / "results.json"
    if not path.exists():
        return Stored()
    document = json.loads(path.read_text())
    passes = (Pass(**{**each, "questions": tuple(each["questions"])}) for each in document["passes"])
    return Stored(tuple(passes), tuple(_result(record) for record in document["cases"]))


def _save(stored: Stored, folder: pathlib.Path) -> None:
    turn = machine.ALLOCATORS.index
    passes = [asdict(each) for each in sorted(stored.passes, key=lambda each: turn(each.allocator))]
    cases = [_record(result) for result in sorted(stored.results, key=lambda result: turn(result.allocator))]
    text = f'{{\n"passes": {one_a_line(passes)},\n"cases": {one_a_line(cases)}\n}}\n'
    (folder / "results.json").write_text(text)


def one_a_line(records: Iterable[Any]) -> str:
    """A JSON list."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]"


def _record(result: Result) -> dict[str, Any]:
    columns = {"value": result.values, "spread": result.spreads, "error": result.errors}
    return {
        "question": result.question,
        "case": result.case,
        "allocator": result.allocator,
        "unit": result.unit,
        "work": result.work,
        "contenders": {
            name: {key: _rounded(column[name]) for key, column in columns.items() if name in column}
            for name in result.values
        },
        "bars": [dict(_told(bar)) for bar in result.bars],
    }


def _told(bar: Bar) -> Iterator[tuple[str, Any]]:
    """What of a bar is not the default."""
    for name, value in asdict(bar).items():
        if name in ("ours", "other") or (value is not None and value is not False):
            yield name, value


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _result(record: Mapping[str, Any]) -> Result:
    contenders: dict[str, dict[str, float]] = record["contenders"]

    def column(key: str) -> dict[str, float]:
        return {name: numbers[key] for name, numbers in contenders.items() if key in numbers}

    return Result(
        record["question"],
        record["case"],
        record["allocator"],
        record["unit"],
        record["work"],
        tuple(Bar(**bar) for bar in record["bars"]),
        column("value"),
        column("spread"),
        column("error"),
    )
