"""One that takes part in a race: ready to be run, checked and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["FRESH", "IN_PLACE", "TEMPERATURE", "Contender"]

#: fastkd as it comes, which writes a new gradient, and with the gradient written over the student's logits. Names of
#: fastkd's own contenders begin with "fastkd".
FRESH, IN_PLACE = "fastkd", "fastkd in place"
TEMPERATURE = 2.0  # of every race


def _nothing() -> None:
    pass


@dataclass
class Contender:
    """`run` is timed. `prepare`, before each run, is not: it drops gradients, refills overwritten logits."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], None] = _nothing
    #: What a run returned → its error against float64; raises AssertionError where that is too large.
    verify: Callable[[object], float | None] = field(default=lambda _: None)
    #: Whether it is compiled, itself or inside, and therefore warms up at the very shape it is measured at.
    compiles: bool = False
