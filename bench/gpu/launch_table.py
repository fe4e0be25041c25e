"""Every shape of a step that the kernels can be launched with, tried: which row of the launch table is fastest where?

What is swept are the fields of `launch.Block` that are a choice, and the registers that a thread may have. All kernels
are compiled before, side by side (`compile_table`), which takes much longer than to run them.

A finding of kind `table` holds a case, its least bytes, `as_is` (seconds as the launch table is) and `tried`: (setting,
seconds), the fastest first.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.device import Device
from bench.gpu.visit import Visit
from bench.harness.contender import TEMPERATURE
from fastkd.divergences import resolve
from fastkd.kernels.gpu import dense, kd_rows, walks
from fastkd.kernels.gpu.launch import Block
from fastkd.rows import RowSpec

__all__ = ["Case", "Setting", "arguments", "cases", "run", "settings", "shaped"]

_THREADS, _VECTORS, _STAGES = (128, 256, 512, 1024), (1, 2, 4), (1, 2, 3)
_WIDEST = 2048  # vectors of a step: wider ones spill
_REGISTERS, _MOST_REGISTERS = 65536, 255  # of a multiprocessor, of a thread
_ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """A row of the launch table."""

    threads: int
    vectors: int
    registers: int  # that a thread may have
    stages: int | None = None  # of asynchronous copies; None where kernels have no choice

    def __str__(self) -> str:
        stages = "" if self.stages is None else f", {self.stages} stages"
        return f"{self.threads} threads × {self.vectors} vectors, {self.registers} registers{stages}"


def settings() -> list[Setting]:
    """One row to a multiprocessor and, where stages are no choice, also two: each caps the registers of a thread."""
    staged = any(field.name == "stages" for field in fields(Block))
    choices = itertools.product(_THREADS, _VECTORS, (1,) if staged else (1, 2), _STAGES if staged else (None,))
    found = (
        Setting(threads, vectors, min(_MOST_REGISTERS, _REGISTERS // (threads * rows)), stages)
        for threads, vectors, rows, stages in choices
        if threads * vectors <= _WIDEST
    )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Case:
    divergence: str
    rows: int
    vocab: int
    dtype: torch.dtype
    gradient: torch.dtype

    def __str__(self) -> str:
        return f"{self.divergence} {self.rows}x{self.vocab} {str(self.dtype)[6:]} → {str(self.gradient)[6:]}"

    @property
    def least_bytes(self) -> int:
        return self.rows * self.vocab * (2 * self.dtype.itemsize + self.gradient.itemsize)


_BF16, _FP32 = torch.bfloat16, torch.float32


def cases(small: bool) -> tuple[Case, ...]:
    if small:
        return (Case("forward_kl", 4, 1000, _BF16, _BF16),)
    return (
        Case("forward_kl", 4096, 128256, _BF16, _BF16),
        Case("forward_kl", 4096, 50257, _BF16, _BF16),
        Case("forward_kl", 1024, 128256, _FP32, _BF16),  # a chunk of a loss from hidden states
        Case("jsd", 4096, 128256, _BF16, _BF16),
        Case("forward_kl", 2048, 128256, _FP32, _FP32),
    )


@contextlib.contextmanager
def shaped(setting: Setting | None) -> Iterator[None]:
    """Within: kernels are launched so, whatever the launch table says. None: as it says."""
    if setting is None:
        yield
        return
    block_for, launch_options = walks.block_for, dense.launch_options
    changes: dict[str, Any] = {"threads": setting.threads, "vectors": setting.vectors}
    if setting.stages is not None:
        changes["stages"] = setting.stages

    def shape(*given: Any, **named: Any) -> Block:
        return replace(block_for(*given, **named), **changes)

    def options(block: Block) -> dict[str, Any]:
        found = launch_options(block)
        return found | {"maxnreg": setting.registers} if "maxnreg" in found else found

    with mock.patch.object(walks, "block_for", shape), mock.patch.object(dense, "launch_options", options):
        yield


class Arguments(NamedTuple):
    """Of the loss kernel alone, without what stands around it in a call: those of `Backend.kd_rows`."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    soft_scale: Tensor
    hard_scale: Tensor
    spec: RowSpec
    grad: Tensor


def arguments(device: Device, case: Case, rows: int) -> Arguments:
    student, teacher = (device.normal(rows, case.vocab, dtype=case.dtype, scale=3) for _ in range(2))
    scale = torch.ones(rows, dtype=torch.float32, device=device.kind)
    grad = torch.empty(rows, case.vocab, dtype=case.gradient, device=device.kind)
    divergence = resolve(case.divergence)
    spec = RowSpec(divergence.name, divergence.parameters, TEMPERATURE, TEMPERATURE, 2.0, 0.5, case.vocab)
    return Arguments(student, teacher, device.labels(rows, case.vocab), scale, scale, spec, grad)


def _tried(visit: Visit) -> list[Setting | None]:
    return [None, *(settings()[:1] if visit.small else settings())]


def compile_all(visit: Visit) -> None:
    """By launching each on few rows. What is compiled depends on whether their number is a multiple of 16."""
    work = list(itertools.product(cases(visit.small), _tried(visit)))
    with visit.device.kernels():
        for case, setting in visit.mine(work):
            try:
                with shaped(setting):
                    kd_rows(*arguments(visit.device, case, 16))
            except Exception as error:  # too many registers, say: it is tried again where it is timed
                if visit.device.poisoned(error):
                    raise


def run(visit: Visit) -> None:
    with visit.device.kernels():
        for case in visit.mine(cases(visit.small), at_least=0 if visit.small else 5):
            given = arguments(visit.device, case, case.rows)
            found: dict[Setting | None, float] = {}
            for setting in visit.mine(_tried(visit), at_least=1):
                try:
                    with shaped(setting):
                        kd_rows(*given)
                        times = [visit.device.seconds(lambda a=given: kd_rows(*a)) for _ in range(_ROUNDS)]
                except Exception as error:
                    visit.findings.error(f"launch table, {case}, {setting}", error)
                    if visit.device.poisoned(error):
                        raise
                else:
                    found[setting] = statistics.median(times)
            as_is = found.pop(None, None)
            tried = sorted(((str(setting), seconds) for setting, seconds in found.items()), key=lambda pair: pair[1])
            visit.findings.say("table", case=str(case), least_bytes=case.least_bytes, as_is=as_is, tried=tried)
            del given
            visit.device.release()
