"""From the stored JSON to `report.md`, the plots and the README's tables: `python -m bench.report [FOLDER]`.

FOLDER holds a JSON file per question and allocator (see `store.py`); by default it is this machine's. Every
number is a median over rounds, every ratio a ratio of medians; the noise column says how far to trust them.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tabulate import tabulate

from bench import machine, plots, readme, store
from bench.cases import Bar
from bench.measured import Result, Verdict, in_order, results_of
from bench.names import RIVALS
from bench.questions import QUESTIONS, Question

__all__ = ["lines", "write"]

_LEGEND = """\
Medians over rounds in which the contenders take turns. `fastkd` writes a fresh gradient, `fastkd in place`
over the logits; `add` is torch.add of student and teacher into fresh memory, `add out=` into memory touched
before; `products` is the matrix products alone, `chunked` a loop over 128 tokens at a time. A ratio
`× faster` is the other's time ÷ ours; `÷` is ours ÷ the other's. Least work is the formula above each table;
GB/s and GFLOP/s are it ÷ the time of `fastkd`, and "of floor" is how much of our time the floor takes, which does
that work and nothing else. Noise: the widest interquartile range of a contender ÷ its median; once: a rival took more
than ten seconds, and ran once. Error: relative L2 of
the gradient (row statistics: largest relative) against float64, of `fastkd` and of its rivals. fastkd asks
for huge pages for its own gradients of logits under either allocator."""

_SIZES = {"bytes": "MB", "flops": "GFLOP"}
_RATES = {"bytes": "GB/s", "flops": "GFLOP/s"}


def write(folder: str | pathlib.Path) -> str:
    """Make the report of a folder of results; return its text. The README follows."""
    folder = pathlib.Path(folder)
    runs = store.load(folder)
    if not runs:
        raise SystemExit(f"no results in {folder}: run pytest bench/ --benchmark-only first")
    results = results_of(runs)
    text = "\n".join(lines(runs, results))
    (folder / "report.md").write_text(text + "\n")
    plots.draw(results, folder)
    readme.update(machine.ROOT / "README.md")
    return text


def lines(runs: dict[tuple[str, str], Any], results: list[Result]) -> Iterator[str]:
    """The report, line by line."""
    yield "# Benchmark results\n"
    covered: dict[str, list[str]] = {}
    for (question, allocator), run in runs.items():
        covered.setdefault(_machine_line(allocator, run), []).append(question)
    yield from (f"- {', '.join(questions)}: {line}" for line, questions in covered.items())
    judged = [verdict for result in results for verdict in result.verdicts() if verdict.met is not None]
    missed = [verdict for verdict in judged if not verdict.met]
    yield f"\n{len(judged) - len(missed)} of {len(judged)} [bars](#bars) met." + (" MISSED:" if missed else "")
    yield from (f"- {_title(verdict.result)}: {_head(verdict.bar)}: {_verdict(verdict)}" for verdict in missed)
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
    yield "\n## Bars\n\nEvery limit fastkd sets itself, and what it came to.\n"
    yield _bars(judged)


def _machine_line(name: str, run: dict[str, Any]) -> str:
    facts, commit = run["machine_info"]["bench"], run.get("commit_info", {})
    revision = str(commit.get("id"))[:10] + (", with uncommitted changes" if commit.get("dirty") else "")
    device = f"{facts['gpu']} (CUDA {facts['cuda']}), " if "gpu" in facts else ""
    peers = "".join(f", {peer} {facts[peer]}" for peer in machine.PEERS if peer in facts)
    return (
        f"allocator {name}: {device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"torch {facts['torch']} ({facts['torch_capability']}), fastkd {facts['fastkd']} "
        f"({facts['backend']}){peers}, transparent huge pages {facts['transparent_huge_pages']}, "
        f"{run['datetime'][:16]}Z, commit {revision}"
    )


def _title(result: Result) -> str:
    return f"{result.question}, {result.case}, {result.allocator}"


def _table(results: list[Result], question: Question) -> str:
    contenders = in_order(name for result in results for name in result.values)
    heads = in_order(_head(bar) for result in results for bar in result.bars)
    timed, floor = question.unit == "ms", question.floor
    order = in_order(result.case for result in results)
    rows = []
    for result in sorted(results, key=lambda result: order.index(result.case)):
        verdicts = {_head(verdict.bar): _verdict(verdict) for verdict in result.verdicts()}
        row = [result.case, result.allocator]
        row += [_number(result.values.get(name)) for name in contenders]
        row += [verdicts.get(head, "–") for head in heads]
        if floor is not None:
            row += [f"{result.values[floor] / result.values[result.ours]:.0%}" if floor in result.values else "–"]
        if timed:
            row += [
                f"{result.work / (1e6 if question.measure == 'bytes' else 1e9):.0f}",
                f"{result.work / result.values[result.ours] / 1e6:.1f}",
                "once" if result.noise is None else f"{result.noise:.0%}",
                ", ".join(_errors(result)),
            ]
        rows.append(row)
    columns = ["case", "allocator", *contenders, *heads]
    columns += [f"of floor ({floor})"] if floor is not None else []
    columns += [f"least {_SIZES[question.measure]}", _RATES[question.measure], "noise", "error"] if timed else []
    return _github(rows, columns)


def _errors(result: Result) -> Iterator[str]:
    """Of fastkd, and of the rivals by name."""
    for name, error in result.errors.items():
        if name == result.ours:
            yield f"{error:.0e}"
        elif name in RIVALS:
            yield f"{name} {error:.0e}"


def _bars(judged: Iterable[Verdict]) -> str:
    rows = [
        [
            verdict.result.question,
            verdict.result.case,
            verdict.result.allocator,
            _head(verdict.bar),
            _limit(verdict.bar),
            f"{_number(verdict.measured)}{_mark(verdict)}",
            "met" if verdict.met else "MISSED",
        ]
        for verdict in judged
    ]
    return _github(rows, ["question", "case", "allocator", "bar", "limit", "measured", ""])


def _github(rows: list[list[str]], columns: list[str]) -> str:
    return str(tabulate(rows, columns, tablefmt="github", disable_numparse=True))


def _head(bar: Bar) -> str:
    if bar.other is None:
        return f"{bar.ours}, limit"
    return f"× faster than {bar.other}" if bar.inverse else f"{bar.ours} ÷ {bar.other}"


def _verdict(verdict: Verdict) -> str:
    measured = f"{_number(verdict.measured)}{_mark(verdict)}"
    if verdict.met is None:
        return measured
    return f"{measured} ({_limit(verdict.bar)}) {'met' if verdict.met else 'MISSED'}"


def _mark(verdict: Verdict) -> str:
    return f" {verdict.result.asked.unit}" if verdict.bar.other is None else "×"


def _limit(bar: Bar) -> str:
    if bar.at_least is None:
        return f"≤ {bar.at_most:g}"
    return f"≥ {bar.at_least:g}" if bar.at_most is None else f"{bar.at_least:g} … {bar.at_most:g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    print(write(sys.argv[1] if len(sys.argv) > 1 else machine.results()))
