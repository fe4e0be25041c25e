"""From findings to `results.json` of a machine's folder, as `bench.report` reads it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from bench.gpu import walks
from bench.gpu.findings import Finding
from bench.harness import machine, store
from bench.harness.question import Bar
from bench.harness.results import Result, results_of

__all__ = ["document", "keep"]

#: What a race measured, by contender.
_MEASURED = ("times", "values", "errors")


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """As pytest-benchmark writes one. Races of one case with several walks are one case."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    races = (each for each in findings if each["kind"] == "race")
    last = {(race["question"], race["case"], race["walk"]): race for race in races}  # of the same, with more contenders
    for race in sorted(last.values(), key=lambda race: race["walk"] != walks.DEFAULT):  # whose contenders come first
        seen = merged.setdefault((race["question"], race["case"]), race | {name: {} for name in _MEASURED})
        for name in _MEASURED:
            for contender, measured in race.get(name, {}).items():
                seen[name].setdefault(contender, measured)
    cases = [_case(race) for race in merged.values()]
    facts = next(each for each in findings if each["kind"] == "facts")
    return {
        "datetime": facts["date"],
        "commit_info": {"id": facts["commit"], "dirty": facts["changed"]},
        "machine_info": {"bench": facts["machine"]},
        "benchmarks": [{"extra_info": case} for case in cases if case["times"] or case["values"]],
    }


def _case(race: dict[str, Any]) -> dict[str, Any]:
    """Contenders in the order of the default walk's race; without bars of contenders that did not run."""
    measured = race["times"] or race["values"]
    bars = [bar for bar in race["bars"] if Bar(**bar).measured(dict.fromkeys(measured, 1.0)) is not None]
    return race | {"bars": bars}


def keep(findings: Sequence[Finding], folder: pathlib.Path) -> list[Result]:
    """Write them beside what the folder holds of other questions; return what was written."""
    made = document(findings)
    results = results_of(made, machine.ALLOCATORS[0])
    failed: dict[str, list[str]] = {}
    for each in findings:
        if each["kind"] == "failed":
            failed.setdefault(each["question"], []).append(f"{each['case']}, {each['contender']}")
    if results:
        folder.mkdir(parents=True, exist_ok=True)
        store.replace_asked(made, failed, folder, machine.ALLOCATORS[0], machine.ALLOCATORS[:1])
    return results
