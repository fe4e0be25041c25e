"""Two thousand random calls (`tests/fuzz.py`), and proof that their judge sees what is wrong."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests import compare, fuzz, fuzz_invalid
from tests.fuzz_random import loss_call

CALLS, PARTS = 2000, 8


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors: waking other threads costs more than they do


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part: int) -> None:
    found = fuzz.failures(7, range(part, CALLS, PARTS))
    assert not found, f"{len(found)} of {CALLS // PARTS} calls failed, the first:\n" + "\n".join(found[:3])


def seen(calls: int, change: float, least: float) -> tuple[int, int]:
    """Of so many calls with a gradient, those in which one wrong element is seen, and their number.

    A random element that is at least `least` of the largest of its tensor is made `change` of itself larger.
    """
    caught = made = index = 0
    while made < calls:
        draw = random.Random(f"sight:{index}")
        index += 1
        call = loss_call(draw)
        touched: list[Tensor] = []

        def falsify(outcome: fuzz.Outcome, draw: random.Random = draw, touched: list[Tensor] = touched) -> None:
            gradients = [x for x in outcome.gradients if (x != 0).any()]
            if gradients:
                gradient = draw.choice(gradients)
                size = gradient.double().abs()
                candidates = ((size > 0) & (size >= least * size.max())).nonzero()
                at = tuple(candidates[draw.randrange(len(candidates))].tolist())
                gradient[at] = gradient[at].double() * (1 + change)
                touched.append(gradient)

        try:
            fuzz.check_loss(call, falsify)
        except AssertionError:
            caught += bool(touched)
        made += bool(touched)
    return caught, made


def test_one_percent_of_one_element_is_seen() -> None:
    caught, made = seen(400, 0.01, least=1e-3)
    assert caught >= 0.9 * made, f"{caught} of {made}"


def test_right_outcomes_are_not_called_wrong() -> None:
    caught, made = seen(100, 0.0, least=0.0)
    assert caught == 0, f"{caught} of {made}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "no error although"),
        (RuntimeError("temperature"), "RuntimeError for a wrong"),
        (ValueError("must be > 0"), "does not name"),
        (fuzz_invalid.Worked(), "work began"),
    ],
    ids=["silence", "another error", "a nameless error", "work"],
)
def test_errors_that_are_not_clear_are_seen(error: Exception | None, message: str) -> None:
    def make() -> None:
        if error is not None:
            raise error

    broken = fuzz_invalid.Broken("it", "temperature", loss_call(random.Random(1)), make=make)
    with pytest.raises(AssertionError, match=message):
        fuzz_invalid.check(broken)


def test_a_failure_says_how_to_run_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise AssertionError("off")

    monkeypatch.setattr(compare, "assert_elements", wrong)
    (failure,) = fuzz.failures(5, [next(i for i in range(100) if random.Random(f"5:{i}").random() > 0.5)])
    assert "off" in failure
    assert "python -m tests.fuzz --seed 5 --only" in failure
    assert "settings" in failure


def test_memory_around_a_tensor_is_watched() -> None:
    room = torch.zeros(10)
    part = room[2:5]
    with pytest.raises(AssertionError, match="memory changed"), fuzz.untouched([part]):
        part += 1
    with pytest.raises(AssertionError, match="memory changed"), fuzz.untouched([part], written=part):
        room[5] += 1
    with fuzz.untouched([part], written=part):
        part += 1
