"""What a teacher is to a training: where its predictions of a batch come from, and what of it changes between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fastkd.terms import Batch, Need, Outputs

__all__ = ["TeacherMode"]


class TeacherMode(nn.Module):
    """One row of the table of teachers. A mode defines `outputs`, and what else of the following it needs.

    A training calls, for each batch, `outputs` once and then `loss` once; after each optimizer step `stepped`; at
    checkpoints `kept` and, to resume, `restore`; at the end `save`.
    """

    #: Keys of a batch that are for the mode and not for models.
    columns: ClassVar[tuple[str, ...]] = ()
    #: Peak learning rate of `trained`; None: the student's. The schedule is the student's.
    learning_rate: float | None = None
    #: The model whose outputs terms read, where there is one that stays the same.
    model: nn.Module | None = None

    def outputs(
        self, student: nn.Module, inputs: Mapping[str, Any], taken: Mapping[str, Any], needs: Sequence[Need] = ()
    ) -> Outputs:
        """What the teacher says of a batch; no gradient flows into it from the student's losses.

        Args:
            student: the model that learns, for modes that run it as its own teacher.
            inputs: keyword arguments of a model's forward: `input_ids [batch, tokens]`, `attention_mask`, ...
            taken: what the batch brings under `columns`.
            needs: what terms need beside the predictions.
        """
        raise NotImplementedError

    def loss(self, student: Outputs, batch: Batch) -> Mapping[str, Tensor]:
        """What the teacher itself learns from this batch: scalars that are added to the loss, by the names they are
        logged as. Called after `outputs` of the same batch. Nothing for teachers that do not learn.
        """
        return {}

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn from `loss`, which get a learning rate of their own."""
        return []

    def check(self, student: nn.Module, needs: Sequence[Need]) -> None:
        """Raise ValueError, before the first step, for models that do not fit, and for needs that cannot be served."""

    def stepped(self, student: nn.Module, step: int, *, epoch_ended: bool = False) -> None:
        """Follow the student. `step`: how many optimizer steps have been taken, this one included."""

    def kept(self) -> dict[str, Any]:
        """What a checkpoint needs, so that a resumed training is an uninterrupted one, bit for bit."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave."""

    def save(self, directory: Path) -> None:
        """Write what a run leaves of the teacher, such as the second student of two. By default nothing."""
