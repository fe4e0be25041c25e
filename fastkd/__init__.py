"""fastkd: fused knowledge-distillation losses for language models."""

import importlib
from typing import TYPE_CHECKING, Any

from fastkd import divergences
from fastkd.backend import backends, use_backend
from fastkd.divergences import *  # noqa: F403  the parameters of each
from fastkd.losses import KDLoss, KDParts, kd_loss
from fastkd.mixture import Mixture
from fastkd.projection.estimate import plan
from fastkd.projection.models import project
from fastkd.projection.plan import Plan
from fastkd.sequences import count_items, next_token_labels, next_token_weights
from fastkd.sources import Projection, SparseTargets, VocabShard
from fastkd.statistics import RowStatistics, log_softmax, row_statistics

if TYPE_CHECKING:
    from fastkd.terms.memory import feature_memory
    from fastkd.terms.multi_token import MultiTokenHeads, MultiTokenTerm

__version__ = "0.1.0"

__all__ = [
    "KDLoss",
    "KDParts",
    "Plan",
    "Projection",
    "RowStatistics",
    "SparseTargets",
    "VocabShard",
    "backends",
    "kd_loss",
    "log_softmax",
    "plan",
    "project",
    "row_statistics",
    "use_backend",
]
__all__ += divergences.__all__
__all__ += ["Mixture"]
__all__ += ["count_items", "next_token_labels", "next_token_weights"]
__all__ += ["feature_memory"]
__all__ += ["MultiTokenHeads", "MultiTokenTerm"]

#: Name → the module it is in, imported when it is first asked for.
_LAZY = {
    "MultiTokenHeads": "fastkd.terms.multi_token",
    "MultiTokenTerm": "fastkd.terms.multi_token",
    "feature_memory": "fastkd.terms.memory",
}


def __getattr__(name: str) -> Any:
    """`fastkd.cache`, which needs numpy and safetensors, terms, teachers, students: imported when first asked for."""
    if name in ("cache", "terms", "teachers", "students"):
        return importlib.import_module(f"fastkd.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
