"""The benchmark's own arithmetic: what it says of the numbers it has. (The numbers are nobody's to test.)"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gate, machine, race, readme, report, store
from bench.cases import faster, within
from bench.contenders import Contender
from bench.measured import Result, results_of, slower_allocator, worst_of
from bench.names import ALLOCATORS

_ROOT = Path(__file__).parent.parent
_SHOWN = re.findall(r"<!-- (bench/results/\S+): begin", (_ROOT / "README.md").read_text())


def result(allocator: str = "default", question: str = "logits", **values: float) -> Result:
    bars = (faster("fastkd", "eager", 12), within("fastkd", "add", 2.0))
    shape = {"rows": 2, "vocab": 3, "hidden": None}
    return Result(question, "2x3", allocator, values, bars, 72, {}, shape, 0.0)


@pytest.mark.parametrize("folder", _SHOWN)
def test_readme_and_report_are_what_the_stored_results_say(folder: str) -> None:
    runs = store.load(_ROOT / folder)
    results = results_of(runs)
    assert readme.block(_ROOT / folder, results, runs) in (_ROOT / "README.md").read_text()
    assert "\n".join(report.lines(runs, results)) + "\n" == (_ROOT / folder / "report.md").read_text()


def test_the_readme_shows_a_folder() -> None:
    assert _SHOWN


def test_ratios_are_quoted_from_the_less_kind_allocator() -> None:
    group = [result(fastkd=1.0, eager=20.0, add=1.0), result("huge_pages", fastkd=2.0, eager=30.0, add=1.0)]
    assert slower_allocator(group) == {"eager": 15.0}
    assert worst_of(group, "add") == 2.0


def test_whatever_beats_fastkd_is_named() -> None:
    slow = result("huge_pages", fastkd=2.0, eager=1.0, add=1.0)
    runs: Any = {("logits", name): run() for name in ALLOCATORS}
    said = readme.block(Path("results/here"), [result(fastkd=1.0, eager=20.0, add=1.0), slow], runs)
    assert "- eager: 2.00 times as fast as fastkd on logits, 2x3 (huge_pages)" in said
    assert "- In memory, nothing." in said
    assert "| 2x3 | 1 ms | 0.5× |" in said
    assert "3 of the 4 bars" in said


def run() -> dict[str, Any]:
    return {
        "datetime": "2030-01-01T00:00",
        "machine_info": {"bench": {"cpu": "a", "cores": 2, "torch": "3", "torch_capability": "b"}},
    }


def test_a_missed_bar_is_called_missed() -> None:
    verdicts = list(result(fastkd=1.0, eager=11.0, add=0.6).verdicts())
    assert [verdict.met for verdict in verdicts] == [False, True]


# --- the gate ---------------------------------------------------------------------------------------------------


def ratios(fastkd: float, eager: float, add: float) -> gate.Ratios:
    return gate.ratios_of([result(fastkd=fastkd, eager=eager, add=add)])


def test_the_gate_sees_what_slowed_fastkd_down() -> None:
    assert gate.lost(ratios(1, 20, 1), ratios(1.5, 20, 1)) == {("logits, 2x3", "fastkd"): pytest.approx(1.5)}


@pytest.mark.parametrize(
    "now",
    [
        pytest.param((3, 60, 3), id="a machine three times slower"),
        pytest.param((1, 10, 1), id="a rival twice as fast"),
        pytest.param((1.2, 20, 1), id="noise"),
        pytest.param((0.5, 20, 1), id="progress"),
    ],
)
def test_the_gate_lets_pass(now: tuple[float, float, float]) -> None:
    assert not gate.lost(ratios(1, 20, 1), ratios(*now))


# --- timing on a GPU that is not there --------------------------------------------------------------------------


class _Stream:
    """A clock that moves by what is queued; events note where it is when the queue gets to them."""

    now = 0.0

    def event(self, *, enable_timing: bool) -> _Event:
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_events_are_read_and_not_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Stream()
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stream.now = 5.0
    assert race.timed(Contender("launch", queued(stream, 0.25))) == pytest.approx(0.25)


def queued(stream: _Stream, seconds: float) -> Callable[[], object]:
    def launch() -> None:
        stream.now += seconds

    return launch
