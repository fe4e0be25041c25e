"""The optimisation, and where a run is kept."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from fastkd.training.optimizers import OPTIMIZER_PACKAGES, OPTIMIZERS_WITH_ARGUMENTS, SCHEDULERS
from fastkd.training.options.base import InputError, at_least, check_finite, did_you_mean, expand_home, option, switch

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions:
    """The optimisation: a selection of what transformers' TrainingArguments offer, and where the run is kept."""

    _argument_group_name: ClassVar[str] = "training"

    epochs: float | None = option(None, "passes over the windows [3, unless max_steps is given]", "num_train_epochs")
    max_steps: int | None = option(None, "optimizer steps, instead of epochs", "steps")
    batch_size: int = option(8, "windows per device and forward pass", "per_device_train_batch_size")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step; the loss is exact over all of them")
    learning_rate: float = option(2e-3, "peak learning rate")
    optimizer: str = option("adamw_torch", "an optimizer of transformers' Trainer", "optim")
    scheduler: str = option("cosine", "a learning rate schedule: " + ", ".join(SCHEDULERS), "lr_scheduler_type")
    warmup_ratio: float = option(0.05, "share of the steps in which the learning rate rises to its peak")
    weight_decay: float = option(0.1, "AdamW's, of matrices; biases and norms are not decayed")
    adam_beta1: float = option(0.9, "AdamW's")
    adam_beta2: float = option(0.95, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not")
    fp16: bool = option(False, "mixed precision in float16")
    bf16: bool | None = switch(
        "mixed precision in bfloat16 [on a CPU whose units for it make products faster: true; else false]"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    logging_steps: int = option(10, "steps from one line of losses to the next")
    eval_steps: int = option(50, "steps from one validation and checkpoint to the next")
    early_stopping_patience: int = option(
        0, "stop after this many validations without a better hard loss; 0 trains to the end"
    )
    seed: int = option(0, "seed of the split, the initial weights, the data's order and the samples")
    output: str = option("runs/distill", "directory of the run: checkpoints, then the student, metrics and report")
    overwrite: bool = option(False, "replace an earlier run in the output directory, once the new one is finished")
    resume: bool = option(False, "resume the interrupted run in the output directory")

    def __post_init__(self) -> None:
        expand_home(self, "output")
        check_finite(self)
        if self.epochs is not None and self.max_steps is not None:
            raise InputError(f"epochs {self.epochs} and max_steps {self.max_steps} contradict each other: give one")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 3.0)
        if self.epochs is not None and not self.epochs > 0:
            raise InputError(f"epochs is {self.epochs}; it must be above 0")
        if self.max_steps is not None:
            at_least(self, max_steps=1)
        at_least(
            self,
            batch_size=1,
            gradient_accumulation_steps=1,
            logging_steps=1,
            eval_steps=1,
            early_stopping_patience=0,
            max_grad_norm=0,
            weight_decay=0,
        )
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        package = OPTIMIZER_PACKAGES.get(self.optimizer)
        if package is not None and find_spec(package) is None:
            raise InputError(f"optimizer is {self.optimizer!r}, which needs {package}: install it, or take adamw_torch")
        if self.optimizer.startswith(OPTIMIZERS_WITH_ARGUMENTS):
            raise InputError(f"optimizer is {self.optimizer!r}, which needs arguments of its own: take adamw_torch")
        if self.scheduler not in SCHEDULERS:
            meant = did_you_mean(self.scheduler, SCHEDULERS)
            raise InputError(
                f"scheduler is {self.scheduler!r}; those that need no arguments of their own are "
                f"{', '.join(SCHEDULERS)}{meant}"
            )
        if self.fp16 and self.bf16:
            raise InputError("fp16 and bf16 are both set: choose one")
        if self.overwrite and self.resume:
            raise InputError("overwrite and resume contradict each other: choose one")
