"""Which files are generated, and from what."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from bench.harness import machine, store
from bench.report import page, plot, rates, readme

__all__ = ["machines", "write", "write_all"]


def machines() -> list[pathlib.Path]:
    """The folders that hold results."""
    return sorted(path.parent for path in machine.RESULTS.glob("*/results.json"))


def write(folder: pathlib.Path) -> str:
    """Make the report of a folder of results; return its text. The README follows."""
    stored = store.load(folder)
    if not stored.passes:
        raise SystemExit(f"no results in {folder}: run pytest bench/ --benchmark-only first")
    text = page.text(stored)
    (folder / "report.md").write_text(text)
    plot.draw(stored, folder / "speedups.png")
    rates.draw(stored, folder / "rates.png")
    readme.update(machine.ROOT / "README.md")
    return text


def write_all() -> Iterator[str]:
    """Make every machine's; say which."""
    for folder in machines():
        write(folder)
        yield f"{folder.relative_to(machine.ROOT)}: report.md, speedups.png, rates.png"
