"""The ways to walk a row that the kernels offer, and the one of this process, which an environment variable chooses.

A walk that a device cannot take is taken as the default one. So every process of a step runs with one walk, and a walk
that hangs costs that process only.
"""

from __future__ import annotations

import importlib
import os

import torch

__all__ = ["DEFAULT", "VARIABLE", "available", "here"]

VARIABLE, DEFAULT = "FASTKD_WALK", "sweeps"


def available() -> tuple[str, ...]:
    """The default one, then the others that the device can take; all where there is no device to ask."""
    known = importlib.import_module("fastkd.kernels.gpu.walks")
    names = known.offered() if torch.cuda.is_available() else known.WALKS
    return (DEFAULT, *(name for name in names if name != DEFAULT))


def here() -> str:
    return os.environ.get(VARIABLE) or DEFAULT
