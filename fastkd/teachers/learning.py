"""Teachers that learn beside the student: one that knows more, and a second student.

Each model runs once a batch. Its predictions are used twice: with their graph for its own loss, without it for the
other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import arguments
from fastkd.losses import KDLoss
from fastkd.teachers.mode import NOTHING, TeacherMode, check_models, detached
from fastkd.terms import Batch, Course, KDTerm, Need, Outputs, RouterTerm, asks_for_router_loss, outputs_of

__all__ = ["Mutual", "Online"]


class _Learner(TeacherMode):
    """A model that runs once a batch, with its graph, and learns from a loss of its own.

    A mixture of experts that asks for its router's loss gets that too, with the weight of its configuration.
    """

    #: How messages, logs and files call it.
    name: str

    def __init__(self, model: nn.Module, term: KDTerm, learning_rate: float | None) -> None:
        super().__init__()
        if not any(weight.requires_grad for weight in model.parameters()):
            raise ValueError(f"the {self.name} learns too, but none of its parameters requires a gradient")
        if learning_rate is not None:
            arguments.number("learning_rate", learning_rate, above=True)
        self.learner = model
        self.__dict__["model"] = model
        self.learning_rate = learning_rate
        self._term = term
        self._router = RouterTerm(model) if asks_for_router_loss(model) else None
        self._seen: Outputs | None = None

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """Both models have one vocabulary, and share nothing that is trained."""
        check_models(student, {f"the {self.name}": self.learner}, vocab_size)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those of the model that require gradients."""
        return [weight for weight in self.learner.parameters() if weight.requires_grad]

    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """One forward, in training mode where the student is; detached. `loss` differentiates the same."""
        if self.learner.training != student.training:
            self.learner.train(student.training)
        self._seen = outputs_of(self.learner, inputs, needs)
        return detached(self._seen)

    def loss(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The model's own loss, a scalar. RuntimeError where `outputs` of the batch has not been called before."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError("loss() is of the batch that outputs() got: call that first, once a batch")
        loss = self._term(seen, self._taught(student), batch)["loss"]
        if self._router is not None:
            loss = loss + self._router.weight * self._router(seen, Outputs(None), batch)
        return {f"{self.name}_loss": loss}

    def _taught(self, student: Outputs) -> Outputs:
        """What the model learns from, beside the labels."""
        return Outputs(None)

    def kept(self) -> dict[str, Any]:
        """Parameters and buffers."""
        return {"model": self.learner.state_dict()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave."""
        self.learner.load_state_dict(kept["model"])

    def save(self, directory: Path) -> None:
        """The model, in Hugging Face format, in a folder by its name."""
        model: Any = self.learner
        model.save_pretrained(directory / self.name)


class Online(_Learner):
    """Online distillation: the teacher is trained on the labels while it teaches the student.

    Its loss is the mean cross-entropy of its own predictions, through the fused loss, logged as `teacher_loss`. Student
    and teacher read the same forward of the teacher; nothing of the student's loss reaches it.

    Args:
        model: the teacher, trainable, on the student's device, with the student's vocabulary. It is in training mode
            whenever the student is.
        learning_rate: its peak learning rate, above 0; None: the student's.

    `trained` belongs into the optimizer, as a parameter group of its own. `save` writes the teacher to `teacher/`.

    Raises ValueError for a model without trainable parameters; `check` for one that is the student or has another
    vocabulary.
    """

    name = "teacher"

    def __init__(self, model: nn.Module, learning_rate: float | None = None) -> None:
        super().__init__(model, KDTerm(KDLoss(soft_weight=0.0, hard_weight=1.0)), learning_rate)


class Mutual(_Learner):
    """Deep mutual learning (Zhang et al. 2018): two students, each of which learns from labels and from the other.

    The loss of the second student, the peer, is `soft_weight · T² · D(student ‖ peer) + hard_weight · CE`, with
    the student's predictions as they are, without gradient. It is logged as `peer_loss`. Each model runs once a batch.

    Args:
        model: the peer, trainable, on the student's device, with the student's vocabulary. Two models of the same
            weights would stay the same: start it from others. It is in training mode whenever the student is.
        kd: the peer's loss; a copy is used. Default: the paper's, temperature 1 and both weights 1. What the
            student learns is the training's loss.
        learning_rate: the peer's peak learning rate, above 0; None: the student's.
        temperature, soft_weight: how those of the peer's loss change over the training, as `KDTerm`'s do, if they do.

    `trained` belongs into the optimizer, as a parameter group of its own. `save` writes the peer to `peer/`.

    Raises ValueError for a model without trainable parameters, and for a loss that is no mean or has no `soft_weight`;
    `check` for a peer that is the student, has its weights, or has another vocabulary.
    """

    name = "peer"

    def __init__(
        self,
        model: nn.Module,
        kd: KDLoss | None = None,
        learning_rate: float | None = None,
        *,
        temperature: Course | None = None,
        soft_weight: Course | None = None,
    ) -> None:
        kd = KDLoss(1.0, soft_weight=1.0, hard_weight=1.0) if kd is None else kd
        if not kd.soft_weight and soft_weight is None:
            raise ValueError("the peer would learn nothing from the student: its loss has soft_weight=0")
        super().__init__(model, KDTerm(kd, temperature=temperature, soft_weight=soft_weight), learning_rate)

    def follow(self, progress: float) -> None:
        """Set temperature and weights of the peer's loss."""
        self._term.follow(progress)

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """As above; and the peer's weights are not the student's."""
        super().check(student, needs, vocab_size)
        ours, theirs = (list(model.parameters()) for model in (student, self.learner))
        if [weight.shape for weight in ours] == [weight.shape for weight in theirs] and all(
            torch.equal(one, other.to(one)) for one, other in zip(ours, theirs, strict=True)
        ):
            raise ValueError("the peer has the student's weights, and both would stay the same: start it from others")

    def _taught(self, student: Outputs) -> Outputs:
        return Outputs(student.projection.detach())
