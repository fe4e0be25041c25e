"""The peak memory of one run, in a process that does nothing else.

On a GPU the peak is that of torch's allocator. On a CPU it is Linux's high-water mark of resident memory (VmHWM,
reset through /proc/self/clear_refs) minus what was resident before the run: the inputs, torch, and whatever the
warm-up left. What the warm-up freed is given back to the system first, or a contender could hide in it.
"""

from __future__ import annotations

import ctypes
import gc
import pathlib
import re
from collections.abc import Callable

import torch

from bench.harness import machine
from bench.harness.contender import Contender

__all__ = ["check_system", "peak_bytes"]

_PROC = pathlib.Path("/proc/self")


def check_system() -> None:
    """SystemExit where peaks cannot be measured; otherwise tensors are created on the device from here on."""
    if machine.DEVICE.type == "cuda":
        torch.set_default_device(machine.DEVICE)
    elif not (_PROC / "clear_refs").exists():
        raise SystemExit("peak memory is measured through /proc/self/clear_refs, which this system lacks")


def peak_bytes(contender: Contender, warm_up: Contender) -> int:
    """Of one run of a contender, after one of `warm_up`: the same on a small batch, or itself.

    After a small batch a buffer that the contender keeps for large ones counts; compiled code, which does not count,
    has to be made at the real shape.
    """
    warm_up.prepare()
    warm_up.run()
    warm_up.prepare()
    contender.prepare()
    gc.collect()
    return (_peak_of_device if machine.DEVICE.type == "cuda" else _peak_of_process)(contender.run)


def _peak_of_process(run: Callable[[], object]) -> int:
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    (_PROC / "clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = run()
    after = _resident("VmHWM")
    del kept
    return after - before


def _peak_of_device(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    after = torch.cuda.max_memory_allocated()
    del kept
    return after - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", (_PROC / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024
