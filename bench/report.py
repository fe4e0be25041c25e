"""From the stored JSON to `report.md` and `speedups.png`: `python -m bench.report [FOLDER]`.

FOLDER holds a JSON file per question and allocator (see `store.py`); by default it is this machine's. Every
number is a median over rounds, every ratio a ratio of medians; the noise column says how far to trust them.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from bench import machine, store
from bench.cases import QUESTIONS, Bar, Question

__all__ = ["write"]

_LEGEND = """\
Medians over rounds in which the contenders take turns. `fastkd` writes a fresh gradient, `fastkd in place`
over the logits; `add` is torch.add of student and teacher into fresh memory, `add out=` into memory touched
before; `products` is the four matrix products alone, `chunked` a loop over 128 tokens at a time. A ratio
`× faster` is the other's time ÷ ours; `÷` is ours ÷ the other's. GB/s and GFLOP/s: least work ÷ time of
`fastkd`. Noise: the widest interquartile range of a contender ÷ its median. Error: relative L2 of the
gradient (row statistics: largest relative) against float64, of `fastkd` and of the first rival. fastkd asks
for huge pages for its own results under either allocator."""


_RATES = {"bytes": "GB/s", "flops": "GFLOP/s"}


@dataclass(frozen=True)
class Result:
    """One case under one allocator. `values` are medians per contender, in ms or the unit of the question."""

    question: str
    case: str
    allocator: str
    values: dict[str, float]
    bars: tuple[Bar, ...]
    work: int  # bytes or FLOPs
    errors: dict[str, float]
    noise: float  # the widest interquartile range of a contender ÷ its median

    def verdicts(self) -> Iterator[tuple[Bar, float, bool | None]]:
        for bar in self.bars:
            measured = bar.measured(self.values)
            if measured is not None:
                yield bar, measured, bar.met(measured)


def write(folder: str | pathlib.Path) -> str:
    """Make the report of a folder of results; return its text."""
    folder = pathlib.Path(folder)
    runs = store.load(folder)
    if not runs:
        raise SystemExit(f"no results in {folder}: run pytest bench/ --benchmark-only first")
    results = [result for (_, allocator), run in runs.items() for result in _results(allocator, run)]
    text = "\n".join(_lines(runs, results))
    (folder / "report.md").write_text(text + "\n")
    _plot(results, folder / "speedups.png")
    return text


def _results(allocator: str, run: dict[str, Any]) -> Iterator[Result]:
    for entry in run["benchmarks"]:
        extra = entry["extra_info"]
        bars = tuple(Bar(**bar) for bar in extra["bars"])
        if "peaks" in extra:
            values, noise = extra["peaks"], 0.0
        else:
            times = {extra["times"]["ours"]: entry["stats"]["data"], **extra["times"]["others"]}
            values = {name: 1e3 * statistics.median(samples) for name, samples in times.items()}
            noise = max(map(_spread, times.values()))
        errors = {name: error for name, error in extra.get("errors", {}).items() if error is not None}
        work = extra[QUESTIONS[extra["question"]].measure]
        yield Result(extra["question"], extra["case"], allocator, values, bars, work, errors, noise)


def _spread(samples: list[float]) -> float:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def _lines(runs: dict[tuple[str, str], Any], results: list[Result]) -> Iterator[str]:
    yield "# Benchmark results\n"
    covered: dict[str, list[str]] = {}
    for (question, allocator), run in runs.items():
        covered.setdefault(_machine_line(allocator, run), []).append(question)
    yield from (f"- {', '.join(questions)}: {line}" for line, questions in covered.items())
    judged = [
        (met, f"{_title(result)}: {_head(bar)}: {_verdict(bar, measured, met, QUESTIONS[result.question].unit)}")
        for result in results
        for bar, measured, met in result.verdicts()
        if met is not None
    ]
    missed = [line for met, line in judged if not met]
    yield f"\n{len(judged) - len(missed)} of {len(judged)} bars met." + (" MISSED:" if missed else "")
    yield from (f"- {line}" for line in missed)
    failed = [f"{test} ({allocator})" for (_, allocator), run in runs.items() for test in run["failed"]]
    if failed:
        yield f"\n{len(failed)} FAILED, a contender being wrong or not running; they are in no table:"
        yield from (f"- {line}" for line in failed)
    yield f"\n{_LEGEND}"
    for name, question in QUESTIONS.items():
        mine = [result for result in results if result.question == name]
        if mine:
            yield f"\n## {question.title}\n\n{question.least}. Unit: {question.unit}.\n"
            yield _table(mine, question)


def _machine_line(name: str, run: dict[str, Any]) -> str:
    facts, commit = run["machine_info"]["bench"], run.get("commit_info", {})
    revision = str(commit.get("id"))[:10] + (", with uncommitted changes" if commit.get("dirty") else "")
    return (
        f"allocator {name}: {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"torch {facts['torch']} ({facts['torch_capability']}), fastkd {facts['fastkd']} "
        f"({facts['backend']}), transparent huge pages {facts['transparent_huge_pages']}, "
        f"{run['datetime'][:16]}Z, commit {revision}"
    )


def _title(result: Result) -> str:
    return f"{result.question}, {result.case}, {result.allocator}"


def _table(results: list[Result], question: Question) -> str:
    unit = question.unit
    contenders = _in_order(name for result in results for name in result.values)
    heads = _in_order(_head(bar) for result in results for bar in result.bars)
    timed = unit == "ms"
    rows = []
    for result in sorted(results, key=lambda result: _case_order(results).index(result.case)):
        verdicts = {_head(bar): _verdict(bar, measured, met, unit) for bar, measured, met in result.verdicts()}
        row = [result.case, result.allocator]
        row += [_number(result.values.get(name)) for name in contenders]
        row += [verdicts.get(head, "–") for head in heads]
        if timed:
            ours = contenders[0]
            rival = next((name for name in result.errors if not name.startswith("fastkd")), "")
            row += [
                f"{result.work / result.values[ours] / 1e6:.1f}",
                f"{result.noise:.0%}",
                " / ".join(f"{result.errors[name]:.0e}" for name in (ours, rival) if name in result.errors),
            ]
        rows.append(row)
    last = [_RATES[question.measure], "noise", "error"] if timed else []
    columns = ["case", "allocator", *contenders, *heads, *last]
    return str(tabulate(rows, columns, tablefmt="github", disable_numparse=True))


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _case_order(results: list[Result]) -> list[str]:
    return _in_order(result.case for result in results)


def _head(bar: Bar) -> str:
    if bar.other is None:
        return f"{bar.ours}, limit"
    return f"× faster than {bar.other}" if bar.inverse else f"{bar.ours} ÷ {bar.other}"


def _verdict(bar: Bar, measured: float, met: bool | None, unit: str) -> str:
    mark = f" {unit}" if bar.other is None else "×"
    if met is None:
        return f"{measured:.2f}{mark}"
    if bar.at_least is None:
        limit = f"≤ {bar.at_most:g}"
    else:
        limit = f"≥ {bar.at_least:g}" if bar.at_most is None else f"{bar.at_least:g} … {bar.at_most:g}"
    return f"{measured:.2f}{mark} ({limit}) {'met' if met else 'MISSED'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _plot(results: list[Result], path: pathlib.Path) -> None:
    """How many times faster than each recipe, per case; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    faster = [result for result in results if any(bar.inverse for bar in result.bars)]
    allocators = _in_order(result.allocator for result in faster)
    if not faster:
        return
    labels = _in_order(f"{result.question}: {result.case}" for result in faster)
    rivals = _in_order(bar.other for result in faster for bar in result.bars if bar.inverse and bar.other)
    figure = Figure(figsize=(3 + 4 * len(allocators), 1.5 + 0.35 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(allocators), sharex=True, sharey=True, squeeze=False)[0]
    for panel, allocator in zip(panels, allocators, strict=True):
        for number, rival in enumerate(rivals):
            points = [
                (measured, labels.index(f"{result.question}: {result.case}"))
                for result in faster
                if result.allocator == allocator
                for bar, measured, _ in result.verdicts()
                if bar.inverse and bar.other == rival
            ]
            times, places = [x for x, _ in points], [y for _, y in points]
            panel.scatter(times, places, color=f"C{number}", marker="osD^vP"[number % 6], label=rival)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=f"allocator: {allocator}", xlabel="times faster than (left of 1: slower)")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rivals))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    print(write(sys.argv[1] if len(sys.argv) > 1 else machine.results()))
