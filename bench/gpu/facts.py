"""What is visited: device, versions, ways to walk a row; and whether one loss runs at all.

A finding of kind `facts` holds the machine as `bench.harness.machine.facts` tells it, the walks, the folder that its
results belong to and the commit. One of kind `first` says that a loss ran, and how long it took to compile.
"""

from __future__ import annotations

import datetime
import subprocess
import time
from typing import Any

import torch

import fastkd
from bench.gpu import walks
from bench.gpu.checkout import ROOT
from bench.gpu.visit import Visit
from bench.harness import machine


def _said(*command: str) -> str:
    """What a command prints, or nothing where there is none."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _card(visit: Visit) -> dict[str, Any]:
    if visit.small:
        return {}
    card = torch.cuda.get_device_properties(0)
    found = {"multiprocessors": card.multi_processor_count, "memory_gb": round(card.total_memory / 1e9, 1)}
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    return found | {"driver, clocks, power": _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")}


def run(visit: Visit) -> None:
    visit.findings.say(
        "facts",
        machine=machine.facts() | _card(visit),
        walks=(walks.DEFAULT,) if visit.small else walks.available(),  # the CPU's kernels have one
        folder=machine.results().name,
        commit=_said("git", "rev-parse", "HEAD") or "unknown",
        changed=bool(_said("git", "status", "--porcelain", "--untracked-files=no")),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat()[:16],
    )
    for dtype in (torch.bfloat16, torch.float32):
        begin = time.monotonic()
        student = visit.device.normal(8, 5003, dtype=dtype, scale=3).requires_grad_()
        loss = fastkd.kd_loss(student, visit.device.normal(8, 5003, dtype=dtype), visit.device.labels(8, 5003))
        loss.backward()
        visit.findings.say("first", dtype=str(dtype)[6:], loss=loss.item(), seconds=time.monotonic() - begin)
