"""How far `use_backend` reaches: the process, or a block of a thread or task. A backward follows its forward."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.backend import select
from fastkd.kernels import cpu
from fastkd.kernels.cpu import at_once

ROW = torch.ones(1, 3)


def test_overlapping_blocks_in_threads_do_not_disturb_each_other() -> None:
    """A opens, B opens, A closes, B closes: in this order one is left with what the other found."""
    a_open, b_open, a_closed = threading.Event(), threading.Event(), threading.Event()
    seen: dict[str, list[object]] = {"a": [], "b": []}

    def a() -> None:
        with fastkd.use_backend("reference"):
            a_open.set()
            assert b_open.wait(10)
            seen["a"].append(select(ROW))
        seen["a"].append(select(ROW))
        a_closed.set()

    def b() -> None:
        assert a_open.wait(10)
        seen["b"].append(select(ROW))
        with fastkd.use_backend("cpu"):
            b_open.set()
            assert a_closed.wait(10)
            seen["b"].append(select(ROW))
        seen["b"].append(select(ROW))

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(a), pool.submit(b)]:
            future.result()
    assert seen == {"a": [reference, cpu], "b": [cpu, cpu, cpu]}
    assert select(ROW) is cpu


def test_overlapping_blocks_in_tasks_do_not_disturb_each_other() -> None:
    seen: list[object] = []

    async def block(name: str, ticks: int) -> None:
        with fastkd.use_backend(name):
            for _ in range(ticks):
                await asyncio.sleep(0)
                seen.append(select(ROW) is {"reference": reference, "cpu": cpu}[name])

    async def both() -> None:
        await asyncio.gather(block("reference", 2), block("cpu", 4), block("reference", 3))
        seen.append(select(ROW) is cpu)

    asyncio.run(both())
    assert len(seen) == 10
    assert all(seen)
    assert select(ROW) is cpu


def test_many_threads_leave_nothing_behind() -> None:
    fastkd.use_backend("reference")

    def work(i: int) -> bool:
        name, module = (("cpu", cpu), ("reference", reference))[i % 2]
        with fastkd.use_backend(name):
            return select(ROW) is module

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(2000)))
    assert select(ROW) is reference


def test_a_plain_call_holds_in_every_thread_and_a_block_above_it() -> None:
    fastkd.use_backend("reference")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(select, ROW).result() is reference
        with fastkd.use_backend(None):
            assert select(ROW) is cpu
            assert pool.submit(select, ROW).result() is reference
        assert select(ROW) is reference
        fastkd.use_backend(None)
        assert pool.submit(select, ROW).result() is cpu


def test_one_object_may_be_entered_again() -> None:
    block = fastkd.use_backend("reference")
    for _ in range(2):
        with block, fastkd.use_backend("cpu"), block:
            assert select(ROW) is reference
    assert select(ROW) is cpu


def backward_in_a_thread(loss: Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: fastkd.kd_loss(x, x.detach() * 2, soft_weight=1, hard_weight=0, reduction="none").sum(),  # type: ignore[union-attr]
    "log-softmax": lambda x: fastkd.log_softmax(x)[:, 0].sum(),
}


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["none", "log-softmax"])
def test_a_backward_runs_on_the_backend_of_its_forward(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def recorded(of: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            ran.append(of)
            return function(*arguments)

        return record

    for of, module in (("reference", reference), ("cpu", cpu)):
        for function in ("kd_rows", "log_softmax_backward"):
            monkeypatch.setattr(module, function, recorded(of, getattr(module, function)))
    monkeypatch.setattr(at_once, "kd_loss", recorded("cpu", at_once.kd_loss))
    other = "cpu" if name == "reference" else "reference"
    x = torch.randn(4, 30, requires_grad=True)
    with fastkd.use_backend(name):
        loss = LOSSES[kind](x)
    forward = len(ran)
    fastkd.use_backend(other)
    for run in (lambda: loss.backward(retain_graph=True), lambda: backward_in_a_thread(loss)):
        with fastkd.use_backend(other):
            run()
            assert select(ROW) is (reference if other == "reference" else cpu)
    assert len(ran) == forward + 2
    assert set(ran) == {name}
