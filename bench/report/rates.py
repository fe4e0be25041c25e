"""`rates.png`: how near losses from hidden states come to the rate at which the machine multiplies matrices.

Nothing where matplotlib is not installed.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from bench import bench_products, bench_projections
from bench.harness.results import Result, by_case
from bench.harness.store import Stored
from bench.rivals.hidden import PRODUCTS

__all__ = ["Rate", "draw", "peaks", "rates"]

#: Question → what the loss consists of.
_LOSSES = {
    bench_projections.PROJECTIONS.name: "forward KL + cross-entropy",
    bench_projections.PROJECTIONS_SOFT.name: "forward KL",
    bench_projections.PROJECTIONS_HARD.name: "cross-entropy",
}
_FP32, _BF16 = bench_products.PEAKS.values()
_COLOURS = {_FP32: "#4c78a8", _BF16: "#e08214"}


@dataclass(frozen=True)
class Rate:
    """What fastkd reaches on a case, in GFLOP/s."""

    label: str
    dtype: str  # of the hidden states
    ours: float
    products: float | None  # of the bare products in the same race


def rates(stored: Stored) -> list[Rate]:
    """Of every case of losses from hidden states, under torch's default allocator where it ran under both."""
    found = []
    for question, loss in _LOSSES.items():
        for case, (result, *_) in by_case(each for each in stored.results if each.question == question).items():
            label = f"{loss}\n{case.replace('x', ' × ', 1)}"
            found.append(Rate(label, _dtype(result), _rate(result, result.ours), _bare(result)))
    return found


def peaks(stored: Stored) -> dict[str, float]:
    """Dtype → the best rate of bare products in it that was measured on the machine, alone or as a race's floor."""
    measured = [
        (name.split()[0], rate)
        for result in stored.results
        if result.question == bench_products.PRODUCTS.name
        for name, rate in result.values.items()
    ]
    raced = [
        (_dtype(result), rate)
        for result in stored.results
        if result.question in _LOSSES and (rate := _bare(result)) is not None
    ]
    best: dict[str, float] = {}
    for dtype, rate in (*measured, *raced):
        best[dtype] = max(rate, best.get(dtype, 0.0))
    return best


def _dtype(result: Result) -> str:
    return _BF16 if "bfloat16" in result.case else _FP32


def _rate(result: Result, contender: str) -> float:
    """From ms."""
    return result.work / result.values[contender] / 1e6


def _bare(result: Result) -> float | None:
    return _rate(result, PRODUCTS) if PRODUCTS in result.values else None


def draw(stored: Stored, path: pathlib.Path) -> None:
    """A bar for every case, and a line for every peak."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows, best = rates(stored), peaks(stored)
    if not rows:
        return
    largest = max([*(row.ours for row in rows), *best.values()])
    unit, scale = ("TFLOP/s", 1e3) if largest >= 1e4 else ("GFLOP/s", 1.0)
    figure = Figure(figsize=(7, 1.4 + 0.45 * len(rows)), layout="constrained")
    panel = figure.subplots()
    named: set[str] = set()

    def once(label: str) -> str:
        """In the legend; matplotlib leaves out what begins with an underscore."""
        new = label not in named
        named.add(label)
        return label if new else f"_{label}"

    for place, row in enumerate(rows):
        label = once(f"fastkd from {row.dtype} hidden states")
        panel.barh(place, row.ours / scale, 0.6, color=_COLOURS[row.dtype], label=label)
        panel.text(0, place, f" {row.ours / scale:.3g}", va="center", color="white", fontsize=8)
        if row.products is not None:
            label = once("bare products, same race")
            panel.plot(
                [row.products / scale] * 2,
                [place - 0.4, place + 0.4],
                color="black",
                linewidth=2,
                label=label,
                zorder=3,
            )
    for dtype, rate in best.items():
        label = f"best {dtype} products: {rate / scale:.3g} {unit}"
        panel.axvline(rate / scale, color=_COLOURS[dtype], linestyle="--", linewidth=1.5, label=label)
    panel.set_xlim(0, 1.05 * largest / scale)
    panel.set_xlabel(f"{unit}: FLOPs of the loss's products ÷ its time")
    panel.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
