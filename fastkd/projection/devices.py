"""What the planner knows of a GPU: how much memory it has free, and how fast it is."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

__all__ = ["GPUS", "Gpu", "free_bytes", "gpu_of"]


class Gpu(NamedTuple):
    """Rates that large operations reach, and the memory."""

    flops_16: float  # per second, of products of 16-bit operands with fp32 sums
    flops_32: float  # the same of fp32 operands, without TF32
    bytes: float  # per second, read and written by a copy
    memory: int


#: By what their names contain. The 16-bit products and the copies of H100 and H200 were measured by others. All else is
#: the published peak of dense arithmetic times 0.8 and of memory times 0.9, which is what those two reach of theirs.
GPUS = {
    "A100": Gpu(0.8 * 312e12, 0.8 * 19.5e12, 0.9 * 2.04e12, 80 * 10**9),
    "H100": Gpu(798e12, 0.8 * 67e12, 3.0e12, 80 * 10**9),
    "H200": Gpu(790e12, 0.8 * 67e12, 4.3e12, 141 * 10**9),
    "B200": Gpu(0.8 * 2250e12, 0.8 * 75e12, 0.9 * 8.0e12, 180 * 10**9),
    "MI300X": Gpu(0.8 * 1307e12, 0.8 * 163e12, 0.9 * 5.3e12, 192 * 10**9),
}
#: Slower cards of the same names.
_OTHERS = ("PCIe", "NVL", "40GB")


def gpu_of(device: torch.device) -> Gpu | None:
    """Of this machine; None where there is no such device or its rates are not known."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    if any(other in name for other in _OTHERS):
        return None
    return next((gpu for kind, gpu in GPUS.items() if re.search(rf"\b{kind}\b", name)), None)


#: What each device answered last.
_answers: dict[torch.device, int] = {}


def free_bytes(device: torch.device) -> int | None:
    """Memory that tensors on `device` could still take: what the driver has, and what torch's allocator keeps for them.

    What graphs have reserved counts as free, though only they can take it. None where the device cannot be asked.
    Asking does not wait for it. While a graph is captured the driver is left alone, and the last answer counts, so that
    what is captured is what ran before.
    """
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info") or not module.is_available():
        return None
    capturing = getattr(module, "is_current_stream_capturing", None)  # older versions of torch capture on CUDA alone
    if capturing is not None and capturing():
        return _answers.get(device)
    try:
        free, _ = module.mem_get_info(device)
        found = module.memory_stats_as_nested_dict(device)
        kept = found["reserved_bytes"]["all"]["current"] - found["allocated_bytes"]["all"]["current"] if found else 0
    except RuntimeError:  # a driver or an allocator that does not tell
        return None
    _answers[device] = int(free + kept)
    return _answers[device]
