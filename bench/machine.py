"""What a result depends on besides the code: processor, threads, versions, allocator."""

from __future__ import annotations

import os
import pathlib
import platform
import re

import torch

import fastkd

__all__ = ["HUGE_PAGES", "ROOT", "allocator", "facts", "results"]

ROOT = pathlib.Path(__file__).parent.parent
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's own variable; read once, when it first allocates


def allocator() -> str:
    """`default` or `huge_pages`: how torch's tensors are allocated in this process."""
    return "huge_pages" if os.environ.get(HUGE_PAGES) == "1" else "default"


def cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, str | int]:
    """For the machine line of the report."""
    huge_pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    policy = re.search(r"\[(\w+)\]", huge_pages.read_text()) if huge_pages.exists() else None
    return {
        "cpu": cpu(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "fastkd": fastkd.__version__,
        "backend": fastkd.backends()["cpu"].detail,
        "allocator": allocator(),
        "transparent_huge_pages": policy[1] if policy else "unknown",
    }


def results() -> pathlib.Path:
    """Where this machine's results are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", cpu().lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}-{_cores()}-cores"
