"""The one way everything is timed: contenders take turns, A B C A B C …, so that a slow spell hits all of
them.

What fresh memory costs depends on who used it last: pages that a neighbour has just given back by the gigabyte are
dearer than one's own. So a contender that is done within `_SETTLED_BELOW` runs once unmeasured in each of its turns,
right before it is measured: it meets the memory as it left it itself, as in a training loop. For slower ones the
difference is small, and time short: where a turn of all takes `_SLOW` seconds, the run that is checked is their first
of three rounds, and the only one of a rival that takes more than `_ONCE`: so long a run averages over slow spells.

CPUs are timed by the wall clock, GPUs by events on the stream. pytest-benchmark times the first contender as well, in
its pedantic mode; the times that count are in `extra_info`, for all alike, and the report is made of them.
Freeing what a run leaves behind (its gradient) is timed for nobody; what it frees on the way is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from bench.harness import machine
from bench.harness.contender import Contender
from bench.harness.question import Case

__all__ = ["Benchmark", "measure", "race", "timed"]

_SETTLED_BELOW = 0.5  # seconds
_FEWEST, _MOST, _SECONDS = 5, 25, 3.0  # rounds of a full run: as many as fit the seconds, within limits
_SLOW, _SLOW_ROUNDS = 2.5, 3  # seconds of a turn of all, above which there are so many
_ONCE = 10.0  # seconds of a run
_COMPILING_IS_SMALL = 30.0  # likewise, compiling included


class Benchmark(Protocol):
    """What is used of pytest-benchmark's fixture."""

    group: str | None
    extra_info: dict[str, Any]

    def pedantic(self, target: Callable[..., Any], **options: Any) -> Any: ...


def race(benchmark: Benchmark, contenders: Sequence[Contender], case: Case, *, quick: bool) -> None:
    """Check every contender, then time them in turn. The first is pytest-benchmark's own subject."""
    _describe(benchmark, case)
    warm_up, errors = {}, {}
    for contender in contenders:
        warm_up[contender.name], errors[contender.name] = _checked(contender)
    benchmark.extra_info["errors"] = errors
    gc.collect()
    turn = sum(warm_up.values())
    first = {name for name, seconds in warm_up.items() if turn > _SLOW and seconds > _SETTLED_BELOW}
    times = {name: [seconds] if name in first else [] for name, seconds in warm_up.items()}
    rounds = _rounds(turn, quick)
    ours, *others = contenders

    def settle(contender: Contender) -> None:
        if warm_up[contender.name] < _SETTLED_BELOW:
            timed(contender)
        contender.prepare()

    def take_turns() -> None:
        for contender in others:
            done = times[contender.name]
            if len(done) == rounds or (done and warm_up[contender.name] > _ONCE):
                continue
            settle(contender)
            times[contender.name].append(timed(contender))
            contender.prepare()
        settle(ours)

    left = rounds - len(times[ours.name])
    benchmark.pedantic(lambda: times[ours.name].append(timed(ours)), setup=take_turns, rounds=left)
    ours.prepare()
    benchmark.extra_info["times"] = times


def _rounds(turn: float, quick: bool) -> int:
    """Of so many seconds each."""
    if turn > _SLOW:
        return 2 if quick else _SLOW_ROUNDS
    return _FEWEST if quick else min(max(int(_SECONDS / turn), _FEWEST), _MOST)


def measure(benchmark: Benchmark, case: Case, function: Callable[[], Mapping[str, float]]) -> None:
    """Store what is not a time, a value per contender in the unit of the question."""
    _describe(benchmark, case)
    benchmark.extra_info["values"] = dict(benchmark.pedantic(function, rounds=1))


def _describe(benchmark: Benchmark, case: Case) -> None:
    """Label a result for the report."""
    benchmark.group = case.question.name
    benchmark.extra_info.update(question=case.question.name, case=str(case), unit=case.question.unit)
    benchmark.extra_info.update(work=case.work, bars=[vars(bar) for bar in case.bars])


def _checked(contender: Contender) -> tuple[float, float | None]:
    """Seconds of a run, and the error; of one that compiles, seconds of the run after, unless the first takes long."""
    contender.prepare()
    stop = _clock()
    value = contender.run()
    seconds = stop()
    error = contender.verify(value)
    del value
    contender.prepare()
    if contender.compiles and seconds < _COMPILING_IS_SMALL:
        seconds = timed(contender)
        contender.prepare()
    return seconds, error


def timed(contender: Contender) -> float:
    """Seconds of one run, of a contender that is prepared and is to be prepared again."""
    stop = _clock()
    kept = contender.run()
    seconds = stop()
    del kept
    return seconds


def _clock() -> Callable[[], float]:
    return _gpu_clock() if machine.DEVICE.type == "cuda" else _wall_clock()


def _wall_clock() -> Callable[[], float]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _gpu_clock() -> Callable[[], float]:
    """From here on the stream to there: neither launching ahead nor work queued before counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return stop
