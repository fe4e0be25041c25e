"""What a teacher is to a training: where its predictions of a batch come from, and what of it changes between steps.

In a loop of one's own, whatever the mode is:

    kd = KDTerm(fastkd.KDLoss(temperature=2.0))
    for step, (inputs, labels) in enumerate(batches, 1):
        teacher = mode.outputs(student, inputs)
        learner, batch = outputs_of(student, inputs), Batch(labels, inputs)
        loss = kd(learner, teacher, batch)["loss"] + sum(mode.loss(learner, batch).values())
        loss.backward()
        optimizer.step()  # of [*student.parameters(), *mode.trained]
        optimizer.zero_grad()
        mode.stepped(student, step)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.divergences import Divergence
from fastkd.served import refusal
from fastkd.terms import Batch, Need, Outputs

__all__ = ["NOTHING", "TeacherMode", "check_models", "detached", "mapped", "unwrapped"]

#: What a batch brings for the teacher where it brings nothing.
NOTHING: Mapping[str, Any] = MappingProxyType({})


class TeacherMode(nn.Module):
    """One row of the table of teachers. A mode defines `outputs`, and what else of the following it needs.

    A training calls `check`, `check_loss` and `begin` before its first step; for each batch `follow`, `outputs` once
    and then `loss` once; after each optimizer step `stepped`; at checkpoints `kept` and, to resume, `restore`; at the
    end `save`.
    """

    #: Keys of a batch that are for the mode and not for models.
    columns: tuple[str, ...] = ()
    #: Peak learning rate of `trained`; None: the student's. The schedule is the student's.
    learning_rate: float | None = None
    #: The model whose outputs terms read, or one like it; None where no single model teaches.
    model: nn.Module | None = None
    #: What its predictions are, in the table `fastkd.served.SERVES`; None: logits, which serve any loss.
    kind: str | None = None

    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
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

    @property
    def in_step(self) -> list[nn.Module]:
        """Models that stay as they are and that every process runs for every batch: each may hold a part of them."""
        return []

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """Raise ValueError, before the first step, for models that do not fit, and for needs that cannot be served.

        `vocab_size`: how many columns of the vocabulary count, where it is padded to different widths.
        """

    @classmethod
    def check_loss(cls, divergence: Divergence) -> None:
        """Raise ValueError, before the first step, for a divergence that the predictions cannot serve."""
        reason = None if cls.kind is None else refusal(cls.kind, divergence)
        if reason is not None:
            raise ValueError(f"{cls.__name__} cannot serve this loss: {reason}")

    def ready(self, student: nn.Module) -> None:
        """Make what is made of the student, where no batch will come. By default nothing."""

    def begin(self, steps: int, epochs: int) -> None:
        """Raise ValueError, before the first step, for a training too short for the mode.

        `steps`: optimizer steps in all. `epochs`: how many are begun; 1 where the data have no length.
        """

    def follow(self, progress: float) -> None:
        """Set what changes over the training, of which a share in [0, 1] is done."""

    def stepped(self, student: nn.Module, step: int, *, epoch_ended: bool = False) -> None:
        """Follow the student. `step`: how many optimizer steps have been taken, this one included."""

    def kept(self) -> dict[str, Any]:
        """What a checkpoint needs, so that a resumed training is an uninterrupted one, bit for bit.

        Tensors are the mode's own, as those of `state_dict` are: write them, or copy them, before the next step.
        """
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave."""

    def save(self, directory: Path) -> None:
        """Write what a run leaves of the teacher, such as the second student of two. By default nothing."""


def detached(outputs: Outputs) -> Outputs:
    """The same without graph: a teacher's, whose forward is differentiated for its own loss."""
    return Outputs(outputs.projection.detach(), mapped(outputs.fields, Tensor.detach), outputs.model)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of every tensor of a value, in whatever mappings, tuples, lists and dataclasses they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: mapped(one, function) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(mapped(one, function) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: mapped(getattr(value, one.name), function) for one in fields(value)})
    return value


def check_models(student: nn.Module, models: Mapping[str, nn.Module], vocab_size: int | None = None) -> None:
    """Raise ValueError for teachers, by how they are called, that are the student or have another vocabulary."""
    learnt = {id(weight) for weight in student.parameters() if weight.requires_grad}
    ours = _vocabulary(student)
    for name, model in models.items():
        if model is student or any(id(weight) in learnt for weight in model.parameters()):
            raise ValueError(
                f"{name} is the student itself, or shares parameters that it trains: pass a model of its own, such as "
                "copy.deepcopy(student)"
            )
        theirs = _vocabulary(model)
        if ours is None or theirs is None:
            continue
        if vocab_size is None and ours != theirs:
            raise ValueError(
                f"the student has a vocabulary of {ours} and {name} one of {theirs}: they need the same tokenizer; if "
                "one is padded, pass the loss vocab_size=<number of real tokens>"
            )
        if vocab_size is not None and min(ours, theirs) < vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size} must be in both, but the student has a vocabulary of {ours} and {name} one "
                f"of {theirs}"
            )


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the output head; None for models that do not say which it is."""
    found: Any = unwrapped(model)
    head = found.get_output_embeddings() if hasattr(found, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return None if weight is None else int(weight.shape[0])


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model
