"""fastkd: fused knowledge-distillation losses for language models."""

import importlib
from typing import Any

from fastkd import divergences
from fastkd.backend import backends, use_backend
from fastkd.divergences import *  # noqa: F403  the parameters of each
from fastkd.losses import KDLoss, KDParts, kd_loss
from fastkd.projection.estimate import plan
from fastkd.projection.models import project
from fastkd.projection.plan import Plan
from fastkd.sources import Projection, SparseTargets
from fastkd.statistics import RowStatistics, log_softmax, row_statistics
from fastkd.terms.memory import feature_memory

__version__ = "0.1.0"

__all__ = [
    "KDLoss",
    "KDParts",
    "Plan",
    "Projection",
    "RowStatistics",
    "SparseTargets",
    "backends",
    "kd_loss",
    "log_softmax",
    "plan",
    "project",
    "row_statistics",
    "use_backend",
]
__all__ += divergences.__all__
__all__ += ["feature_memory"]


def __getattr__(name: str) -> Any:
    """`fastkd.cache`, which needs numpy and safetensors, terms and teachers: imported when they are first asked for."""
    if name in ("cache", "terms", "teachers"):
        return importlib.import_module(f"fastkd.{name}")
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
