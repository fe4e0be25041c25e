"""What a result depends on besides the code: processor, threads, versions, allocator."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re

import torch

import fastkd

__all__ = [
    "ALLOCATORS",
    "DEVICE",
    "HUGE_PAGES",
    "PEERS",
    "RESULTS",
    "ROOT",
    "allocator",
    "facts",
    "generator",
    "results",
]

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
#: Where everything runs. CUDA_VISIBLE_DEVICES= hides a GPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Packages whose versions matter.
PEERS = ("triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")
#: As torch comes, and with huge pages for its tensors.
ALLOCATORS = ("default", "huge_pages")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's own variable; read once, when it first allocates


def allocator() -> str:
    """How torch's tensors are allocated in this process: one of `ALLOCATORS`."""
    return ALLOCATORS[os.environ.get(HUGE_PAGES) == "1"]


def generator(seed: int = 0) -> torch.Generator:
    """On the device, as all random inputs are."""
    return torch.Generator(DEVICE).manual_seed(seed)


def processor() -> str:
    """What computes: the GPU, or the CPU."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else _cpu()


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, str | int]:
    """For the machine line of the report."""
    huge_pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    policy = re.search(r"\[(\w+)\]", huge_pages.read_text()) if huge_pages.exists() else None
    gpu = {"gpu": processor(), "cuda": str(torch.version.cuda)} if DEVICE.type == "cuda" else {}
    return {
        **gpu,
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fastkd": fastkd.__version__,
        "backend": fastkd.backends()["triton" if gpu else "cpu"].detail,
        "allocator": allocator(),
        "transparent_huge_pages": policy[1] if policy else "unknown",
        **{name: version for name in PEERS if (version := _version(name)) is not None},
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def results() -> pathlib.Path:
    """The folder of this machine's results. A virtual machine may not name its CPU: its vectors tell more."""
    name = processor()
    if DEVICE.type == "cpu":
        name += f" {_cores()} cores {torch.backends.cpu.get_cpu_capability()}"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
