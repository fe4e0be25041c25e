"""Stored JSON → `Result`s: medians per contender, ratios, verdicts on bars. What every table and plot is made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.cases import Bar
from bench.names import RIVALS
from bench.questions import QUESTIONS, Question

__all__ = ["Result", "Verdict", "by_case", "in_order", "results_of", "slower_allocator", "worst_of"]


@dataclass(frozen=True)
class Verdict:
    result: Result
    bar: Bar
    measured: float
    met: bool | None  # None where nothing is to be met


@dataclass(frozen=True)
class Result:
    """One case under one allocator. `values` are medians per contender, in ms or the unit of the question."""

    question: str
    case: str
    allocator: str
    values: dict[str, float]
    bars: tuple[Bar, ...]
    work: int  # the least there is to do: bytes or FLOPs
    errors: dict[str, float]
    shape: dict[str, int | None]  # rows, vocab, hidden size of the student
    headline: bool  # in the README
    noise: float | None  # the widest interquartile range of a contender ÷ its median; None: one ran only once

    @property
    def asked(self) -> Question:
        return QUESTIONS[self.question]

    @property
    def ours(self) -> str:
        """The contender the case is about, which is raced first."""
        return next(iter(self.values))

    def verdicts(self) -> Iterator[Verdict]:
        for bar in self.bars:
            measured = bar.measured(self.values)
            if measured is not None:
                yield Verdict(self, bar, measured, bar.met(measured))

    def rivals(self) -> Iterator[tuple[str, float]]:
        """What a user could have used instead, and how many times its time (or memory, or error) is ours."""
        for name, value in self.values.items():
            if name in RIVALS:
                yield name, value / self.values[self.ours]


def results_of(runs: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Result]:
    """`store.load` → results, in its order."""
    return [
        _result(allocator, entry["extra_info"]) for (_, allocator), run in runs.items() for entry in run["benchmarks"]
    ]


def _result(allocator: str, extra: Mapping[str, Any]) -> Result:
    bars = tuple(Bar(**bar) for bar in extra["bars"])
    errors = {name: error for name, error in extra.get("errors", {}).items() if error is not None}
    if "values" in extra:
        values, noise = extra["values"], None
    else:
        values = {name: 1e3 * statistics.median(samples) for name, samples in extra["times"].items()}
        several = all(len(samples) > 1 for samples in extra["times"].values())
        noise = max(map(_spread, extra["times"].values())) if several else None
    work = extra[QUESTIONS[extra["question"]].measure]
    return Result(
        extra["question"],
        extra["case"],
        allocator,
        values,
        bars,
        work,
        errors,
        extra["shape"],
        extra["headline"],
        noise,
    )


def _spread(samples: list[float]) -> float:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def by_case(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The same case under its allocators, the default one first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.case, []).append(result)
    return found


def slower_allocator(group: Iterable[Result]) -> dict[str, float]:
    """Rival → how many times as fast as it fastkd is, under the allocator that is less kind to fastkd."""
    found: dict[str, float] = {}
    for result in group:
        for rival, ratio in result.rivals():
            found[rival] = min(ratio, found.get(rival, ratio))
    return found


def worst_of(group: Iterable[Result], floor: str) -> float:
    """fastkd ÷ floor, likewise."""
    return max(result.values[result.ours] / result.values[floor] for result in group if floor in result.values)
