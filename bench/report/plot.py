"""`speedups.png`: the summary as bars. Nothing where matplotlib is not installed."""

from __future__ import annotations

import pathlib
import textwrap

from bench.harness.store import Stored
from bench.report import compared

__all__ = ["draw"]

_COLOURS = {"eager": "#9a9a9a", "torch.compile": "#4c78a8", "best other": "#e08214"}
_HEIGHT = 0.26  # of a bar


def draw(stored: Stored, path: pathlib.Path) -> None:
    """How many times as long as fastkd each rival takes, the smaller of the two ratios where there are two."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = compared.summary(stored)
    if not rows:
        return
    figure = Figure(figsize=(6, 1.2 + 0.52 * len(rows)), layout="constrained")
    panel = figure.subplots()
    named: set[str] = set()
    for place, row in enumerate(rows):
        other = row.other and row.other[1]
        bars = [(name, ratio) for name, ratio in zip(_COLOURS, (row.eager, row.compiled, other), strict=True) if ratio]
        for number, (name, ratio) in enumerate(bars):
            at = place + (number - (len(bars) - 1) / 2) * _HEIGHT
            label = f"_{name}" if name in named else name
            named.add(name)
            panel.barh(at, ratio, _HEIGHT * 0.9, color=_COLOURS[name], label=label)
            said = f" {ratio:.3g}×" + (f" {row.other[0]}" if row.other and name == "best other" else "")
            panel.text(max(ratio, 1.0), at, said, va="center", fontsize=8)
    panel.axvline(1, color="black", linewidth=1)
    panel.text(1, -0.62, "fastkd = 1", fontsize=8, ha="center", va="bottom")
    panel.margins(x=0.15)
    panel.set_xlabel("time ÷ fastkd's time")
    panel.set_yticks(range(len(rows)), [textwrap.fill(row.label, 27) for row in rows], fontsize=8.5)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(_COLOURS), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
