"""The README's tables, between two marks that name the folder of results they are made of."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bench import store
from bench.measured import Result, by_case, in_order, results_of, slower_allocator, worst_of
from bench.names import ALLOWED, CACHED_STEP, IN_PLACE, LIVE_STEP, ONE_GRADIENT
from bench.questions import QUESTIONS

__all__ = ["block", "lines", "shown", "update"]

_BEGIN, _END = "<!-- {}: begin, written by python -m bench.report -->", "<!-- {}: end -->"
_Runs = Mapping[tuple[str, str], Mapping[str, Any]]  # what `store.load` returns
_RECIPES = ("eager", "compile")
#: Other ways of using fastkd, shown beside the first.
_WAYS = {IN_PLACE: "in place", LIVE_STEP: "live teacher", CACHED_STEP: "cached teacher"}
#: Title, question, format, and the cases that are shown.
_VALUES = (
    ("Peak memory beside the inputs, MiB, from logits", "memory", "{:.3g}", ""),
    ("Peak memory beside the inputs, MiB, from hidden states", "projection_memory", "{:.0f}", ""),
    ("Relative error of a gradient w.r.t. logits, where the student is near its teacher", "accuracy", "{:.0e}", "near"),
    ("The same from hidden states (d hidden or d weight, whichever is worse)", "projection_accuracy", "{:.0e}", "near"),
    (
        "Degrees between the gradients of a student's head from a cache and from the teacher's whole rows; 4096 "
        "tokens of reviews; SmolLM2 teaches, the student is it seen through so many of its 576 principal directions",
        "cache_gradient",
        "{:.1f}",
        "",
    ),
)
#: Unit → in what a rival may beat fastkd, and how that is said.
_ASPECTS = {
    "ms": ("time", "times as fast as fastkd"),
    "MiB": ("memory", "times less memory than fastkd"),
    "relative error": ("error", "times less error than fastkd"),
}


def update(readme: pathlib.Path) -> None:
    """Write every block anew, from the folders beside the README that they name."""
    text = readme.read_text()
    for name in shown(text):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{block(readme.parent / name)}\n{end}{after}"
    readme.write_text(text)


def shown(text: str) -> list[str]:
    """The folders of a README's blocks."""
    return re.findall(_BEGIN.format(r"(\S+)"), text)


def block(folder: pathlib.Path) -> str:
    """Markdown: machine, speed, memory, accuracy, and what is faster than fastkd, on other stored machines too."""
    others = {other: store.load(other) for other in sorted(folder.parent.iterdir()) if other != folder}
    return "\n".join(lines(folder, store.load(folder), {other: runs for other, runs in others.items() if runs}))


def lines(folder: pathlib.Path, runs: _Runs, others: Mapping[pathlib.Path, _Runs]) -> Iterator[str]:
    """The block, line by line."""
    results = results_of(runs)
    yield f"`make bench` on {_machine(runs)}. {_score(folder, results)}\n"
    yield "| | fastkd | eager | `torch.compile` | others | floor |\n|---|---|---|---|---|---|"
    for name, question in QUESTIONS.items():
        mine = [result for result in results if result.question == name and result.headline]
        if mine:
            yield f"| **{question.title}** | | | | | |"
            yield from (_speed(case, group) for case, group in by_case(mine).items())
    yield f"\n![How many times as fast as each rival]({_path(folder)}/speedups.png)\n"
    for title, question, form, selected in _VALUES:
        mine = [result for result in results if result.question == question and selected in result.case]
        if mine:
            yield f"{title}:\n"
            yield from _values(mine, form)
            yield ""
    yield "#### Where something else is faster\n"
    yield from _faster(results)
    for other, stored in others.items():
        yield f"\nOn {_machine(stored)}. {_score(other, results_of(stored))}\n"
        yield from _faster(results_of(stored))


def _path(folder: pathlib.Path) -> str:
    return f"bench/results/{folder.name}"


def _machine(runs: _Runs) -> str:
    days = sorted(run["datetime"][:10] for run in runs.values())
    facts = next(iter(runs.values()))["machine_info"]["bench"]
    device = facts.get("gpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_capability']}")
    return f"{device}, torch {facts['torch']}, {' to '.join(in_order((days[0], days[-1])))}"


def _score(folder: pathlib.Path, results: list[Result]) -> str:
    judged = [verdict for result in results for verdict in result.verdicts() if verdict.met is not None]
    met = sum(bool(verdict.met) for verdict in judged)
    return (
        f"{met} of the {len(judged)} bars fastkd sets itself are met: "
        f"[all of them, every table, noise and versions]({_path(folder)}/report.md)."
    )


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
    """Not the yardsticks of bars."""
    return name not in (ONE_GRADIENT, ALLOWED) and not name.startswith("gradients")


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
