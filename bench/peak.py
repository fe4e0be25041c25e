"""One measurement of peak memory, in a process that does nothing else: run by `bench_memory.py`.

On a GPU the peak is that of torch's allocator. On a CPU it is Linux's high-water mark of resident memory (VmHWM,
reset through /proc/self/clear_refs) less what was resident before the run: the inputs, torch, and whatever a warm-up
left. The warm-up is on a small batch, so that a buffer the contender keeps for large ones counts; only compiled code
has to be made at the real shape. What the warm-up freed is given back to the system first, or a contender could hide
in it. The matrix library's packing buffers, which it makes at its first large product and keeps, are nobody's: bare
products come before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pathlib
import re
import sys
from collections.abc import Callable

import torch

from bench import machine, training
from bench.check import Batch
from bench.contenders import Contender, kd_contender
from bench.names import COMPILING, EAGER_STEP, STEP
from bench.projections import Hidden, products, projection_contender
from fastkd.divergences import resolve

_PROC = pathlib.Path("/proc/self")


def peak_bytes(
    name: str, rows: int, vocab: int, dtype: torch.dtype, divergence: str, hidden: tuple[int, int] | None
) -> int:
    """Of one forward and backward pass of the contender (its forward alone, for the loss-only one)."""

    def contending(rows: int, vocab: int) -> Contender:
        if name in (STEP, EAGER_STEP):
            return training.step(name, rows, vocab)
        if hidden is not None:
            return projection_contender(name, Hidden.random(rows, vocab, hidden, dtype))
        return kd_contender(name, Batch.random(rows, vocab, dtype), resolve(divergence))

    contender = contending(rows, vocab)
    if hidden is not None:
        products(Hidden.random(min(rows, 512), vocab, hidden, torch.float32)).run()
    warm_up = contender if name in COMPILING else contending(128, 1024)
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


if __name__ == "__main__":
    if machine.DEVICE.type == "cuda":
        torch.set_default_device(machine.DEVICE)
    elif not (_PROC / "clear_refs").exists():
        raise SystemExit("peak memory is measured through /proc/self/clear_refs, which this system lacks")
    name, rows, vocab, dtype, divergence, hidden = json.loads(sys.argv[1])
    print(peak_bytes(name, rows, vocab, getattr(torch, dtype), divergence, hidden and tuple(hidden)))
