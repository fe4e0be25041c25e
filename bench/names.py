"""What contenders and yardsticks are called, in results and in tables."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ALLOCATORS",
    "ALLOWED",
    "BOTH",
    "BUDGETS",
    "CACHED_STEP",
    "CHUNKED",
    "COMPILING",
    "CROSS_ENTROPY",
    "CROSS_ENTROPY_IN_PLACE",
    "CUT_CE",
    "DISTILLED",
    "EAGER_STEP",
    "FRESH",
    "HARD",
    "IN_PLACE",
    "LABELS_ALONE",
    "LARGE",
    "LIGER",
    "LIGER_TRITON",
    "LINEAR_CE",
    "LINEAR_CE_CHUNKED",
    "LIVE_STEP",
    "LOSS_ONLY",
    "MIB",
    "ONE_GRADIENT",
    "PRODUCTS",
    "RIVALS",
    "ROUNDED_TRUTH",
    "SMALL",
    "SOFT",
    "STEP",
    "TRL",
    "WIDENED",
    "Objective",
    "beyond_gradients",
    "predicted",
]

#: As torch comes, and with huge pages for its tensors.
ALLOCATORS = ("default", "huge_pages")

FRESH, IN_PLACE, LOSS_ONLY = "fastkd", "fastkd in place", "fastkd loss only"
ONE_GRADIENT = "one gradient"
CROSS_ENTROPY, CROSS_ENTROPY_IN_PLACE = "cross-entropy", "cross-entropy in place"
CHUNKED, PRODUCTS, WIDENED = "chunked", "products", "fastkd fp32"
SMALL, LARGE = "fastkd 32 MiB", "fastkd 1 GiB"
LIGER, LIGER_TRITON, TRL = "liger", "liger triton", "trl"
LINEAR_CE, LINEAR_CE_CHUNKED = "linear_cross_entropy", "linear_cross_entropy chunked"  # torch's own, since 2.13
CUT_CE = "cut-cross-entropy"
ROUNDED_TRUTH, ALLOWED = "rounded truth", "2 × eager + 1e-6"
STEP, EAGER_STEP = "fastkd step", "eager step"
DISTILLED, LABELS_ALONE = "distilled", "labels alone"
LIVE_STEP, CACHED_STEP = "fastkd step, live teacher", "fastkd step, cached teacher"
#: What a user would take instead of fastkd; other contenders are fastkd itself, floors and yardsticks.
RIVALS = (
    "eager",
    "eager fp32",
    "compile",
    "compile fp32",
    "torch",
    CHUNKED,
    LIGER,
    LIGER_TRITON,
    TRL,
    LINEAR_CE,
    LINEAR_CE_CHUNKED,
    CUT_CE,
    EAGER_STEP,
)
MIB = 2**20
#: Contenders given hidden states → their `memory_budget`; None is the default one.
BUDGETS: dict[str, int | None] = {FRESH: None, WIDENED: None, SMALL: 32 * MIB, LARGE: 1024 * MIB}
#: Contenders that compile, themselves or inside, and therefore warm up at the very shape they are measured at.
COMPILING = ("compile", "compile fp32", LIGER, CUT_CE)


class Objective(NamedTuple):
    """What is minimised: soft · T² · divergence(teacher, student) + hard · cross-entropy, mean over rows."""

    soft: float
    hard: float


BOTH, SOFT, HARD = Objective(0.5, 0.5), Objective(1, 0), Objective(0, 1)


def beyond_gradients(budget: str) -> str:
    """What a contender with this much working memory may need."""
    return f"gradients + {budget}"


def predicted(contender: str) -> str:
    """What `fastkd.plan` says it will need."""
    return contender.replace(FRESH, "predicted", 1)
