"""Has fastkd become slower, larger or less exact? Ratios to its contenders now, beside a committed baseline.

    python -m bench.gate                     measure, compare, exit 1 where something was lost
    python -m bench.gate --baseline FOLDER   compare with the baseline of another machine, a folder of bench/results
    python -m bench.gate --accept            measure three times, and make the medians the baseline

Ratios and never times, so that a slow hour loses nothing. A rival that has become faster is not our loss either: a
contender of ours has lost what its ratio got worse by against every other one of its case, which is what its own
slowing down does to all of them. What seems lost is measured again, and counts if it is lost twice.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.harness import machine
from bench.harness.results import Result, results_of

__all__ = ["lost", "ratios_of"]

#: A ratio may get this much worse: run to run, the ratios of unchanged code differ by up to 15 %.
ALLOWANCE = 1.25
_BASELINE = "baseline.json"
#: "question, case" → contender of ours → other contender → ours ÷ other
Ratios = dict[str, dict[str, dict[str, float]]]


def ratios_of(results: Iterable[Result]) -> Ratios:
    """What is compared, of every case."""
    found: Ratios = {}
    for result in results:
        ours = [name for name in result.values if name.startswith("fastkd")]
        others = [name for name in result.values if name not in ours]
        found[f"{result.question}, {result.case}"] = {
            name: {other: result.values[name] / result.values[other] for other in others} for name in ours
        }
    return found


def lost(before: Ratios, now: Ratios) -> dict[tuple[str, str], float]:
    """(case, contender) → how many times worse, of those beyond the allowance. Cases that either lacks are left out."""
    found = {}
    for case in before.keys() & now.keys():
        for name in before[case].keys() & now[case].keys():
            old, new = before[case][name], now[case][name]
            factors = [new[other] / old[other] for other in old.keys() & new.keys()]
            if factors and min(factors) > ALLOWANCE:
                found[case, name] = min(factors)
    return found


@dataclass(frozen=True)
class _Pass:
    ratios: Ratios
    tests: dict[str, str]  # "question, case" → pytest's name for it
    machine: dict[str, Any]


def _measure(tests: Iterable[str] = ("bench",)) -> _Pass:
    """A quick pass over the gated questions of files or folders, or over single tests."""
    with tempfile.TemporaryDirectory(prefix="fastkd-bench-") as folder:
        document = pathlib.Path(folder) / "pass.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *tests,
            "--benchmark-only",
            "--quick",
            "--gated",
            "-q",
            "--no-header",
        ]
        ended = subprocess.run(
            [*command, f"--benchmark-json={document}"],
            cwd=machine.ROOT,
            env={**os.environ, machine.HUGE_PAGES: "0"},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            raise SystemExit(f"{ended.stdout}\na contender is wrong or does not run: nothing was compared")
        run = json.loads(document.read_text())
    extras = [(entry["extra_info"], entry["fullname"]) for entry in run["benchmarks"]]
    return _Pass(
        ratios_of(results_of(run, machine.ALLOCATORS[0])),
        {f"{extra['question']}, {extra['case']}": name for extra, name in extras},
        run["machine_info"]["bench"],
    )


def _accept() -> None:
    passes = [_measure() for _ in range(3)]
    ratios = _median([each.ratios for each in passes])
    path = machine.results() / _BASELINE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(passes[0].machine, ratios))
    print(f"{len(ratios)} cases are the baseline now: {path.relative_to(machine.ROOT)}")


def _text(facts: dict[str, Any], ratios: Ratios) -> str:
    """JSON, a case a line."""
    lines = (
        f"{json.dumps(case)}: {json.dumps(_rounded(ours), ensure_ascii=False)}" for case, ours in sorted(ratios.items())
    )
    return f'{{\n"machine": {json.dumps(facts)},\n"ratios": {{\n' + ",\n".join(lines) + "\n}}\n"


def _rounded(ours: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {other: float(f"{ratio:.4g}") for other, ratio in others.items()} for name, others in ours.items()}


def _median(passes: list[Ratios]) -> Ratios:
    return {
        case: {
            name: {other: statistics.median(each[case][name][other] for each in passes) for other in others}
            for name, others in ours.items()
        }
        for case, ours in passes[0].items()
    }


def _check(folder: pathlib.Path) -> None:
    path = folder / _BASELINE
    if not path.exists():
        stored = ", ".join(sorted(found.parent.name for found in machine.RESULTS.glob(f"*/{_BASELINE}")))
        raise SystemExit(
            f"no baseline in {folder}: make one on a commit you trust with --accept, or name a similar machine's with "
            f"--baseline, though ratios differ from machine to machine. There are: {stored}"
        )
    baseline = json.loads(path.read_text())
    now = _measure()
    changed = {
        key: (old, now.machine.get(key)) for key, old in baseline["machine"].items() if now.machine.get(key) != old
    }
    for key, (old, new) in changed.items():
        print(f"note: {key} was {old} in the baseline and is {new}")
    if missing := sorted(baseline["ratios"].keys() - now.ratios.keys()):
        raise SystemExit("cases of the baseline that were not measured: " + "; ".join(missing))
    losses = lost(baseline["ratios"], now.ratios)
    if losses:
        print(f"{len(losses)} seem worse and are measured again")
        again = _measure(sorted({now.tests[case] for case, _ in losses}))
        twice = lost(baseline["ratios"], again.ratios)
        losses = {key: min(factor, twice[key]) for key, factor in losses.items() if key in twice}
    for (case, name), factor in sorted(losses.items()):
        print(f"LOST: {name} in {case}: {factor:.2f} times worse against every other contender")
    if losses:
        raise SystemExit(1)
    print(f"{len(now.ratios)} cases: nothing lost beyond a factor of {ALLOWANCE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--accept", action="store_true", help="make this machine's baseline of what is measured now")
    parser.add_argument(
        "--baseline", type=pathlib.Path, default=machine.results(), metavar="FOLDER", help="whose baseline to compare"
    )
    arguments = parser.parse_args()
    _accept() if arguments.accept else _check(arguments.baseline)
