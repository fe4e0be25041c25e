"""Which kernels a step spends its time in, and what one of them moves.

A finding of kind `profile` holds `operations`: (name, how often, ms), the longest first. One of kind `counters` holds
what Nsight Compute read, where it is there and permitted: `bytes_per_logit` from and to DRAM, `microseconds`.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import fastkd
from bench.gpu.visit import Visit
from bench.harness.contender import TEMPERATURE
from fastkd.divergences import TABLE

__all__ = ["profiled"]

_TOLD = 12  # operations
_METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "launch__registers_per_thread")
_SHAPES = ((4096, 128256), (4096, 50257))
_BYTES_PER_LOGIT = 6.5  # that forward KL may move from and to DRAM; 6 is the least
_LIMIT = 40.0  # seconds of one run of Nsight Compute


def profiled(visit: Visit, what: str, run: Callable[[], object]) -> None:
    """By torch's profiler, after one run that is not."""
    run()
    visit.device.synchronize()
    activities = [ProfilerActivity.CPU] if visit.small else [ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        run()
        visit.device.synchronize()

    def microseconds(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        return float(event.self_cpu_time_total if visit.small else event.self_device_time_total)

    events = sorted(seen.key_averages(), key=microseconds, reverse=True)
    told = [(event.key[:90], event.count, microseconds(event) / 1e3) for event in events if microseconds(event)]
    launches = sum(count for _, count, _ in told)
    visit.findings.say("profile", what=what, launches=launches, operations=told[:_TOLD])


Values = dict[str, tuple[str, str]]  # metric → value and unit


def _launches(output: str) -> list[Values]:
    """Of kernels that are not torch's, whose names are C++."""
    found: dict[str, Values] = {}
    for row in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        if "::" not in row["Kernel Name"]:
            found.setdefault(row["ID"], {})[row["Metric Name"]] = (row["Metric Value"], row["Metric Unit"])
    return list(found.values())


def _bytes(values: Values, metric: str) -> float:
    value, unit = values[metric]
    scales = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    return float(value.replace(",", "")) * scales[unit]


def _counters(visit: Visit, tool: str, rows: int, vocab: int, divergence: str) -> None:
    """The loss kernel, seen by Nsight Compute in a process of its own: the longest launch that is none of torch's."""
    command = [tool, "--clock-control", "none", "--csv", "--metrics", ",".join(_METRICS)]
    command += [sys.executable, "-m", __name__, str(rows), str(vocab), divergence]
    done = subprocess.run(command, capture_output=True, text=True, timeout=min(_LIMIT, visit.seconds_left), check=True)
    launches = _launches(done.stdout)
    values = max(launches, key=lambda values: float(values["gpu__time_duration.sum"][0].replace(",", "")))
    moved = sum(_bytes(values, f"dram__bytes_{way}.sum") for way in ("read", "write"))
    visit.findings.say(
        "counters",
        what=f"{divergence} {rows}x{vocab} bfloat16",
        bytes_per_logit=moved / (rows * vocab),
        at_most=_BYTES_PER_LOGIT,
        values={name: " ".join(pair) for name, pair in values.items()},
    )


def _loss(rows: int, vocab: int, divergence: str, device: str) -> Callable[[], object]:
    student, teacher = (torch.randn(rows, vocab, device=device, dtype=torch.bfloat16) for _ in range(2))
    leaf, kd = student.requires_grad_(), fastkd.KDLoss(TEMPERATURE, divergence=divergence)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    return lambda: torch.autograd.grad(kd(leaf, teacher, labels), leaf)


def run(visit: Visit) -> None:
    shapes = ((4, 1003),) if visit.small else _SHAPES
    for divergence in ("forward_kl", "jsd"):
        assert divergence in TABLE
        for rows, vocab in shapes:
            profiled(visit, f"{divergence} {rows}x{vocab}", _loss(rows, vocab, divergence, visit.device.kind))
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if visit.small or not os.path.exists(tool):
        return
    for rows, vocab in visit.mine(_SHAPES, at_least=10):
        for divergence in ("forward_kl", "jsd"):
            try:
                _counters(visit, tool, rows, vocab, divergence)
            except (subprocess.SubprocessError, KeyError, ValueError) as error:  # often it is not permitted
                visit.findings.say("left", count=1, first=f"{tool}: {type(error).__name__}")
                return


if __name__ == "__main__":
    step = _loss(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], "cuda")
    step()
    torch.cuda.synchronize()
