"""Some launches of every kind under compute-sanitizer, where it is there: accesses out of bounds, and races in memory
that the threads of a program share. A dry run makes the same launches without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

import fastkd
from bench.gpu.checkout import ROOT
from bench.gpu.device import Device, here
from bench.gpu.visit import Visit
from fastkd.divergences import TABLE
from tests import cases
from tests.sparse_targets import kept

#: With their options. A call of the driver's that fails, as torch's do on purpose, is no fault of a kernel.
_TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
_FAULT = 9  # exit status where a tool finds something
_VOCABULARIES = (1003, 16400)  # one step's columns and several, with and without whole vectors


def launches(device: Device) -> None:
    """Values and gradients, dense and sparse, in place, and the statistics."""
    for vocab in _VOCABULARIES:
        student, teacher = (x.to(device.kind) for x in cases.logits("far", 3, vocab, torch.bfloat16))
        labels = cases.labels(3, vocab).to(device.kind)
        for name in TABLE:
            leaf = student.clone().requires_grad_()
            fastkd.kd_loss(leaf, teacher, labels, divergence=name).backward()
        leaf = student.clone().requires_grad_()
        fastkd.kd_loss(leaf, teacher, labels, inplace=True).backward()
        leaf = student.clone().requires_grad_()
        fastkd.kd_loss(leaf, kept(teacher.cpu(), 8).to(device.kind), labels).backward()
        fastkd.row_statistics(student, labels)
        fastkd.log_softmax(leaf, 2.0).sum().backward()
    device.synchronize()


def run(visit: Visit) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if visit.small:
        with visit.check("sanitize: the launches alone"):
            launches(visit.device)
        return
    if not os.path.exists(tool):
        visit.findings.say("left", count=len(_TOOLS), first="compute-sanitizer, which is not there")
        return
    launches(visit.device)  # so that kernels are compiled without a tool
    for name in visit.mine(list(_TOOLS), at_least=10):
        command = [tool, "--tool", name, *_TOOLS[name], "--error-exitcode", str(_FAULT), sys.executable, "-m", __name__]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=visit.seconds_left,
                check=False,
                # Its allocator hands out parts of one block: an access beyond a part would not be seen.
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        except subprocess.TimeoutExpired:
            visit.findings.say("left", count=1, first=f"{name}, which takes longer")
            continue
        with visit.check(f"sanitize: {name}"):
            assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-1500:]}"


if __name__ == "__main__":
    launches(here())
