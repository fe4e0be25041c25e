"""Teachers that stay as they are: a frozen model, and predictions that batches bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastkd.teachers.mode import NOTHING, TeacherMode, check_models
from fastkd.terms import Need, Outputs, outputs_of

__all__ = ["Cached", "Frozen", "check_frozen"]


class Frozen(TeacherMode):
    """A model that is not trained.

    Args:
        model: in eval mode, on the student's device, with the student's vocabulary. None of its parameters may require
            a gradient.

    Raises ValueError for a model that is trainable or in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_frozen("the teacher", model)
        # Not a submodule: checkpoints, `.to()` and `.train()` of what holds this mode are not for it.
        self.__dict__["model"] = model

    @property
    def in_step(self) -> list[nn.Module]:
        """The model."""
        return [self.__dict__["model"]]

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """Both models have one vocabulary, and are two."""
        check_models(student, {"the teacher": self.__dict__["model"]}, vocab_size)

    @torch.no_grad()
    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """One forward."""
        return outputs_of(self.__dict__["model"], inputs, needs)


class Cached(TeacherMode):
    """Predictions that batches bring under `"teacher"`, as `fastkd.cache.Collator` puts them there."""

    columns = ("teacher",)

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """A cache has predictions alone."""
        if needs:
            raise ValueError(f"terms need the teacher's {', '.join(needs)}, which no cache has: take a live teacher")

    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """What the batch has, on the device of its `input_ids`. ValueError where it has nothing."""
        if taken.get("teacher") is None:
            raise ValueError("there is no teacher: pass one, or batches with its predictions under 'teacher'")
        device = next(one.device for one in inputs.values() if isinstance(one, torch.Tensor))
        return Outputs(taken["teacher"].to(device))


def check_frozen(name: str, model: nn.Module) -> None:
    """Raise ValueError for a teacher, by how it is called, that is trainable or in training mode."""
    if model.training or any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"{name} must be frozen and in eval mode: model.eval().requires_grad_(False)")
