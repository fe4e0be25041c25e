"""How many tokens count, where the host knows it: a loss from hidden states on a GPU then leaves the others out.

A GPU knows which tokens are masked, and telling the host how many would make that wait. Labels that are still on the
CPU can be counted there; else the caller says the number, which the device compares with its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import arguments

__all__ = ["Mask", "checked", "counted_on_host", "moved"]


class Mask(NamedTuple):
    """What says which tokens count: those with none of these, before a shift, are all that a loss has."""

    labels: Tensor | None  # None too where masked tokens count in the soft term
    weights: Tensor | None
    ignore_index: int
    shift: bool

    @property
    def on_host(self) -> Mask:
        """What of it is on the CPU."""
        labels, weights = (x if x is not None and x.device.type == "cpu" else None for x in (self.labels, self.weights))
        return self._replace(labels=labels, weights=weights)

    def moved(self, device: torch.device) -> Mask:
        """The same on a device."""
        return self._replace(labels=moved(self.labels, device), weights=moved(self.weights, device))

    def counted(self, shape: torch.Size) -> Tensor | int:
        """Tokens that count, of all: a tensor where values say it."""
        found = [x != idle for x, idle in ((self.labels, self.ignore_index), (self.weights, 0)) if x is not None]
        if not found:
            return shape.numel() if not self.shift else shape[:-1].numel() * max(shape[-1] - 1, 0)
        both = found[0] if len(found) == 1 else found[0] & found[1]
        return (both[..., 1:] if self.shift else both).sum()


def counted_on_host(mask: Mask, device: torch.device, shape: torch.Size) -> int | None:
    """At most so many tokens count in a loss on `device`, by what of the mask is on the CPU; None where nothing is."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return None
    host = mask.on_host
    if host.labels is None and host.weights is None:
        return None
    return int(host.counted(shape))


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on `device`. The host does not wait: pages that can be swapped would be copied at once, so are locked.

    Raises RuntimeError while a CUDA graph is captured, whose replays would not see other values.
    """
    if tensor is None or tensor.device == device:
        return tensor
    if device.type == "cuda" and not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "labels and weights on the CPU cannot be part of a CUDA graph: move them to the GPU first (and pass "
                "live=, so that masked tokens are still left out)"
            )
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def checked(live: int, mask: Mask, shape: torch.Size, soft_scale: Tensor, hard_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The two scales; NaN, and with them loss and gradients, where `live` is not the number of tokens that count.

    Raises ValueError instead where values are looked at: on the CPU, or with FASTKD_DEBUG=1.
    """
    host = mask.on_host
    whole = all(a is b for a, b in zip(host, mask, strict=True)) and not torch.compiler.is_compiling()
    count = mask.counted(shape) if whole else mask.moved(soft_scale.device).counted(shape)
    if isinstance(count, int) or arguments.is_checked(count):
        if int(count) != live:
            raise ValueError(
                f"live={live}, but {int(count)} tokens count: those that are not ignore_index and have no weight of 0, "
                "after the shift if there is one, or all where the soft term is not masked"
            )
        return soft_scale, hard_scale
    right = count == live
    poisoned = torch.where(right, soft_scale, math.nan)
    return poisoned, poisoned if hard_scale is soft_scale else torch.where(right, hard_scale, math.nan)
