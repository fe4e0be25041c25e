"""Files and results that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["STAGING", "delete", "results", "write_whole"]

STAGING = ".results-"  # begins the name of a directory of results that are not there yet


@contextmanager
def results(directory: Path) -> Iterator[Path]:
    """A directory to write results in: they replace those in `directory` if the block succeeds, else they go away."""
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            target = directory / path.name
            if target.is_dir():
                delete(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a crash: under another name, synced, renamed."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def delete(path: Path) -> None:
    """A file, or a folder and all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
