"""The cases: shape, dtype, divergence, and the bars fastkd must reach there, set for two CPU cores.

A bar compares two contenders of a race by name; one without a limit is reported and not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fastkd.divergences import TABLE

__all__ = [
    "DIVERGENCES",
    "LOGITS",
    "LOG_SOFTMAX",
    "MEMORY",
    "QUESTIONS",
    "ROW_STATISTICS",
    "Bar",
    "Case",
    "selected",
]

FRESH, IN_PLACE, LOSS_ONLY = "fastkd", "fastkd in place", "fastkd loss only"
ONE_GRADIENT = "one gradient"
MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """What `ours` must reach against `other`, or on its own where `other` is None."""

    ours: str
    other: str | None
    at_least: float | None = None  # other ÷ ours: how many times faster
    at_most: float | None = None  # ours ÷ other, or ours itself
    inverse: bool = False  # reported as other ÷ ours; follows from `at_least`

    def measured(self, values: Mapping[str, float]) -> float | None:
        """The ratio this bar is about, or None where a contender did not run."""
        if self.ours not in values or (self.other is not None and self.other not in values):
            return None
        if self.other is None:
            return values[self.ours]
        return values[self.other] / values[self.ours] if self.inverse else values[self.ours] / values[self.other]

    def met(self, measured: float) -> bool | None:
        """None where there is nothing to meet."""
        if self.at_least is not None:
            return measured >= self.at_least
        return None if self.at_most is None else measured <= self.at_most


def faster(ours: str, other: str, times: float | None = None) -> Bar:
    return Bar(ours, other, at_least=times, inverse=True)


def within(ours: str, other: str | None, limit: float | None = None) -> Bar:
    return Bar(ours, other, at_most=limit)


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    dtype: torch.dtype
    bars: tuple[Bar, ...]
    divergence: str = "forward_kl"
    in_quick: bool = False  # part of `--quick`, with at most 256 rows

    def __str__(self) -> str:
        name = f"{self.rows}x{self.vocab} {str(self.dtype).removeprefix('torch.')}"
        return name if self.divergence == "forward_kl" else f"{self.divergence} {name}"

    @property
    def matrix_bytes(self) -> int:
        """Of one [rows, vocab] tensor."""
        return self.rows * self.vocab * self.dtype.itemsize


@dataclass(frozen=True)
class Question:
    """What a benchmark file asks; `passes` × rows × vocab × bytes per element is its least traffic."""

    title: str
    passes: int
    traffic: str
    unit: str = "ms"


QUESTIONS: dict[str, Question] = {
    "logits": Question(
        "Forward KL (T = 2) and cross-entropy on logits, forward and backward",
        3,
        "Least traffic: read student and teacher, write the gradient: 3·N·V·b",
    ),
    "divergences": Question(
        "The other divergences (T = 2) with cross-entropy, forward and backward",
        3,
        "Least traffic: read student and teacher, write the gradient: 3·N·V·b",
    ),
    "log_softmax": Question(
        "log_softmax(z / 2), forward and backward",
        5,
        "Least traffic: read z, write the result; read z and the upstream gradient, write the gradient: 5·N·V·b",
    ),
    "row_statistics": Question("Row statistics (T = 2)", 1, "Least traffic: read z: N·V·b"),
    "memory": Question(
        "Peak memory above the resident inputs, forward and backward, a process each, default allocator",
        1,
        "One gradient: N·V·b",
        unit="MiB",
    ),
}

_SHAPES = ((1024, 50257), (256, 50257), (256, 128256))
_FP32_BARS = (
    faster(FRESH, "eager", 12),
    faster(FRESH, "compile", 5),
    within(FRESH, "add", 2.0),
    within(IN_PLACE, "add out=", 2.0),
)
_BF16_BARS = (
    faster(FRESH, "eager", 10),
    faster(FRESH, "eager fp32"),
    faster(FRESH, "compile"),
    faster(FRESH, "compile fp32"),
    within(FRESH, "add", 3.5),
    within(IN_PLACE, "add out="),
)
_LOG_SOFTMAX_BARS = (faster(FRESH, "torch", 1.0), faster(FRESH, "compile"), within(FRESH, "add"))
_ROW_STATISTICS_BARS = (faster(FRESH, "eager", 4), faster(FRESH, "compile"), within(FRESH, "sum"))
_MEMORY_BARS = (
    within(FRESH, ONE_GRADIENT, 1.02),
    within(IN_PLACE, None, 1.0),
    within(LOSS_ONLY, None, 1.0),
    within("eager", ONE_GRADIENT),
    within("compile", ONE_GRADIENT),
)


def _cases(float32: tuple[Bar, ...], bfloat16: tuple[Bar, ...]) -> tuple[Case, ...]:
    return tuple(
        Case(rows, vocab, dtype, bars, in_quick=(rows, vocab) == (256, 50257))
        for dtype, bars in ((torch.float32, float32), (torch.bfloat16, bfloat16))
        for rows, vocab in _SHAPES
    )


LOGITS = _cases(_FP32_BARS, _BF16_BARS)
DIVERGENCES = tuple(
    Case(
        1024,
        50257,
        torch.float32,
        (
            faster(FRESH, "eager", 6),
            faster(FRESH, "compile", 2.5),
            within(FRESH, "add"),
            within(IN_PLACE, "add out="),
        ),
        name,
        in_quick=name in ("reverse_kl", "jsd"),
    )
    for name in TABLE
    if name != "forward_kl"
)
LOG_SOFTMAX = _cases(_LOG_SOFTMAX_BARS, _LOG_SOFTMAX_BARS)
ROW_STATISTICS = _cases(_ROW_STATISTICS_BARS, _ROW_STATISTICS_BARS)
MEMORY = (
    Case(1024, 50257, torch.float32, _MEMORY_BARS, in_quick=True),
    Case(1024, 50257, torch.bfloat16, _MEMORY_BARS),
    Case(256, 128256, torch.float32, _MEMORY_BARS),
    Case(1024, 50257, torch.float32, _MEMORY_BARS, "jsd"),
)


def selected(cases: tuple[Case, ...], quick: bool) -> list[Case]:
    """The cases to run: all of them, or those of `--quick` cut to 256 rows."""
    if not quick:
        return list(cases)
    return [replace(case, rows=min(case.rows, 256)) for case in cases if case.in_quick]
