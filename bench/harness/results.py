"""What came of a case: medians per contender, their spread and error, ratios, verdicts on bars."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness.question import Bar

__all__ = ["Result", "Verdict", "by_case", "in_order", "results_of"]


@dataclass(frozen=True)
class Verdict:
    result: Result
    bar: Bar
    measured: float
    met: bool | None  # None where nothing is to be met


@dataclass(frozen=True)
class Result:
    """One case under one allocator. Every mapping is from the names of contenders."""

    question: str
    case: str
    allocator: str
    unit: str
    work: int  # the least there is to do: bytes or FLOPs
    bars: tuple[Bar, ...]
    values: dict[str, float]  # medians over rounds, or what was measured once
    spreads: dict[str, float]  # interquartile range ÷ median, of those that ran more than once
    errors: dict[str, float]  # of those that were verified

    @property
    def ours(self) -> str:
        """The contender the case is about, which is raced first."""
        return next(iter(self.values))

    @property
    def noise(self) -> float | None:
        """The widest spread; None where a contender ran only once."""
        return max(self.spreads.values()) if self.spreads.keys() == self.values.keys() else None

    def verdicts(self) -> Iterator[Verdict]:
        for bar in self.bars:
            measured = bar.measured(self.values)
            if measured is not None:
                yield Verdict(self, bar, measured, bar.met(measured))


def results_of(document: Mapping[str, Any], allocator: str) -> list[Result]:
    """Of a pass, from the document pytest-benchmark makes of it."""
    return [_result(entry["extra_info"], allocator) for entry in document["benchmarks"]]


def _result(extra: Mapping[str, Any], allocator: str) -> Result:
    times: dict[str, list[float]] = extra.get("times", {})
    return Result(
        extra["question"],
        extra["case"],
        allocator,
        extra["unit"],
        extra["work"],
        tuple(Bar(**bar) for bar in extra["bars"]),
        extra.get("values") or {name: 1e3 * statistics.median(some) for name, some in times.items()},
        {name: _spread(some) for name, some in times.items() if len(some) > 1},
        {name: error for name, error in extra.get("errors", {}).items() if error is not None},
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
