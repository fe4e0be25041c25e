"""What a call costs the host, and how many kernels it launches."""

from __future__ import annotations

import torch

import fastkd
from bench import bench_host
from bench.gpu import profiles, races
from bench.gpu.visit import Visit
from bench.harness.check import Batch
from bench.harness.contender import TEMPERATURE


def run(visit: Visit) -> None:
    case = bench_host.FOR_GPUS
    with torch.device(visit.device.kind):
        found = bench_host.microseconds(case)
        races.values(visit, case, {name: lambda value=value: value for name, value in found.items()})
        batch, kd = Batch.random(case.rows, case.vocab, case.dtype), fastkd.KDLoss(TEMPERATURE)
    profiles.profiled(visit, f"one call on {case}", lambda: kd(batch.student, batch.teacher, batch.labels).backward())
