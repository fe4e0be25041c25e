"""fastkd beside what a user would take instead: the cases that stand for all, and whatever is faster than fastkd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.harness.results import Result, by_case, in_order
from bench.harness.store import Stored
from bench.questions import QUESTIONS
from bench.rivals.peers import RIVALS

__all__ = [
    "HEADLINES",
    "ON_GPUS",
    "Row",
    "beaten",
    "faster",
    "is_gpu",
    "machine_of",
    "ratios",
    "smaller_ratios",
    "summary",
    "table",
]


@dataclass(frozen=True)
class Headline:
    """A row of the summary: a timed question's case, and the question that has its peak memory, if any."""

    label: str
    question: str
    case: str
    memory: str | None = None


HEADLINES = (
    Headline("Forward KL + cross-entropy on logits, fp32", "logits", "1024x50257 float32", "memory"),
    Headline("The same, bf16", "logits", "1024x50257 bfloat16", "memory"),
    Headline("JSD + cross-entropy on logits, fp32", "divergences", "jsd 1024x50257 float32", "memory"),
    Headline(
        "Forward KL + cross-entropy from hidden states, fp32",
        "projections",
        "1024x50257 float32 hidden 256/768",
        "projection_memory",
    ),
    Headline("Forward KL to a cache's top 64 + cross-entropy, fp32", "sparse", "1024x50257 float32 K = 64"),
    Headline(
        "Training step of the demo's student, 4096 tokens",
        "training",
        "4096x49152 float32 hidden 256/576",
        "training_memory",
    ),
)
#: The same of a GPU, at its sizes: cases of `bench.gpu`.
ON_GPUS = (
    Headline("Forward KL + cross-entropy on logits, 8192 × 128256", "logits", "8192x128256 bfloat16", "memory"),
    Headline("The same, 8192 × 50257", "logits", "8192x50257 bfloat16"),
    Headline("JSD + cross-entropy on logits, 8192 × 128256", "divergences", "jsd 8192x128256 bfloat16"),
    Headline(
        "Forward KL + cross-entropy from hidden states, 8192 × 4096 → 128256",
        "projections",
        "8192x128256 bfloat16 hidden 4096/4096",
        "projection_memory",
    ),
    Headline(
        "Forward KL alone from hidden states, 8192 × 4096 → 128256",
        "projections_soft",
        "8192x128256 bfloat16 hidden 4096/4096",
    ),
    Headline("Cross-entropy alone from hidden states", "projections_hard", "8192x128256 bfloat16 hidden 4096"),
)
_RECIPES = ("eager", "compile")
_COLUMNS = ("case", "fastkd", "eager", "`torch.compile`", "best other", "peak memory, fastkd / eager")
#: Unit → in what a rival may beat fastkd, and how that is said of a factor.
_ASPECTS = {
    "ms": ("time", "{:.2f} times as fast as fastkd"),
    "MiB": ("memory", "needs 1/{:.2f} of fastkd's memory"),
    "relative error": ("error", "has 1/{:.2f} of fastkd's error"),
}


def ratios(result: Result) -> Iterator[tuple[str, float]]:
    """Rival → how many times its time (or memory, or error) is fastkd's."""
    for name, value in result.values.items():
        if name in RIVALS:
            yield name, value / result.values[result.ours]


def smaller_ratios(group: Iterable[Result]) -> dict[str, float]:
    """Of one case under its allocators, the ratio that is less favourable to fastkd, per rival."""
    found: dict[str, float] = {}
    for result in group:
        for rival, ratio in ratios(result):
            found[rival] = min(ratio, found.get(rival, ratio))
    return found


def is_gpu(stored: Stored) -> bool:
    return bool(stored.passes) and "gpu" in stored.passes[0].machine


def machine_of(stored: Stored) -> str:
    facts = stored.passes[0].machine
    return str(facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_capability']}")


@dataclass(frozen=True)
class Row:
    """A headline as measured. Ratios are the rival's time ÷ fastkd's, the smaller of the two under both allocators."""

    label: str
    ms: float  # of fastkd, under torch's default allocator
    eager: float | None
    compiled: float | None
    other: tuple[str, float] | None  # the fastest of all other rivals
    memory: str  # fastkd / eager, MiB


def summary(stored: Stored) -> list[Row]:
    """Of every headline that is stored."""
    rows = []
    for headline in (*HEADLINES, *ON_GPUS):
        timed = [result for result in stored.results if result.question == headline.question]
        if group := by_case(timed).get(headline.case):
            found = smaller_ratios(group)
            eager, compiled = (
                next((found[name] for name in found if name.startswith(kind)), None) for kind in _RECIPES
            )
            others = {name: ratio for name, ratio in found.items() if not name.startswith(_RECIPES)}
            other = min(others.items(), key=lambda pair: pair[1], default=None)
            ours = group[0].values[group[0].ours]
            rows.append(Row(headline.label, ours, eager, compiled, other, _memory(headline, stored)))
    return rows


def _memory(headline: Headline, stored: Stored) -> str:
    for result in stored.results:
        if (result.question, result.case) == (headline.memory, headline.case):
            eager = next((value for name, value in result.values.items() if name.startswith("eager")), None)
            return f"{result.values[result.ours]:,.0f} / {'–' if eager is None else f'{eager:,.0f}'} MiB"
    return "–"


def table(stored: Stored) -> Iterator[str]:
    """The summary as Markdown, line by line."""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for row in summary(stored):
        other = "–" if row.other is None else f"{_times(row.other[1])} ({row.other[0]})"
        cells = (row.label, _time(row.ms), _times(row.eager), _times(row.compiled), other, row.memory)
        yield f"| {' | '.join(cells)} |"


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g}×"


def faster(results: Iterable[Result]) -> Iterator[str]:
    """A line for every rival that beats fastkd, under either allocator: in time, then in memory and in error."""
    results = list(results)
    for unit, (aspect, words) in _ASPECTS.items():
        found = [
            f"- {rival}: {words.format(1 / ratio)} on {result.question}, {result.case} ({result.allocator})"
            + _errors(result, rival)
            for result in results
            if result.unit == unit
            for rival, ratio in ratios(result)
            if ratio < 1
        ]
        yield from found or [f"- In {aspect}, nothing."]


def _errors(result: Result, rival: str) -> str:
    if result.ours not in result.errors or rival not in result.errors:
        return ""
    return f"; relative error of its gradient {result.errors[rival]:.0e}, of fastkd's {result.errors[result.ours]:.0e}"


def beaten(results: Iterable[Result]) -> str:
    """In a phrase: in which comparisons of time something else is faster, or "nothing"."""
    found: dict[str, list[tuple[str, float]]] = {}
    for result in results:
        for rival, ratio in ratios(result):
            if result.unit == "ms" and ratio < 1:
                dtype = "bf16" if "bfloat16" in result.case else "fp32"
                place = f"{QUESTIONS[result.question].section.value.lower()} in {dtype}"
                found.setdefault(place, []).append((rival, 1 / ratio))
    places = [
        f"{place} ({', '.join(sorted(in_order(rival for rival, _ in some)))}: up to "
        f"{max(factor for _, factor in some):.2f} times as fast)"
        for place, some in found.items()
    ]
    return ", ".join(places) or "nothing"
