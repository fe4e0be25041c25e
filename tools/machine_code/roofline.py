"""What bounds a kernel that streams rows: DRAM, the issue of instructions, or special functions. An estimate.

Every load counts as DRAM traffic, though a sweep over a row that is still in the cache needs less. Every instruction of
a loop counts once, branched over or not. What a program does once per row is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tools.machine_code.offline import Sweep

__all__ = ["DEVICES", "Device", "Estimate", "estimate"]


@dataclass(frozen=True)
class Device:
    """Published rates: multiprocessors, GHz, DRAM GB/s; per multiprocessor and clock, instructions of one thread and
    special functions.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    issue: int = 128
    special: int = 16


#: The GPUs of `offline.TARGETS`.
DEVICES = {
    "sm_80": Device("A100 80 GB", 108, 1.41, 2039),
    "sm_90": Device("H100 SXM", 132, 1.755, 3350),
    "sm_100": Device("B200", 148, 1.85, 8000),
    "gfx942": Device("MI300X", 304, 2.1, 5300, issue=64, special=16),
}


@dataclass(frozen=True)
class Estimate:
    """`issue` and `special` are times relative to DRAM's: above 1, that unit is the limit and not memory."""

    bytes_per_logit: float
    issue: float
    special: float
    nanoseconds: float  # per logit, by whichever takes longest

    @property
    def bound(self) -> str:
        longest = max(1.0, self.issue, self.special)
        return "DRAM" if longest == 1 else "issue" if longest == self.issue else "exp"

    def milliseconds(self, logits: int) -> float:
        return self.nanoseconds * logits * 1e-6


def estimate(sweeps: Iterable[Sweep], device: Device, inner_iterations: float = 0.0) -> Estimate:
    """From a kernel's sweeps. `inner_iterations`: of a loop within a sweep, by all threads together, per logit."""
    moved = instructions = specials = 0.0
    for sweep in sweeps:
        moved += sweep.bytes / sweep.columns
        instructions += sweep.instructions / sweep.columns + sweep.inner_instructions * inner_iterations
        specials += sweep.exponentials / sweep.columns
    memory = moved / device.bandwidth
    clocks = device.processors * device.clock
    issue, special = instructions / (clocks * device.issue), specials / (clocks * device.special)
    return Estimate(moved, issue / memory, special / memory, max(memory, issue, special))
