"""What a run was made on and with: the processor, the device and the versions, for its record."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import fastkd

__all__ = ["made_on", "peak_memory", "resident"]


def made_on(device: torch.device) -> dict[str, Any]:
    """What metrics.json says: `device`; `machine`, whose `device` is the accelerator's name; `versions` of packages."""
    packages = {module.__name__: module.__version__ for module in (fastkd, torch, transformers)}
    return {
        "device": str(device),
        "machine": _machine(device),
        "versions": {"python": platform.python_version(), **packages},
    }


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Bytes that this process has held at most: `process` of the machine's memory, `device` of the accelerator's.

    None where it cannot be known, and where there is no accelerator.
    """
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"process": _status("VmHWM"), "device": on_device}


def resident() -> int | None:
    """Bytes of the machine's memory that this process holds now; None where the system does not tell."""
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """What Linux says of this process, in bytes. Not `getrusage`, whose peak is inherited from the parent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _machine(device: torch.device) -> dict[str, Any]:
    """Cores are those that this process may use; threads are torch's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    """The processor's name as Linux tells it; elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
