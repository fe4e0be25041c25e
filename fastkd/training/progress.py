"""How far long work is: a bar where someone watches a terminal, lines where the output is kept in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress", "watched"]

_SHARE, _SECONDS = 0.1, 60.0  # of the work, or of time, from one line to the next
_LARGE = 100_000  # units, of which a bar shows thousands


def watched() -> bool:
    """Whether stderr, where progress is shown, is a terminal."""
    return sys.stderr.isatty()


class Progress:
    """Shows on stderr how much of `total` units of work is done, from `initial` on.

    On a terminal it is a bar of tqdm. Elsewhere it is a line when values are shown first, after every tenth of the work
    or minute, and at the end: a file has no carriage returns, and stays short.
    """

    def __init__(self, name: str, total: int, unit: str, initial: int = 0) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = self._initial = initial
        self._values: dict[str, str] = {}
        self._bar: tqdm | None = None
        if watched():
            self._bar = tqdm(
                total=total, initial=initial, desc=name, unit=unit, unit_scale=total >= _LARGE, dynamic_ncols=True
            )
        self._started = time.perf_counter()
        self._line: tuple[int, float] | None = None  # what was done, and when, at the last line

    def update(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """`done` units are done, those before `initial` counted; `values` are shown until there are others."""
        self._done = done
        self._values |= values or {}
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if values:
                self._bar.set_postfix(self._values)
        elif self._is_due():
            self._print()

    def skip(self, done: int) -> None:
        """Units found done already: they take part in no rate."""
        self._initial = done
        if self._bar is not None:
            self._bar.initial = done

    def close(self) -> None:
        """The work has ended."""
        if self._bar is not None:
            self._bar.close()
        elif self._line is None or self._line[0] != self._done:
            self._print()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _is_due(self) -> bool:
        if self._line is None:
            return bool(self._values)
        done, at = self._line
        return self._done - done >= _SHARE * self._total or time.perf_counter() - at >= _SECONDS

    def _print(self) -> None:
        now = time.perf_counter()
        self._line, taken = (self._done, now), now - self._started
        parts = [f"{self._done:,} of {self._total:,} {self._unit}s ({self._done / max(self._total, 1):.0%})"]
        parts += [f"{name}={value}" for name, value in self._values.items()]
        parts.append(f"{taken:,.0f} s")
        if self._done > self._initial:
            left = (self._total - self._done) * taken / (self._done - self._initial)
            parts.append(f"{left:,.0f} s left")
        print(f"{self._name}: {', '.join(parts)}", file=sys.stderr, flush=True)
