"""The README's tables, between two marks that name the folder of results they are made of."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from bench.measured import Result, by_case, in_order, slower_allocator, worst_of
from bench.names import CACHED_STEP, FRESH, IN_PLACE, LIVE_STEP, RIVALS
from bench.questions import QUESTIONS

__all__ = ["block", "update"]

_BEGIN, _END = "<!-- {}: begin, written by python -m bench.report -->", "<!-- {}: end -->"
_RECIPES = ("eager", "compile")
#: Other ways of using fastkd, shown beside the first.
_WAYS = {IN_PLACE: "in place", LIVE_STEP: "live teacher", CACHED_STEP: "cached teacher"}
#: Title, question, format, and the cases that are shown.
_VALUES = (
    ("Peak memory beside the inputs, MiB, from logits", "memory", "{:.3g}", ""),
    ("Peak memory beside the inputs, MiB, from hidden states", "projection_memory", "{:.0f}", ""),
    ("Relative error of a gradient w.r.t. logits, where the student is near its teacher", "accuracy", "{:.0e}", "near"),
    ("The same from hidden states (d hidden or d weight, whichever is worse)", "projection_accuracy", "{:.0e}", "near"),
)
#: Unit → in what a rival may beat fastkd, and how that is said.
_ASPECTS = {
    "ms": ("time", "times as fast as fastkd"),
    "MiB": ("memory", "times less memory than fastkd"),
    "relative error": ("error", "times less error than fastkd"),
}


def update(readme: pathlib.Path, folder: pathlib.Path, results: list[Result], runs: Mapping[Any, Any]) -> None:
    """Write the block of `folder` anew, if the README has one."""
    name = _name(folder)
    text, begin, end = readme.read_text(), _BEGIN.format(name), _END.format(name)
    if begin not in text:
        return
    before, rest = text.split(begin)
    _, after = rest.split(end)
    readme.write_text(f"{before}{begin}\n{block(folder, results, runs)}\n{end}{after}")


def _name(folder: pathlib.Path) -> str:
    return f"bench/results/{folder.name}"


def block(folder: pathlib.Path, results: list[Result], runs: Mapping[Any, Any]) -> str:
    """Markdown: machine, speed, memory, accuracy, and what is faster than fastkd."""
    return "\n".join(_lines(_name(folder), results, runs))


def _lines(path: str, results: list[Result], runs: Mapping[Any, Any]) -> Iterator[str]:
    days = sorted(run["datetime"][:10] for run in runs.values())
    facts = next(iter(runs.values()))["machine_info"]["bench"]
    device = facts.get("gpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_capability']}")
    judged = [verdict for result in results for verdict in result.verdicts() if verdict.met is not None]
    yield f"`make bench` on {device}, torch {facts['torch']}, {' to '.join(in_order((days[0], days[-1])))}."
    yield (
        f"{sum(bool(verdict.met) for verdict in judged)} of the {len(judged)} bars fastkd sets itself are met: "
        f"[all of them, every table, noise and versions]({path}/report.md).\n"
    )
    yield "| | fastkd | eager | `torch.compile` | others | floor |\n|---|---|---|---|---|---|"
    for name, question in QUESTIONS.items():
        mine = [result for result in results if result.question == name and question.headline]
        if mine:
            yield f"| **{question.title}** | | | | | |"
            yield from (_speed(case, group) for case, group in by_case(mine).items())
    yield f"\n![How many times as fast as each rival]({path}/speedups.png)\n"
    for title, question, form, shown in _VALUES:
        mine = [result for result in results if result.question == question and shown in result.case]
        if mine:
            yield f"{title}:\n"
            yield from _values(mine, form)
            yield ""
    yield "#### Where something else is faster, or smaller\n"
    yield from _faster(results)


def _speed(case: str, group: list[Result]) -> str:
    """A row: our time as torch comes, ratios under the allocator that is less kind to us."""
    result, ratios = group[0], slower_allocator(group)
    ways = [f"{way} {_time(result.values[name])}" for name, way in _WAYS.items() if name in result.values]
    ours = ", ".join([_time(result.values[result.ours]), *ways])
    recipes = [_times(next((ratios[name] for name in ratios if name.startswith(recipe)), None)) for recipe in _RECIPES]
    others = ", ".join(f"{name} {_times(ratio)}" for name, ratio in ratios.items() if not name.startswith(_RECIPES))
    floor = result.asked.floor
    above = f"{worst_of(group, floor):.2f} × {floor}" if floor in result.values else "–"
    return f"| {case} | {ours} | {recipes[0]} | {recipes[1]} | {others or '–'} | {above} |"


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g}×"


def _values(results: list[Result], form: str) -> Iterator[str]:
    names = [name for name in in_order(name for result in results for name in result.values) if _shown(name)]
    yield f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    for result in results:
        cells = (form.format(result.values[name]) if name in result.values else "–" for name in names)
        yield f"| {result.case} | {' | '.join(cells)} |"


def _shown(name: str) -> bool:
    return name in RIVALS or name.startswith(FRESH) or name.startswith(("predicted", "rounded"))


def _errors(result: Result, rival: str) -> str:
    if result.ours not in result.errors or rival not in result.errors:
        return ""
    return f"; relative error of its gradient {result.errors[rival]:.0e}, of fastkd's {result.errors[result.ours]:.0e}"


def _faster(results: list[Result]) -> Iterator[str]:
    """Every rival that beats fastkd, under either allocator: in time, then in memory and in error."""
    for unit, (aspect, words) in _ASPECTS.items():
        found = [
            f"- {rival}: {1 / ratio:.2f} {words} on {result.question}, {result.case} ({result.allocator})"
            + _errors(result, rival)
            for result in results
            if result.asked.unit == unit
            for rival, ratio in result.rivals()
            if ratio < 1
        ]
        yield from found or [f"- In {aspect}, nothing."]
