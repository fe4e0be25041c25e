"""A visit to the CPU within a test, whose findings are kept in memory."""

from __future__ import annotations

from typing import Any

from bench.gpu.device import Cpu
from bench.gpu.visit import Visit


class Said:
    """Findings that are kept."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def say(self, kind: str, **facts: Any) -> None:
        self.said.append((kind, facts))


def visiting(until: float = float("inf"), parts: int = 1) -> Any:
    return Visit(Cpu(), Said(), until, 0, parts)  # type: ignore[arg-type]
