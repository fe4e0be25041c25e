"""What a Trainer trains beside its model: the parameters of terms, with the model's, and a teacher's, by themselves.

Trainer knows one model. Its parameters alone are put into the optimizer, zeroed, averaged over processes, clipped and
saved. `TrainsBeside` does the same for what stands beside the model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastkd.teachers import TeacherMode
from fastkd.terms import Terms
from fastkd.training.sharding import shard_frozen

__all__ = ["TrainsBeside"]

_FILE = "beside.pt"  # in a checkpoint, where terms or teacher have a state


class TrainsBeside(Trainer):
    """A Trainer with `terms` and a `teacher`. Terms are clipped by one norm with the model, a teacher by its own."""

    terms: Terms
    teacher: TeacherMode

    def _stand_beside(self, terms: Terms, teacher: TeacherMode) -> None:
        """Take both, after Trainer's own `__init__`. Raises ValueError where they could not be trained."""
        self.terms, self.teacher = terms.to(self.args.device), teacher
        self._check_trained()
        self._given_optimizer = self.optimizer is not None  # at a second `train()` there is one too
        self._stepped = True  # no gradients are to be kept
        self.add_callback(_Follow(self))

    @property
    def _beside(self) -> list[nn.Parameter]:
        return [*self.terms.trained, *self.teacher.trained]

    def _check_trained(self) -> None:
        """Raise ValueError where the parameters could not be trained as the student's are."""
        if not self._beside:
            return
        assert isinstance(self.model, nn.Module)
        sharded = any(isinstance(module, FSDPModule) for module in self.model.modules())
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        what = "terms with parameters" if self.terms.trained else "a teacher that learns"
        if sharded or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{what} cannot be trained beside a sharded student: use DDP")
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(f"{what} cannot be trained by {optim!r}, which steps the student by layers")
        if self.args.max_grad_norm and not hasattr(Trainer, "_clip_grad_norm"):
            raise ValueError(
                f"the Trainer of transformers {transformers.__version__} would clip no gradients of {what}: update it, "
                "or set max_grad_norm=0"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, of the parameters of terms and teacher too.

        Raises ValueError where an optimizer that was given lacks them.
        """
        new = self.optimizer is None
        super().create_optimizer(*args, **kwargs)
        optimizer = self.optimizer
        assert optimizer is not None
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for what, module, settings in (
            ("terms", self.terms, {}),
            ("the teacher", self.teacher, self._teachers_rate()),
        ):
            wanted = {id(weight) for weight in self._beside}
            missing = [
                (name, weight)
                for name, weight in module.named_parameters()
                if id(weight) in wanted and id(weight) not in held
            ]
            if settings and self._given_optimizer:
                raise ValueError(
                    f"the teacher has learning_rate={settings['lr']}, but an optimizer was given: set the rate there"
                )
            if missing and not new:
                raise ValueError(f"the optimizer lacks {len(missing)} parameters of {what}: add them to it")
            decayed = self.get_decay_parameter_names(module) if missing else []
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0)):
                group = [weight for name, weight in missing if (name in decayed) == decays]
                if group:
                    optimizer.add_param_group({"params": group, "weight_decay": decay, **settings})
        return optimizer

    def _teachers_rate(self) -> dict[str, float]:
        rate = self.teacher.learning_rate
        return {} if rate is None else {"lr": rate}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        if self.accelerator.num_processes > 1:
            for weight in (*self.terms.parameters(), *self.teacher.trained):
                dist.broadcast(weight.data, 0)  # the same everywhere, as DDP makes the student
        for model in self.teacher.in_step if self.accelerator.is_fsdp2 else []:
            shard_frozen(model, self.accelerator)
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, which zeroes and averages gradients of the model alone."""
        beside = self._beside
        if self._stepped:
            for weight in beside:
                weight.grad = None
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._stepped = self.accelerator.sync_gradients  # the optimizer steps next
        if self._stepped and self.accelerator.num_processes > 1:
            for weight in beside:
                found = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(found, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        found = super()._clip_grad_norm(self._with_terms(model))  # type: ignore[no-untyped-call]
        if self.teacher.trained:  # Trainer's call has unscaled the gradients of the whole optimizer
            nn.utils.clip_grad_norm_(self.teacher.trained, self.args.max_grad_norm)
        return found

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        both = self._with_terms(model)
        return super()._get_grad_norm(both, grad_norm=grad_norm)  # type: ignore[no-untyped-call]

    def _with_terms(self, model: nn.Module) -> nn.Module:
        """What is asked for its parameters."""
        return nn.ModuleList([model, self.terms]) if self.terms.trained else model

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        kept = {"terms": self.terms.kept(), "teacher": self.teacher.kept()}
        if any(kept.values()) and self.args.should_save:
            directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(kept, directory / _FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_beside(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert isinstance(self.model, nn.Module)
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # a validation leaves the head whole, and parts are loaded into parts
        super()._load_best_model()
        best = str(self.state.best_model_checkpoint)
        if (Path(best) / _FILE).is_file():  # Trainer warns where the checkpoint is gone
            self._load_beside(best)

    def _load_beside(self, checkpoint: str) -> None:
        file = Path(checkpoint) / _FILE
        kept = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
        self.terms.restore(kept.get("terms", {}), str(checkpoint))
        ours, theirs = self.teacher.kept(), kept.get("teacher", {})
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"{checkpoint} has a teacher with a state of {sorted(theirs)}, but the trainer's "
                f"{type(self.teacher).__name__} has {sorted(ours)}: resume with the same kind of teacher"
            )
        if theirs:
            self.teacher.restore(theirs)


class _Follow(TrainerCallback):
    """Tells the teacher how long the training is, and of every optimizer step."""

    def __init__(self, trainer: TrainsBeside) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        endless = state.num_train_epochs == sys.maxsize  # as Trainer says of data without length
        self._trainer.teacher.begin(state.max_steps, 1 if endless else state.num_train_epochs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step more."""
        student = self._trainer.accelerator.unwrap_model(kwargs["model"])
        ended = float(state.epoch or 0.5).is_integer()
        self._trainer.teacher.stepped(student, state.global_step, epoch_ended=ended)
