"""Head and loss alone, by engine, over the number of ranks: what the second table says, as lines."""

from __future__ import annotations

import pathlib

from bench.scale.tables import HEAD, Setting, head_exchanged

__all__ = ["draw"]

_COLOURS = ("#9a9a9a", "#4c78a8", "#2a9d5c", "#e08214")
_MOST = 4096


def draw(setting: Setting, path: pathlib.Path) -> None:
    """A panel for each student."""
    import matplotlib
    from matplotlib.figure import Figure

    ranks = [setting.group << i for i in range(_MOST.bit_length()) if setting.group << i <= _MOST]
    with matplotlib.rc_context({"svg.hashsalt": "fastkd", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = figure.subplots(1, len(setting.pairs), sharey=True, squeeze=False)[0]
        for panel, (name, _) in zip(panels, setting.pairs, strict=True):
            found = [head_exchanged(setting, name, n, setting.vocabulary) for n in ranks]
            for engine, colour, values in zip(HEAD, _COLOURS, zip(*found, strict=True), strict=True):
                panel.loglog(ranks, [value / 1e9 for value in values], color=colour, label=engine, marker="o", ms=3)
            panel.set_title(f"student {name}", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_xlabel("ranks")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("GB a rank sends in a step")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(HEAD), frameon=False, fontsize=8.5)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
