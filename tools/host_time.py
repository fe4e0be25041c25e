"""What a loss costs the host, forward and backward, and what it would launch: `python -m tools.host_time`.

The GPU that a call would wait for is not there, and nothing is computed. In the place of the backend stands one that
allocates results only (`stand_in`), so that all time is the library's own, autograd's and the dispatcher's; or the
Triton backend without what launches a compiled kernel (`triton_stand_in`), so that Triton's time on the host is in it
too. What the driver needs per launch, some microseconds, is in neither.
"""

from __future__ import annotations

import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from unittest import mock

import torch
from torch import Tensor

import fastkd
from fastkd import arguments, backend, reference
from fastkd.backend import running_on

__all__ = ["Contender", "launches", "microseconds", "stand_in", "training_step", "triton_stand_in", "unit_of_host_time"]

_NAME = "stand-in"


@contextmanager
def stand_in() -> Iterator[list[str]]:
    """Within: losses on any tensors take the way of those on a GPU, to a backend that computes nothing.

    Yields the names of its functions as they are called: each is one launch of the Triton backend. What they return is
    uninitialised.
    """
    called: list[str] = []

    def kd_rows(student: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        called.append("kd_rows")
        return _rows(student), _rows(student)

    def row_scales(student: Tensor, labels: Tensor | None, *arguments: object) -> tuple[Tensor, Tensor | None]:
        called.append("row_scales")
        shift, mask_soft = arguments[-2:]
        scales = _rows(student, 1 if mask_soft or labels is None else 2)
        return scales, torch.empty_like(labels).view(-1) if labels is not None and shift else None

    def weighted_total(soft: Tensor, *arguments: object) -> Tensor:
        called.append("weighted_total")
        return torch.empty((), dtype=torch.float32, device=soft.device)

    def scale_(grad: Tensor, upstream: Tensor) -> Tensor:
        called.append("scale_")
        return grad

    module = types.ModuleType(_NAME)
    vars(module).update({name: getattr(reference, name) for name in reference.__all__})
    vars(module).update(kd_rows=kd_rows, row_scales=row_scales, weighted_total=weighted_total, scale_=scale_)
    row = backend._Row(_NAME, (), lambda: backend.BackendStatus(True, ""), lambda *_: 0)
    sys.modules[_NAME] = module  # what is imported within must stay, so this dictionary is not put back as it was
    with (
        mock.patch.dict(backend._ROWS, {_NAME: row}),
        mock.patch.object(arguments, "is_checked", _unchecked),
        running_on(_NAME),
    ):
        yield called


@contextmanager
def triton_stand_in() -> Iterator[None]:
    """Within: losses on CPU tensors go through the Triton backend, for an H100, but nothing is launched."""
    from triton.compiler import CompiledKernel

    from tools.machine_code.offline import TARGETS, stand_in_driver

    def no_launch(*_: object) -> None: ...

    with (
        mock.patch.multiple(
            CompiledKernel, _init_handles=no_launch, run=property(lambda _: no_launch), launch_metadata=no_launch
        ),
        mock.patch.object(arguments, "is_checked", _unchecked),
        stand_in_driver(TARGETS["sm_90"]),
        running_on("triton"),
    ):
        yield


def _unchecked(values: Tensor) -> bool:
    """Whether labels are looked at: on a GPU that would synchronise. No mock of its own, which takes 10 µs a call."""
    return False


def _rows(student: Tensor, *several: int) -> Tensor:
    return torch.empty((*several, student.shape[:-1].numel()), dtype=torch.float32, device=student.device)


def training_step(
    shape: tuple[int, ...] = (4, 32), vocab: int = 1000, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], None]:
    """A causal language model's loss and its gradient: labels shifted, some masked, T = 2, the mean of both terms."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, vocab, generator=generator).to(dtype).unbind()
    labels = torch.randint(vocab, shape, generator=generator)
    labels[..., :3] = -100
    student.requires_grad_()
    kd = fastkd.KDLoss(2.0, shift=len(shape) > 1)

    def step() -> None:
        student.grad = None
        kd(student, teacher, labels).backward()

    return step


def unit_of_host_time() -> Callable[[], None]:
    """A fixed amount of work of the same kind, that times on different machines are compared by.

    An `autograd.Function` that does nothing, forward and backward, and ten small operations.
    """
    leaf, numbers = torch.zeros(3, requires_grad=True), torch.ones(128)

    def work() -> None:
        leaf.grad = None
        _Nothing.apply(leaf).backward()  # type: ignore[no-untyped-call]
        for _ in range(10):
            numbers + numbers

    return work


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.new_empty(())

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        return upstream.expand(3)


Contender = tuple[Callable[[], AbstractContextManager[object]], Callable[[], object]]


def microseconds(contenders: dict[str, Contender], rounds: int = 40, calls: int = 25) -> dict[str, float]:
    """Medians of single calls, each within its context. They take turns, so that a slow spell meets them all."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (context, function) in contenders.items():
            with context():
                function()
                for _ in range(calls):
                    start = time.perf_counter()
                    function()
                    taken[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(times) for name, times in taken.items()}


#: Operations that read or make no values: views, allocations, and those that only ask.
_FREE = {
    "alias", "as_strided", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "new_empty",
    "permute", "reshape", "select", "slice", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view", "is_nonzero", "item", "set_data", "to", "contiguous",
}  # fmt: skip


def launches(step: Callable[[], object]) -> list[str]:
    """What a step launches where the backend is the stand-in: its functions, and every ATen operation that computes.

    Of an operation that calls others, only those that call none count: `ones_like` is its `fill_`.
    """
    with stand_in() as called:
        step()  # whatever happens once has happened
        called.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        own = list(called)
    operations = [event for event in profile.events() if event.name.startswith("aten::")]
    inner = [event for event in operations if not any(c.name.startswith("aten::") for c in event.cpu_children)]
    computing = [event.name for event in inner if event.name.removeprefix("aten::") not in _FREE]
    return [*own, *computing]


def main() -> None:
    torch.set_num_threads(1)
    step, small = training_step(), training_step((4,), dtype=torch.float32)
    contenders: dict[str, Contender] = {
        "a stand-in for the backend": (stand_in, step),
        "the CPU backend, 4 rows of 1000 columns": (nullcontext, small),
        "the unit that a test compares with": (nullcontext, unit_of_host_time()),
    }
    if find_spec("triton"):
        contenders["Triton, nothing launched"] = (triton_stand_in, step)
    print("microseconds, forward and backward, median of single calls that take turns:")
    for name, time_taken in microseconds(contenders).items():
        print(f"{time_taken:6.0f}  {name}")
    found = launches(step)
    print(f"{len(found)} launches: {', '.join(found)}")


if __name__ == "__main__":
    main()
