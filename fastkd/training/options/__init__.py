"""What the commands can be asked: one dataclass per concern, whose fields are flags and keys of a YAML file alike.

Only the standard library and fastkd's tables are imported here. Contradictions that need no file and no model to see
are refused when an object is made; `configuration.py` reads the objects from the command line.
"""

from __future__ import annotations

from typing import NamedTuple

from fastkd.training.options.base import (
    InputError,
    Schedule,
    at_home,
    at_least,
    check_finite,
    check_temperatures,
    did_you_mean,
    expand_home,
    option,
)
from fastkd.training.options.data import PACKAGED_DATA, PACKAGED_OUT_OF_DOMAIN, SIZES, DataOptions, check_weights
from fastkd.training.options.distillation import DistillationOptions, check_kept
from fastkd.training.options.evaluation import METRICS, EvaluationOptions
from fastkd.training.options.models import PACKAGED_TEACHER, SMALL_GPT2, TRAINED_TEACHER, ModelOptions
from fastkd.training.options.progressive import ProgressiveOptions
from fastkd.training.options.teaching import (
    TAKES,
    ModeOptions,
    TeachingOptions,
    named_terms,
    set_text,
    set_title,
    term_set,
    unfolded_sets,
)
from fastkd.training.options.training import TrainingOptions

__all__ = [
    "GROUPS",
    "METRICS",
    "PACKAGED_DATA",
    "PACKAGED_OUT_OF_DOMAIN",
    "PACKAGED_TEACHER",
    "SIZES",
    "SMALL_GPT2",
    "TAKES",
    "TRAINED_TEACHER",
    "DataOptions",
    "DistillationOptions",
    "EvaluationOptions",
    "InputError",
    "ModeOptions",
    "ModelOptions",
    "Options",
    "ProgressiveOptions",
    "Schedule",
    "TeachingOptions",
    "TrainingOptions",
    "at_home",
    "at_least",
    "check_finite",
    "check_kept",
    "check_temperatures",
    "check_weights",
    "did_you_mean",
    "expand_home",
    "named_terms",
    "option",
    "set_text",
    "set_title",
    "term_set",
    "unfolded_sets",
]


class Options(NamedTuple):
    """All that `fastkd distill` can be asked."""

    models: ModelOptions
    data: DataOptions
    distillation: DistillationOptions
    training: TrainingOptions
    evaluation: EvaluationOptions
    teaching: TeachingOptions = TeachingOptions()

    @property
    def learns(self) -> bool:
        """Whether the student learns anything from a teacher."""
        return self.distillation.needs_teacher or bool(self.teaching.terms)


GROUPS = (ModelOptions, DataOptions, DistillationOptions, TrainingOptions, EvaluationOptions, TeachingOptions)
