"""What bounds a kernel that streams rows: DRAM, the issue of instructions, or special functions. An estimate.

The first sweep over a row reads it from DRAM. Of what is then in flight, which is all rows that are between their first
and their last sweep, the last-level cache keeps as much as it has room for. Sweeps turn round at the end of a row, so a
later sweep finds that share of its row there, and reads the rest from DRAM again. Every instruction of a loop counts
once, branched over or not. What a program does once per row is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    #: MB of the last-level cache that hold different data. Half of what is published: the L2 of the NVIDIA GPUs has two
    #: halves, and what both need is in both. For the Infinity Cache it is a guess.
    cache: float
    issue: int = 128
    special: int = 16


#: The GPUs of `offline.TARGETS`.
DEVICES = {
    "sm_80": Device("A100 80 GB", 108, 1.41, 2039, 20),
    "sm_90": Device("H100 SXM", 132, 1.755, 3350, 25),
    "sm_100": Device("B200", 148, 1.85, 8000, 63),
    "gfx942": Device("MI300X", 304, 2.1, 5300, 128, issue=64, special=16),
}


@dataclass(frozen=True)
class Estimate:
    """`issue` and `special` are times relative to DRAM's: above 1, that unit is the limit and not memory."""

    bytes_per_logit: float  # that are asked for
    dram_bytes: float  # per logit, that reach DRAM
    issue: float
    special: float
    nanoseconds: float  # per logit, by whichever takes longest

    @property
    def bound(self) -> str:
        longest = max(1.0, self.issue, self.special)
        return "DRAM" if longest == 1 else "issue" if longest == self.issue else "exp"

    def milliseconds(self, logits: int) -> float:
        return self.nanoseconds * logits * 1e-6


def estimate(
    sweeps: Sequence[Sweep], device: Device, columns: int, rows_at_once: float, inner_iterations: float = 0.0
) -> Estimate:
    """From a kernel's sweeps over rows of so many columns, of which so many are in flight on a multiprocessor.

    `inner_iterations`: of a loop within a sweep, by all threads together, per logit.
    """
    asked = instructions = specials = 0.0
    for sweep in sweeps:
        asked += sweep.bytes / sweep.columns
        instructions += sweep.instructions / sweep.columns + sweep.inner_instructions * inner_iterations
        specials += sweep.exponentials / sweep.columns
    once = sum(sweeps[0].load_bytes) / sweeps[0].columns
    in_flight = device.processors * rows_at_once * columns * once
    kept = min(1.0, device.cache * 1e6 / in_flight) if in_flight else 1.0
    again = sum(sum(sweep.load_bytes) / sweep.columns for sweep in sweeps[1:])
    reached = asked - again * kept
    memory = reached / device.bandwidth
    clocks = device.processors * device.clock
    issue, special = instructions / (clocks * device.issue), specials / (clocks * device.special)
    return Estimate(asked, reached, issue / memory, special / memory, max(memory, issue, special))
