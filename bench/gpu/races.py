"""Contenders in turn, timed on the device; what came of it is a finding that `bench.harness.store` can keep.

A finding of kind `race` holds the question, the case and what `extra_info` of `bench.harness.race` holds: seconds of
every run (`times`) or a value each (`values`), errors, bars, least work. Of kind `failed`: a contender that is wrong or
does not run; the others' race goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from bench.gpu import walks
from bench.gpu.raced import Turn
from bench.gpu.visit import Visit
from bench.harness.contender import FRESH, Contender
from bench.harness.question import Case

__all__ = ["race", "values", "walked"]

_FEWEST, _MOST = 3, 9  # rounds


def walked(contender: Contender) -> Contender:
    """Under the name that it has where rows are walked as here: fastkd's own have the walk's after theirs."""
    walk = walks.here()
    if walk == walks.DEFAULT or not contender.name.startswith(FRESH):
        return contender
    return replace(contender, name=f"{contender.name} {walk}")


def race(visit: Visit, contenders: Iterable[Contender], turn: Turn, refresh: Callable[[], object]) -> None:
    """Check every contender, then time them in turn, on inputs that `refresh` draws anew, while there is time."""
    case = turn.case
    errors: dict[str, float | None] = {}
    ready = []
    for contender in map(walked, contenders):
        if contender.compiles and not turn.compiling:
            continue
        try:
            contender.prepare()
            errors[contender.name] = contender.verify(contender.run())
            contender.prepare()
            visit.device.synchronize()
        except Exception as error:
            _failed(visit, case, contender.name, error)
            contender.prepare()
        else:
            ready.append(contender)
        visit.device.release()
    until = time.monotonic() + visit.seconds_left / 2
    times: dict[str, list[float]] = {contender.name: [] for contender in ready}
    for number in range(_FEWEST if visit.small else _MOST):
        if number >= _FEWEST and time.monotonic() > until:
            break
        refresh()
        for contender in list(ready):
            contender.prepare()
            try:
                times[contender.name].append(visit.device.seconds(contender.run))
            except Exception as error:  # out of memory, say, beside the others
                _failed(visit, case, contender.name, error)
                ready.remove(contender)
                del times[contender.name]
            contender.prepare()
    _say(visit, case, times=times, errors={name: errors[name] for name in times})


def values(visit: Visit, case: Case, contenders: Mapping[str, Callable[[], float]]) -> None:
    """What is not a time: a value of each contender, in the unit of the question."""
    found = {}
    for name, value in contenders.items():
        try:
            found[name] = value()
        except Exception as error:
            _failed(visit, case, name, error)
        visit.device.release()
    _say(visit, case, values=found)


def _say(visit: Visit, case: Case, **measured: object) -> None:
    question = case.question
    visit.findings.say(
        "race",
        question=question.name,
        case=str(case),
        unit=question.unit,
        work=case.work,
        bars=[vars(bar) for bar in case.bars],
        **measured,
    )


def _failed(visit: Visit, case: Case, contender: str, error: Exception) -> None:
    visit.findings.error(f"{case.question.name}, {case}, {contender}", error)
    visit.findings.say("failed", question=case.question.name, case=str(case), contender=contender)
    if visit.device.poisoned(error):
        raise error
