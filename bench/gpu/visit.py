"""What a step is given: the device, the file of its findings, its part of the work and the time it has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.gpu.device import Device
from bench.gpu.findings import Findings, brief

__all__ = ["Visit"]

T = TypeVar("T")


@dataclass
class Visit:
    """One process of one step. Processes of a step share its work: of `parts`, this one does part `part`."""

    device: Device
    findings: Findings
    until: float  # of time.monotonic()
    part: int = 0
    parts: int = 1

    @property
    def small(self) -> bool:
        """Whether sizes are to be those of a dry run."""
        return self.device.dry

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def mine(self, work: Sequence[T], at_least: float = 0.0) -> Iterator[T]:
        """What this process does of the work while `at_least` so many seconds are left; then what remains is said."""
        mine = work[self.part :: self.parts]
        for number, one in enumerate(mine):
            if self.seconds_left < at_least:
                self.findings.say("left", count=len(mine) - number, first=str(one))
                return
            yield one

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """The body is a check: it passes, or fails by an error, which is written down and goes no further.

        Unless nothing more can be computed in this process: then it goes on, and the process ends.
        """
        try:
            yield
            self.device.synchronize()
        except Exception as error:
            self.findings.say("check", name=name, ok=False, problem=brief(error))
            if self.device.poisoned(error):
                raise
        else:
            self.findings.say("check", name=name, ok=True)
