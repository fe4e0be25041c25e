"""From options to what trains: the loss, its course over the training, and the arguments of transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import TrainingArguments

import fastkd
from fastkd.terms import Course
from fastkd.training.launcher import started
from fastkd.training.loading import device_of
from fastkd.training.options import DistillationOptions, InputError, Options, TrainingOptions

__all__ = ["arguments", "courses", "distillation_loss", "steps_and_epochs", "steps_of_epoch"]

#: Options of a training that Trainer has under the same name.
_SAME = (
    *("gradient_accumulation_steps", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("fp16", "logging_steps", "eval_steps", "seed"),
)


def distillation_loss(options: DistillationOptions, vocab_size: int | None = None) -> fastkd.KDLoss:
    """The loss of the first step. Raises InputError for values it refuses."""
    soft, hard = options.weights
    try:
        return fastkd.KDLoss(
            options.temperature,
            soft_weight=soft,
            hard_weight=hard,
            divergence=options.divergence,
            vocab_size=vocab_size,
        )
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def courses(options: DistillationOptions) -> dict[str, Course | None]:
    """How the loss changes over the training: `temperature` and `soft_weight`, None where it stays."""
    ends = {
        "temperature": (options.temperature, options.final_temperature, options.temperature_schedule),
        "soft_weight": (options.weights[0], options.final_soft_weight, options.weight_schedule),
    }
    return {name: None if end is None else Course(start, end, shape) for name, (start, end, shape) in ends.items()}


def steps_of_epoch(training: TrainingOptions, windows: int) -> int:
    """Optimizer steps of a pass over so many windows. An incomplete batch is dropped; the last step may have fewer.

    A batch is one of each process.
    """
    return max(1, -(-(windows // (training.batch_size * started())) // training.gradient_accumulation_steps))


def steps_and_epochs(training: TrainingOptions, windows: int) -> tuple[int, int]:
    """How long Trainer will train on so many windows: optimizer steps, and how many epochs are begun."""
    each = steps_of_epoch(training, windows)
    steps = training.max_steps or math.ceil((training.epochs or 1.0) * each)
    return steps, -(-steps // each)


def arguments(options: Options, directory: Path, *, resumed: bool = False) -> TrainingArguments:
    """Trainer's arguments. Raises InputError for a value it refuses, such as an optimizer it does not know."""
    training = options.training
    try:
        return TrainingArguments(
            output_dir=str(directory),
            **{name: getattr(training, name) for name in _SAME},
            bf16=bool(training.bf16),
            num_train_epochs=training.epochs or 1.0,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=options.evaluation.eval_batch_size,
            optim=training.optimizer,
            lr_scheduler_type=training.scheduler,
            warmup_steps=training.warmup_ratio,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would wait for the device at every step, and hide what it filters
            eval_strategy="steps",
            eval_on_start=not resumed,
            save_steps=training.eval_steps,
            save_total_limit=2,
            load_best_model_at_end=True,
            restore_callback_states_from_checkpoint=True,  # early stopping's count
            metric_for_best_model="hard",
            greater_is_better=False,
            dataloader_drop_last=True,
            dataloader_pin_memory=device_of(options.models).type != "cpu",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            use_cpu=device_of(options.models).type == "cpu",  # said, so that bf16 is accepted there
            report_to="none",
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"the training options are refused: {error}") from error
