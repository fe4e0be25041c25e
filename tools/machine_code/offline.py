"""Compile the Triton kernels for GPUs that are not there, and read the machine code.

    with compiled(TARGETS["sm_90"]) as kernels:
        kd_rows(student, teacher, ...)          # CPU tensors: kernels are compiled as for a launch, none is run
    resources(kernels[0])                       # registers, spills
    sweeps(kernels[0])                          # what the loops over a row load, store and execute

The tools that disassemble NVIDIA code come with Triton.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import triton
except ImportError as error:
    raise ImportError("compiling for other GPUs needs Triton: pip install '.[test]' (Linux only)") from error
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from tools.machine_code.loops import Jump, loops

__all__ = [
    "TARGETS",
    "Resources",
    "Sweep",
    "barriers",
    "compiled",
    "loads",
    "resident",
    "resources",
    "stand_in_driver",
    "sweeps",
    "thread_blocks",
    "threads",
]

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
    name = "_active" if hasattr(triton_driver, "_active") else "active"  # before Triton 3.5
    previous = vars(triton_driver)[name]
    triton_driver.set_active(_StandInDriver(target))
    try:
        yield
    finally:
        setattr(triton_driver, name, previous)


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


def thread_blocks(kernel: Any) -> int:
    """Of one program: several in a cluster."""
    return int(kernel.metadata.num_ctas)


def threads(kernel: Any) -> int:
    """Of one program."""
    return int(kernel.metadata.num_warps * kernel.metadata.target.warp_size) * thread_blocks(kernel)


# --- registers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """Registers per thread, bytes of shared memory per program. `spills` counts what goes to memory instead of
    registers: instructions (NVIDIA), or registers and bytes (AMD).

    AMD's scalar registers spill to lanes of vector registers, which is not counted.
    """

    registers: int
    spills: int
    shared: int


def resources(kernel: Any) -> Resources:
    if _is_nvidia(kernel):
        usage = _nvidia_tool("cuobjdump", "-res-usage", cubin=kernel.asm["cubin"])
        spills = sum(line.startswith(("LDL", "STL")) for line in _machine_code(kernel)[0])
        return Resources(_only(r"REG:(\d+)", usage), spills + _only(r"LOCAL:(\d+)", usage), int(kernel.metadata.shared))
    text = kernel.asm["amdgcn"]
    spills = _only(r"\.vgpr_spill_count:\s*(\d+)", text)
    spills += _only(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return Resources(_only(r"\.vgpr_count:\s*(\d+)", text), spills, int(kernel.metadata.shared))


def resident(kernel: Any) -> int:
    """Thread blocks that one multiprocessor holds at a time, by their registers, threads and shared memory."""
    own = threads(kernel) // thread_blocks(kernel)
    registers = resources(kernel).registers
    shared = max(int(kernel.metadata.shared), 1)
    if _is_nvidia(kernel):
        # 64 Ki registers, handed out in eights; 2048 threads; 1 KiB of shared memory belongs to each block.
        return min(65536 // (-(-registers // 8) * 8 * own), 2048 // own, (160 << 10) // (shared + 1024))
    waves = own // int(kernel.metadata.target.warp_size)
    return min(4 * min(512 // (-(-registers // 8) * 8), 8) // waves, (64 << 10) // shared)


def barriers(kernel: Any) -> tuple[int, int]:
    """Instructions that wait for all threads of a thread block, and of a cluster."""
    code = _machine_code(kernel)[0]
    return _count(code, r"BAR\.SYNC|s_barrier"), _count(code, r"UCGABAR_WAIT")


def _is_nvidia(kernel: Any) -> bool:
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


# --- loops over a row -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A loop over the columns of a row: one thread's work in one iteration."""

    columns: int  # steps that the compiler unrolled included
    load_bytes: tuple[int, ...]  # of each load of columns, copies to shared memory that nothing waits for included
    copies: int  # loads that are such copies
    store_bytes: tuple[int, ...]
    instructions: int
    exponentials: int  # all that the special-function unit executes
    inner_instructions: float  # per load of the loop within that loads a row's kept tokens one by one; 0 without one

    @property
    def bytes(self) -> int:
        return sum(self.load_bytes) + sum(self.store_bytes)


def sweeps(kernel: Any) -> list[Sweep]:
    """The loops that load columns, in program order; the whole kernel as one where it has no loop.

    How many columns a thread loads in a step is taken from Triton's intermediate code, where nothing is unrolled yet.
    """
    steps = _steps(kernel)
    code, jumps = _machine_code(kernel)
    found_loops = loops(len(code), jumps)
    least = min(step.load_bytes for step in steps)
    found: list[tuple[frozenset[int], list[str], list[list[str]]]] = []
    for loop in sorted(found_loops or [frozenset(range(len(code)))], key=len):
        within = [other for other in found_loops if other < loop]
        own = [code[index] for index in sorted(loop.difference(*within))]
        nested = [[code[index] for index in sorted(other)] for other in within]
        # A loop around sweeps, over tickets, loads a little too. Its jumps may hide that it has their instructions.
        around = any(min(loop) < min(sweep) and max(sweep) < max(loop) for sweep, *_ in found)
        if sum(_widths(own, _LOAD)) >= least and not around:
            found.append((loop, own, nested))
    found.sort(key=lambda sweep: min(sweep[0]))
    assert len(found) == len(steps), f"{len(found)} loops of machine code load columns, {len(steps)} in the source"
    return [_sweep(own, nested, step) for (_, own, nested), step in zip(found, steps, strict=True)]


@dataclass(frozen=True)
class _Step:
    """One thread's work in one iteration of a loop of the source."""

    columns: int
    load_bytes: int


_LOAD_OF_BLOCK = r"tt\.load|buffer_load|async_copy_global_to_local|buffer_load_to_local"


def _steps(kernel: Any) -> list[_Step]:
    """The outermost loops that load blocks of columns, or else the loads of a kernel without loops."""
    depth = 0
    loops: list[tuple[int, int]] = []  # that are open: the line each begins on and the depth of what is in it
    loaded: dict[int, list[tuple[int, int]]] = {}  # line a loop begins on → (columns, bytes of one) of its loads
    for number, line in enumerate(kernel.asm["ttgir"].splitlines()):
        while loops and depth < loops[-1][1]:
            loops.pop()
        block = re.search(rf"(?:{_LOAD_OF_BLOCK}) .*?tensor<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)", line)
        if block:
            columns = math.prod(map(int, block[1].split("x")[:-1])) // threads(kernel)
            loaded.setdefault(loops[0][0] if loops else -1, []).append((columns, int(block[2]) // 8))
        depth += line.count("{") - line.count("}")
        if "scf.for" in line:
            loops.append((number, depth))
    in_loops = [loads for start, loads in loaded.items() if start >= 0] or list(loaded.values())
    return [_Step(loads[0][0], sum(columns * size for columns, size in loads)) for loads in in_loops]


@functools.cache
def _machine_code(kernel: Any) -> tuple[list[str], dict[int, Jump]]:
    """Instructions in order, without predicates, and which of them jump."""
    if _is_nvidia(kernel):
        text = _nvidia_tool("nvdisasm", "-c", cubin=kernel.asm["cubin"])
        label, instruction = r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?);"
    else:
        text = kernel.asm["amdgcn"]
        label, instruction = r"(\.LBB\d+_\d+):", r"\s+()([a-z]\w+(?: .*)?)$"
    instructions: list[str] = []
    conditional: list[bool] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found.group(1)] = len(instructions)
        elif found := re.match(instruction, line):
            conditional.append(bool(found.group(1)))
            instructions.append(found.group(2).strip())
    jumps = {}
    for index, text in enumerate(instructions):
        if re.match(r"BRA\b|s_c?branch", text) and ".L" in text:
            # "BRA.U UP0, `(.L_x_1)" has its condition among its operands.
            always = not conditional[index] and not re.match(r"BRA.*,|s_cbranch", text)
            jumps[index] = Jump(labels.get(re.findall(r"\.L\w+", text)[-1]), always)
        elif re.match(r"EXIT\b|RET\b|s_endpgm", text) and not conditional[index]:
            jumps[index] = Jump(None, always=True)
    return instructions, jumps


def loads(kernel: Any) -> tuple[int, ...]:
    """Bytes per thread of every load from global memory, in sweeps or not."""
    return _widths(_machine_code(kernel)[0], _LOAD)


_ASYNCHRONOUS = r"LDGSTS\b|(global|buffer)_load\w* .*\blds\b"
_LOAD = r"LDG(STS)?\b|(global|buffer)_load"
_STORE = r"STG\b|(global|buffer)_store"


def _count(code: list[str], kind: str) -> int:
    return sum(bool(re.match(kind, text)) for text in code)


def _widths(code: list[str], kind: str) -> tuple[int, ...]:
    """Bytes that each instruction of a kind moves per thread."""
    return tuple(_width(text.split()[0]) for text in code if re.match(kind, text))


def _width(opcode: str) -> int:
    if found := re.search(r"dword(?:x(\d))?", opcode):
        return 4 * int(found.group(1) or 1)
    if found := re.search(r"\.(128|64)\b|(?:\.[US]|_[us]?)(short|byte|16|8)\b", re.sub(r"LTC\d+B", "", opcode)):
        return {"128": 16, "64": 8, "short": 2, "16": 2, "byte": 1, "8": 1}[found.group(1) or found.group(2)]
    return 4


def _sweep(own: list[str], nested: list[list[str]], step: _Step) -> Sweep:
    loads = sorted(_widths(own, _LOAD), reverse=True)
    # A loop around a loop is not unrolled, but the one within may be, and then leaves some of its loads outside.
    unrolled = 1 if nested else sum(loads) // step.load_bytes
    columns = [width for index, width in enumerate(loads) if sum(loads[:index]) < unrolled * step.load_bytes]
    return Sweep(
        columns=unrolled * step.columns,
        load_bytes=tuple(columns),
        copies=_count(own, _ASYNCHRONOUS),
        store_bytes=_widths(own, _STORE),
        instructions=len(own),
        exponentials=_count(own, r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        inner_instructions=min((len(inner) / _count(inner, rf"{_LOAD}|s_load") for inner in nested), default=0),
    )
