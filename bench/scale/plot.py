"""Head and loss alone, by engine, over the vocabulary: where the lines cross, a spread vocabulary begins to pay."""

from __future__ import annotations

import pathlib

import matplotlib
from matplotlib.figure import Figure

from bench.scale.tables import HEAD, Setting, head_exchanged

__all__ = ["draw"]

_COLOURS = ("#9a9a9a", "#4c78a8", "#2a9d5c", "#e08214")
_VOCABULARIES = [1 << power for power in range(14, 20)]


def draw(setting: Setting, path: pathlib.Path) -> None:
    """A panel for each student, of the largest number of ranks."""
    ranks = max(setting.ranks)
    with matplotlib.rc_context({"svg.hashsalt": "fastkd", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = figure.subplots(1, len(setting.pairs), sharey=True, squeeze=False)[0]
        for panel, (name, _) in zip(panels, setting.pairs, strict=True):
            found = [head_exchanged(setting, name, ranks, vocab) for vocab in _VOCABULARIES]
            for engine, colour, values in zip(HEAD, _COLOURS, zip(*found, strict=True), strict=True):
                panel.loglog(
                    _VOCABULARIES, [each / 1e9 for each in values], color=colour, label=engine, marker="o", ms=3
                )
            panel.set_title(f"student {name}, {ranks:,} ranks", fontsize=10)
            panel.set_xticks(_VOCABULARIES, [f"{vocab >> 10}k" for vocab in _VOCABULARIES])
            panel.minorticks_off()
            panel.set_xlabel("vocabulary")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("GB a rank sends in a step")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(HEAD), frameon=False, fontsize=8.5)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
