"""The README's block of results, between two marks that name the folder of results it is made of."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping

from bench.harness import store
from bench.harness.results import in_order
from bench.harness.store import Stored
from bench.report import compared

__all__ = ["block", "lines", "shown", "update"]

_BEGIN, _END = "<!-- {}: begin, written by python -m bench.report -->", "<!-- {}: end -->"


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
    """Markdown: one table, one picture, and where something else is faster, on other stored machines too."""
    others = {other: store.load(other) for other in sorted(folder.parent.iterdir()) if other != folder}
    found = {other: stored for other, stored in others.items() if stored.passes}
    return "\n".join(lines(folder, store.load(folder), found))


def lines(folder: pathlib.Path, stored: Stored, others: Mapping[pathlib.Path, Stored]) -> Iterator[str]:
    """The block, line by line."""
    yield from compared.table(stored)
    yield f"\n![How many times as long as fastkd each takes]({_path(folder)}/speedups.png)\n"
    days = sorted(each.date[:10] for each in stored.passes)
    when = " to ".join(in_order((days[0], days[-1])))
    yield (
        "Forward and backward of 1024 tokens × a vocabulary of 50257 (the training step: 4096 × 49152), T = 2; hidden "
        "sizes are 256 and 768. A ratio such as 23× is how many times as long as fastkd it took. Each race ran with "
        "torch's default allocator and with huge pages; the table shows the smaller ratio. – means not measured. "
        f"Measured on {compared.machine_of(stored)}, torch {stored.passes[0].machine['torch']}, {when}."
    )
    said = "; ".join(
        f"on {compared.machine_of(each)} ([report]({_path(place)}/report.md)): {compared.beaten(each.results)}"
        for place, each in {folder: stored, **others}.items()
    )
    yield f"\nWhat is faster than fastkd: {said}."


def _path(folder: pathlib.Path) -> str:
    return f"bench/results/{folder.name}"
