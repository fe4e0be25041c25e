"""How a student is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkd.training.options.base import InputError, at_least, check_finite, did_you_mean, option

__all__ = ["METRICS", "EvaluationOptions"]

METRICS = (
    "perplexity",
    "out_of_domain_perplexity",
    "kl",
    "top1_agreement",
    "top5_agreement",
    "probability_correlation",
    "calibration_error",
    "retention",
)


@dataclass(frozen=True)
class EvaluationOptions:
    """How the student is judged. Everything is measured at temperature 1."""

    _argument_group_name: ClassVar[str] = "evaluation"

    metrics: list[str] = option(list(METRICS), "columns of the result table: " + ", ".join(METRICS))
    eval_windows: int = option(
        64,
        "windows to evaluate on, at most, of each kind: validation, held-out, out-of-domain; and of each corpus of a "
        "mixture",
    )
    eval_batch_size: int = option(8, "windows per forward pass of an evaluation", "per_device_eval_batch_size")
    ce_baseline: bool = option(
        False, "also train the same student on the labels alone, for as many steps, to compare with"
    )
    prompts: list[str] = option(
        ["This movie was", "The best thing about the film is", "I would not recommend"],
        "prompts for samples of each model and for the plots of next-token distributions",
    )
    sample_tokens: int = option(50, "new tokens per sample; 0 draws none")
    top_p: float = option(0.5, "samples are drawn from the likeliest tokens of this total probability")

    def __post_init__(self) -> None:
        check_finite(self)
        at_least(self, eval_windows=1, eval_batch_size=1, sample_tokens=0)
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            meant = did_you_mean(unknown[0], METRICS)
            raise InputError(f"metrics has {', '.join(unknown)}; there are {', '.join(METRICS)}{meant}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")
