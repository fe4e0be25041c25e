"""Compile the Triton kernels for GPUs that are not there, and read the machine code.

    with compiled(TARGETS["sm_90"]) as kernels:
        kd_rows(student, teacher, ...)          # CPU tensors: kernels are compiled as for a launch, none is run
    resources(kernels[0])                       # registers, spills
    loops(kernels[0])                           # what the loops over global memory load and execute

`python -m tests.triton_offline` prints, for forward KL with cross-entropy in bf16, what bounds the kernel on each GPU.
The tools that disassemble NVIDIA code come with Triton.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _StandInDriver:
    """What Triton asks its driver for before it compiles. It caches kernels per device: the target is the device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def stand_in_driver(target: GPUTarget) -> Iterator[None]:
    """Let Triton believe that `target` is the active device."""
    previous = triton_driver._active
    triton_driver.set_active(_StandInDriver(target))
    try:
        yield
    finally:
        triton_driver._active = previous


@contextmanager
def compiled(target: GPUTarget) -> Iterator[list[Any]]:
    """Within: a launch only compiles, for `target`, specialised on its arguments as ever. Yields the kernels."""
    kernels: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(launch(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    JITFunction.run = compile_only
    try:
        with stand_in_driver(target):
            yield kernels
    finally:
        JITFunction.run = launch


# --- reading machine code ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """Per thread; `spills` counts instructions (NVIDIA) or registers and bytes (AMD) that spill to memory.

    AMD's scalar registers spill to lanes of vector registers, which is not counted.
    """

    registers: int
    spills: int


@dataclass(frozen=True)
class Loop:
    """An innermost loop that touches global memory: one thread's work in one iteration."""

    load_bytes: tuple[int, ...]  # of each load instruction
    store_bytes: tuple[int, ...]
    instructions: int
    exponentials: int  # all that the special-function unit executes

    @property
    def bytes(self) -> int:
        return sum(self.load_bytes) + sum(self.store_bytes)


def is_nvidia(kernel: Any) -> bool:
    return bool(kernel.metadata.target.backend == "cuda")


def _nvidia_tool(name: str, *arguments: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _only(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in the tool's output"
    return int(found.group(1))


def resources(kernel: Any) -> Resources:
    if is_nvidia(kernel):
        usage = _nvidia_tool("cuobjdump", "-res-usage", cubin=kernel.asm["cubin"])
        spills = sum(line.startswith(("LDL", "STL")) for line in _opcodes(_instructions(kernel)[0]))
        return Resources(_only(r"REG:(\d+)", usage), spills + _only(r"LOCAL:(\d+)", usage))
    text = kernel.asm["amdgcn"]
    spills = _only(r"\.vgpr_spill_count:\s*(\d+)", text)
    spills += _only(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return Resources(_only(r"\.vgpr_count:\s*(\d+)", text), spills)


@functools.cache
def _instructions(kernel: Any) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the index of the instruction each label stands before."""
    if is_nvidia(kernel):
        text = _nvidia_tool("nvdisasm", "-c", cubin=kernel.asm["cubin"])
        label, instruction = r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);"
    else:
        text = kernel.asm["amdgcn"]
        label, instruction = r"(\.LBB\d+_\d+):", r"\s+([a-z]\w+(?: .*)?)$"
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found.group(1)] = len(instructions)
        elif found := re.match(instruction, line):
            instructions.append(found.group(1).strip())
    return instructions, labels


def _opcodes(instructions: list[str]) -> list[str]:
    return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in instructions]


def loops(kernel: Any) -> list[Loop]:
    """The innermost loops that touch global memory, in program order."""
    instructions, labels = _instructions(kernel)
    spans = []
    for index, text in enumerate(instructions):
        if re.search(r"\bBRA\b|^s_c?branch", text):
            start = labels.get(re.findall(r"\.L\w+", text)[-1], index) if ".L" in text else index
            if start < index - 1:  # jumping back; a jump to itself is the trap behind the last EXIT
                spans.append((start, index + 1))
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    found = [_loop(_opcodes(instructions[start:stop])) for start, stop in inner]
    return [loop for loop in found if loop.bytes]


def loads(kernel: Any) -> tuple[int, ...]:
    """Bytes of every load from global memory, in loops or not."""
    return _load_bytes(_opcodes(_instructions(kernel)[0]))


def _load_bytes(opcodes: list[str]) -> tuple[int, ...]:
    return tuple(_width(code) for code in opcodes if re.match(r"LDG\b|(global|buffer)_load", code))


def _loop(opcodes: list[str]) -> Loop:
    return Loop(
        load_bytes=_load_bytes(opcodes),
        store_bytes=tuple(_width(code) for code in opcodes if re.match(r"STG\b|(global|buffer)_store", code)),
        instructions=len(opcodes),
        exponentials=sum(bool(re.match(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_", code)) for code in opcodes),
    )


def _width(opcode: str) -> int:
    """Bytes a memory instruction moves per thread."""
    if found := re.search(r"dword(?:x(\d))?", opcode):
        return 4 * int(found.group(1) or 1)
    if found := re.search(r"\.(128|64)\b|(?:\.[US]|_[us]?)(short|byte|16|8)\b", re.sub(r"LTC\d+B", "", opcode)):
        return {"128": 16, "64": 8, "short": 2, "16": 2, "byte": 1, "8": 1}[found.group(1) or found.group(2)]
    return 4


# --- what bounds a streaming kernel -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Published rates: multiprocessors, GHz, DRAM GB/s; per multiprocessor and clock, instructions of one thread and
    special functions.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    issue: int = 128
    special: int = 16


DEVICES = {
    "sm_80": Device("A100 80 GB", 108, 1.41, 2039),
    "sm_90": Device("H100 SXM", 132, 1.755, 3350),
    "sm_100": Device("B200", 148, 1.85, 8000),
    "gfx942": Device("MI300X", 304, 2.1, 5300, issue=64, special=16),
}


@dataclass(frozen=True)
class Bound:
    """Times of a whole kernel relative to DRAM at full bandwidth: above 1, that pipe is the limit and not memory."""

    bytes_per_logit: float
    issue: float
    special: float


def bound(kernel: Any, device: Device, element_bytes: int) -> Bound:
    """From the loops' instructions, every load counted as DRAM traffic (a sweep that hits the cache needs less)."""
    moved = issue = special = 0.0
    for loop in loops(kernel):
        if not loop.load_bytes:  # zeros for rows without a loss and for padding
            continue
        logits = sum(loop.load_bytes) / element_bytes / 2  # of each model
        moved += loop.bytes / logits
        issue += loop.instructions / logits
        special += loop.exponentials / logits
    memory_time = moved / device.bandwidth
    rate = device.processors * device.clock
    return Bound(moved, issue / (rate * device.issue) / memory_time, special / (rate * device.special) / memory_time)


def main() -> None:
    import fastkd
    from fastkd.kernels.gpu import kd_rows
    from tests import cases

    print("forward KL (T = 2) and cross-entropy, bf16, gradient written; time relative to DRAM time at full bandwidth")
    columns = "GPU            target       V  registers  spills  load B  bytes/logit  issue  exp"
    print(columns)
    for vocab in (128256, 50257):
        student = torch.empty(2, vocab, dtype=torch.bfloat16)
        scale = torch.ones(2)
        for name, target in TARGETS.items():
            with compiled(target) as kernels:
                kd_rows(
                    student,
                    torch.empty_like(student),
                    cases.labels(2, vocab),
                    scale,
                    scale,
                    cases.spec(fastkd.ForwardKL(), vocab),
                    torch.empty_like(student),
                )
            (kernel,) = kernels
            used, limits = resources(kernel), bound(kernel, DEVICES[name], 2)
            width = min(min(loop.load_bytes) for loop in loops(kernel) if loop.load_bytes)
            print(
                f"{DEVICES[name].name:14} {name:7} {vocab:6} {used.registers:10} {used.spills:7} {width:7} "
                f"{limits.bytes_per_logit:12.1f} {limits.issue:6.2f} {limits.special:4.2f}"
            )


if __name__ == "__main__":
    main()
