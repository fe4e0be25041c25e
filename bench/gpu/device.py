"""The GPU that is visited, and its twin on the CPU, with which a dry run executes the same code.

What differs between the two is here and nowhere else: clocks, synchronisation, graphs, streams, memory.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import machine, peak
from bench.harness.contender import Contender

__all__ = ["Cpu", "Cuda", "Device", "here"]

_MIB = 2**20
_FLUSHED = 512 * _MIB  # more than any L2 cache holds
_BUSY = 4e-3  # seconds that the stream is kept busy before a measurement: what launching may take
_CYCLES = 1.8e9  # a second, roughly


class Device:
    """What both have."""

    dry = True
    kind = "cpu"

    def __init__(self) -> None:
        self.generator = machine.generator()

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Random numbers of this standard deviation."""
        out = torch.empty(shape, dtype=dtype, device=self.kind)
        return out.normal_(0, scale, generator=self.generator)

    def labels(self, rows: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (rows,), generator=self.generator, dtype=torch.int64, device=self.kind)

    def synchronize(self) -> None:
        """Wait for what was launched."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run on the device, launching not included."""
        raise NotImplementedError

    def peak_mib(self, contender: Contender) -> float:
        """The most memory of one run beyond what is there before it."""
        return peak.peak_bytes(contender, contender) / _MIB

    def no_synchronisation(self) -> contextlib.AbstractContextManager[None]:
        """Within: an operation that makes the host wait for the device raises."""
        return contextlib.nullcontext()

    def replayed(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What a step gives when it was captured into a graph, and the graph is replayed twice."""
        return step()

    def elsewhere(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What a step gives on a stream of its own that is late."""
        return step()

    def disturbed(self) -> contextlib.AbstractContextManager[None]:
        """Within: other work shares the device, so that programs are scheduled otherwise than before."""
        return contextlib.nullcontext()

    def kernels(self) -> contextlib.AbstractContextManager[object]:
        """Within: Triton's kernels can be launched on the device's tensors."""
        return contextlib.nullcontext()

    def rows_that_fit(self, rows: int, bytes_per_row: int) -> int:
        """So many rows, or half as many until their bytes fit."""
        return rows

    def poisoned(self, error: BaseException) -> bool:
        """Whether nothing can be computed in this process any more."""
        return False

    def release(self) -> None:
        """Give back memory that nobody holds."""


class Cpu(Device):
    """The twin: everything is done when it returns, so graphs, streams and synchronisation are nothing."""

    def seconds(self, run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        kept = run()
        seconds = time.perf_counter() - begin
        del kept
        return seconds

    def kernels(self) -> contextlib.AbstractContextManager[object]:
        """They are only compiled, for a GPU that is not there."""
        from tools.machine_code import offline  # which needs Triton

        return offline.compiled(offline.TARGETS["sm_90"])


class Cuda(Device):
    """A CUDA or ROCm device."""

    dry = False
    kind = "cuda"

    def __init__(self) -> None:
        super().__init__()
        self._other = torch.zeros(_FLUSHED // 4, dtype=torch.int32, device=self.kind)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.sum()  # read and not written: lines that must be written back would delay what is measured
        torch.cuda._sleep(int(_BUSY * _CYCLES))
        start.record()
        kept = run()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def replayed(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at the first call is not to be captured
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            for tensor in captured:
                tensor.zero_()  # or a replay that does nothing would pass
            graph.replay()
        torch.cuda.synchronize()
        return tuple(tensor.clone() for tensor in captured)

    def elsewhere(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(_BUSY * _CYCLES))
            found = step()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor in found:
            tensor.record_stream(torch.cuda.current_stream())
        return found

    @contextlib.contextmanager
    def disturbed(self) -> Iterator[None]:
        stream, square = torch.cuda.Stream(), torch.zeros(4096, 4096, dtype=torch.bfloat16, device=self.kind)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(300):
                torch.mm(square, square)
        yield
        stream.synchronize()

    def rows_that_fit(self, rows: int, bytes_per_row: int) -> int:
        free, _ = torch.cuda.mem_get_info()
        while rows > 1 and rows * bytes_per_row > 0.9 * free:
            rows //= 2
        return rows

    def poisoned(self, error: BaseException) -> bool:
        if any(name in str(error) for name in ("CUDA error", "HIP error", "Triton Error")):
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def here() -> Device:
    """CUDA_VISIBLE_DEVICES= hides a GPU."""
    return Cuda() if machine.DEVICE.type == "cuda" else Cpu()
