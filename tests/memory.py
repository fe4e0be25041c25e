"""Peak memory: a script in a process of its own measures with `peak`, its test reads it with `printed`."""

from __future__ import annotations

import ctypes
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

__all__ = ["held", "peak", "printed"]

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# What differs between machines and is nobody's memory. Some give huge pages unasked, which round everything up to
# 2 MiB: PR_SET_THP_DISABLE. And glibc's heap keeps blocks that it cannot reuse: let each have pages of its own.
_NO_HUGE_PAGES = "import ctypes\nctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"
_NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak(run: Callable[[], object]) -> int:
    """Bytes that `run` holds at once, beside what the process held before and the pages of libraries. Linux only."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("RssAnon")
    kept = run()
    highest = _status("VmHWM") - _status("RssFile") - before
    del kept
    return highest


def held(run: Callable[[], object]) -> int:
    """Bytes that what `run` returns holds once it has returned. Linux only."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    before = _status("RssAnon")
    kept = run()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    after = _status("RssAnon")
    del kept
    return after - before


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def printed(script: str, *arguments: str, huge_pages: bool = False) -> list[float]:
    """The numbers that a script prints. `huge_pages` leaves those it asks for, and those it is given."""
    command = [sys.executable, "-c", script if huge_pages else _NO_HUGE_PAGES + script, *arguments]
    child = subprocess.run(
        command, cwd=_ROOT, env={**os.environ, **_NO_HEAP}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return [float(number) for number in child.stdout.split()]
