"""`speedups.png` and `scaling.png` of a folder of results; nothing where matplotlib is not installed."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

from bench.measured import Result, by_case, in_order, slower_allocator

__all__ = ["draw"]

_MARKERS = "osD^vPX*<>h"
#: What a panel of the scaling plot varies, its axis, and what the others are held at.
_PANELS = (
    ("scaling_logits", "rows", "tokens (V = 50257)", {"vocab": 50257}),
    ("scaling_logits", "vocab", "vocabulary (256 tokens)", {"rows": 256}),
    ("scaling_hidden", "rows", "tokens (V = 50257, H = 256)", {"vocab": 50257, "hidden": 256}),
    ("scaling_hidden", "vocab", "vocabulary (256 tokens, H = 256)", {"rows": 256, "hidden": 256}),
    ("scaling_hidden", "hidden", "hidden size (256 tokens, V = 50257)", {"rows": 256, "vocab": 50257}),
)


def draw(results: list[Result], folder: pathlib.Path) -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return
    _speedups([result for result in results if result.headline], folder / "speedups.png")
    _scaling([result for result in results if result.question.startswith("scaling")], folder / "scaling.png")


def _speedups(results: list[Result], path: pathlib.Path) -> None:
    """How many times as fast as each rival, under the allocator that is less kind to fastkd."""
    from matplotlib.figure import Figure

    points = [
        (f"{group[0].question}: {case}", slower_allocator(group))
        for question in in_order(result.question for result in results)
        for case, group in by_case(result for result in results if result.question == question).items()
    ]
    rivals = in_order(rival for _, ratios in points for rival in ratios)
    if not rivals:
        return
    figure = Figure(figsize=(9, 1.6 + 0.27 * len(points)), layout="constrained")
    panel = figure.subplots()
    for number, rival in enumerate(rivals):
        places = [place for place, (_, ratios) in enumerate(points) if rival in ratios]
        panel.scatter(
            [points[place][1][rival] for place in places],
            places,
            color=f"C{number % 10}",
            marker=_MARKERS[number % len(_MARKERS)],
            label=rival,
        )
    panel.axvline(1, color="black", linewidth=1)
    panel.set(xscale="log", xlabel="fastkd is so many times as fast as … (left of 1: slower)")
    _plain_numbers(panel.xaxis)
    panel.set_yticks(range(len(points)), [label for label, _ in points])
    panel.invert_yaxis()
    panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def _scaling(results: list[Result], path: pathlib.Path) -> None:
    """Time per logit, which a straight line in either size leaves level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    if not results:
        return
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, (question, axis, label, held) in zip(panels, _PANELS, strict=False):
        mine = [result for result in results if result.question == question and "thread" not in result.case]
        mine = [result for result in mine if held.items() <= result.shape.items()]
        _per_logit(panel, mine, axis)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="ns per logit")
        sizes = sorted({result.shape[axis] or 0 for result in mine})
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.xaxis.set_minor_formatter(NullFormatter())
        _plain_numbers(panel.yaxis)
        panel.grid(alpha=0.3, which="both")
        panel.legend(title={"scaling_logits": "from logits", "scaling_hidden": "from hidden states"}[question])
    figure.axes[-1].set_axis_off()
    figure.savefig(path, dpi=110)


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 … along a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")


def _per_logit(panel: Any, results: Iterable[Result], axis: str) -> None:
    results = sorted(results, key=lambda result: result.shape[axis] or 0)
    for name in in_order(name for result in results for name in result.values):
        points = [
            (result.shape[axis], 1e6 * result.values[name] / (result.shape["rows"] * result.shape["vocab"]))
            for result in results
        ]
        panel.plot(*zip(*points, strict=True), marker="o", label=name)
