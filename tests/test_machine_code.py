"""What reads machine code finds the loops of a program, and loads that go past the registers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastkd.divergences import TABLE
from fastkd.kernels.gpu import launch, walks
from tools.machine_code import static
from tools.machine_code.loops import Jump, loops
from tools.machine_code.offline import TARGETS, compiled, resources, sweeps


def test_loops_of_a_program() -> None:
    """A loop of three with one of a single instruction in it, and a jump that leaves."""
    jumps = {3: Jump(3, always=False), 4: Jump(2, always=False), 6: Jump(None, always=True)}
    assert loops(7, jumps) == [{2, 3, 4}, {3}]


def test_a_step_behind_the_code_makes_no_loop() -> None:
    """Compilers move rare steps there, which jump back into what has no loop."""
    jumps = {1: Jump(5, always=False), 4: Jump(None, always=True), 6: Jump(2, always=True)}
    assert loops(7, jumps) == []


def test_a_step_of_a_loop_may_stand_behind_the_code() -> None:
    jumps = {1: Jump(5, always=False), 3: Jump(0, always=False), 4: Jump(None, always=True), 6: Jump(2, always=True)}
    assert loops(7, jumps) == [{0, 1, 2, 3, 5, 6}]


def _staged(monkeypatch: pytest.MonkeyPatch, stages: int) -> None:
    original = launch.block_for

    def block_for(*arguments: Any, **options: Any) -> launch.Block:
        return replace(original(*arguments, **options), stages=stages)

    monkeypatch.setattr(walks, "block_for", block_for)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_copies_ahead_are_read_as_loads(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes in as wide pieces as without, into shared memory that holds a step, within the registers."""
    case = static.kd("forward_kl")
    found = []
    for stages in (1, 2, 3):
        _staged(monkeypatch, stages)
        with compiled(TARGETS[target]) as kernels:
            case.launch(50257)
        found.append((sweeps(kernels[0]), resources(kernels[0])))
    for (here, used), stages in zip(found, (1, 2, 3), strict=True):
        assert [sweep.copies for sweep in here] == ([0, 0] if stages == 1 else [4, 4])
        for sweep, plain in zip(here, found[0][0], strict=True):
            assert (sweep.columns, sweep.load_bytes) == (plain.columns, plain.load_bytes) == (16, (16,) * 4)
        assert used.spills == 0
        if stages > 1:
            assert used.shared == (stages - 1) * 512 * 4 * 16  # what each of 512 threads loads in a step


@pytest.mark.parametrize(
    ("target", "stages"),
    [("sm_80", {1}), ("sm_90", {1}), ("sm_100", {1, 2}), ("gfx942", {1})],
)
def test_copies_ahead_where_plain_loads_are_too_few(target: str, stages: set[int]) -> None:
    """By the launch table: on a B200, for what its memory limits."""
    found = set()
    for name, row in TABLE.items():
        if target != "sm_100" and name not in ("forward_kl", "jsd"):  # there no row of the table says anything else
            continue
        with compiled(TARGETS[target]) as kernels:
            static.kd(name).launch(128256)
        copied = {sweep.copies > 0 for sweep in sweeps(kernels[0])}
        assert copied == {target == "sm_100" and not row.normalised}
        found.add(2 if copied == {True} else 1)
    assert found == stages


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_no_logit_is_copied_after_its_gradient_was_written(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place the last sweep waits for a step's copies before it writes there, and copies only what comes after."""
    _staged(monkeypatch, 2)
    case = static.kd("forward_kl")
    with compiled(TARGETS[target]) as kernels:
        case.launch(128256)
    (loop,) = (
        body
        for text in kernels[0].asm["ttgir"].split("scf.for")[1:]
        if "tt.store" in (body := text.partition("scf.yield")[0]) and "ttg.local_load" in body
    )
    order = [loop.index(name) for name in ("ttg.async_wait", "ttg.local_load", "tt.store")]
    assert order == sorted(order)
    assert loop.count("ttg.async_wait") == 1
    copies = loop.count("async_copy_global_to_local")
    assert copies == loop.count("ttg.local_load") == 2  # student and teacher, of one step each
