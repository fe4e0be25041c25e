"""The one way everything is timed: contenders take turns, A B C A B C …, so that a slow spell hits all of
them.

pytest-benchmark times the first contender, in its pedantic mode; the others run in the set-up of each of
its rounds and leave their times in `extra_info`, from which `report.py` makes tables. Freeing what a run
leaves behind (its gradient) is timed for nobody; what it frees on the way is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import QUESTIONS, Case
from bench.contenders import Contender

__all__ = ["describe", "race"]

_FEWEST, _MOST, _SECONDS = 5, 25, 6.0  # rounds of a full run: as many as fit the seconds, within limits
_FEWEST_SLOW, _SLOW_SECONDS = 3, 20.0  # where one turn of all contenders takes longer than this
_QUICK_ROUNDS = 3


def describe(benchmark: BenchmarkFixture, case: Case) -> None:
    """Label a result for the report."""
    benchmark.group = case.question
    benchmark.extra_info.update(question=case.question, case=str(case), bars=[vars(bar) for bar in case.bars])
    benchmark.extra_info[QUESTIONS[case.question].measure] = case.work


def race(benchmark: BenchmarkFixture, contenders: Sequence[Contender], case: Case, *, quick: bool) -> None:
    """Check every contender, then time them in turn. The first is pytest-benchmark's own subject."""
    ours, *others = contenders
    describe(benchmark, case)
    benchmark.extra_info["errors"] = {contender.name: _checked(contender) for contender in contenders}
    times: dict[str, list[float]] = {contender.name: [] for contender in others}

    def take_turns() -> None:
        for contender in others:
            contender.prepare()
            start = time.perf_counter()
            kept = contender.run()
            times[contender.name].append(time.perf_counter() - start)
            del kept
        ours.prepare()

    def run_ours() -> None:
        ours.run()

    gc.collect()
    start = time.perf_counter()
    take_turns()
    run_ours()
    turn = time.perf_counter() - start
    for warm_up in times.values():
        warm_up.clear()
    fewest = _FEWEST if turn <= _SLOW_SECONDS else _FEWEST_SLOW
    rounds = _QUICK_ROUNDS if quick else min(max(int(_SECONDS / turn), fewest), _MOST)
    benchmark.pedantic(run_ours, setup=take_turns, rounds=rounds)
    ours.prepare()
    benchmark.extra_info["times"] = {"ours": ours.name, "others": times}


def _checked(contender: Contender) -> float | None:
    contender.prepare()
    error = contender.verify(contender.run())
    contender.prepare()
    return error
