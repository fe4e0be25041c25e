"""Train one model, with a teacher or on the labels alone, and come back with the best of it and its history."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

import fastkd
from fastkd.training.checkpoints import Sealer, checkpoint_of, last_whole, state_of
from fastkd.training.data import Corpus, Windows, collate
from fastkd.training.loading import device_of
from fastkd.training.options import DistillationOptions, InputError, Options
from fastkd.training.run import write_whole
from fastkd.training.samples import samples
from fastkd.training.trainer import Course, KDTrainer, StopOnInterrupt

__all__ = ["Fitted", "Lessons", "arguments", "distillation_loss", "fit"]


@dataclass(frozen=True)
class Lessons:
    """What a student learns from: examples, and how batches are made of them; a live teacher, or none."""

    train: Dataset[Any]
    collator: Any
    teacher: Any = None


@dataclass(frozen=True)
class Fitted:
    """What a training leaves beside the model."""

    history: list[dict[str, float]]  # Trainer's: lines of losses and of validations, by step
    parameters: int
    steps: int
    tokens: int
    samples: list[tuple[int, list[str]]]  # (step, a continuation of each prompt), before training and after epochs

    @property
    def seconds(self) -> float:
        """Of the steps alone."""
        spans = zip([0.0] + [line["step"] for line in self.losses], self.losses, strict=False)
        per_step = self.tokens / max(self.steps, 1)
        return sum((line["step"] - before) * per_step / line["tokens_per_second"] for before, line in spans)

    @property
    def losses(self) -> list[dict[str, float]]:
        """Lines with loss, hard, soft, ratio and tokens_per_second."""
        return [line for line in self.history if "tokens_per_second" in line]

    @property
    def validations(self) -> list[dict[str, float]]:
        """Lines with eval_hard and eval_perplexity."""
        return [line for line in self.history if "eval_hard" in line]


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


def arguments(options: Options, directory: Path, *, resumed: bool = False) -> TrainingArguments:
    """Trainer's arguments. Raises InputError for a value it refuses, such as an optimizer it does not know."""
    training = options.training
    try:
        return TrainingArguments(
            output_dir=str(directory),
            num_train_epochs=training.epochs or 1.0,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=options.evaluation.eval_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=training.learning_rate,
            optim=training.optimizer,
            lr_scheduler_type=training.scheduler,
            warmup_steps=training.warmup_ratio,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            max_grad_norm=training.max_grad_norm,
            fp16=training.fp16,
            bf16=training.bf16,
            logging_steps=training.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would wait for the device at every step, and hide what it filters
            eval_strategy="steps",
            eval_steps=training.eval_steps,
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
            use_cpu=options.models.device == "cpu",
            seed=training.seed,
            report_to="none",
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"the training options are refused: {error}") from error


def fit(
    student: Any,
    tokenizer: Any,
    corpus: Corpus,
    lessons: Lessons,
    kd: fastkd.KDLoss,
    options: Options,
    directory: Path,
) -> Fitted:
    """Train `student` in place, checkpoints in `directory`; at the end it is the best validated one.

    Resumes from the last whole checkpoint there if options.training.resume: on the same machine it ends with the same
    weights, bit for bit, as a training that was not interrupted. Raises KeyboardInterrupt after Ctrl-C, when a
    checkpoint has been saved.
    """
    finished = directory / "finished.pt"
    if options.training.resume and finished.exists():
        kept = torch.load(finished, map_location=student.device, weights_only=True)
        student.load_state_dict(kept["student"])
        return Fitted(**kept["fitted"])
    checkpoint = last_whole(directory) if options.training.resume else None
    set_seed(options.training.seed)
    stop = StopOnInterrupt()
    storyteller = _Storyteller(tokenizer, options, directory, stop)
    callbacks: list[TrainerCallback] = [stop, _ValidateAtEnd(), storyteller, Sealer()]
    if options.training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(options.training.early_stopping_patience))
    wanted = options.distillation
    trainer = KDTrainer(
        student,
        arguments(options, directory, resumed=checkpoint is not None),
        kd=kd,
        teacher=lessons.teacher,
        temperature=_course(wanted.temperature, wanted.final_temperature, wanted.temperature_schedule),
        soft_weight=_course(wanted.weights[0], wanted.final_soft_weight, wanted.weight_schedule),
        train_dataset=lessons.train,
        eval_dataset=Windows(corpus.validation),
        data_collator=lessons.collator,
        eval_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress())
    if options.training.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    if checkpoint is not None and _is_last(checkpoint, options):  # Trainer would take a step more
        trainer.state = state_of(checkpoint)
        best = trainer.state.best_global_step or trainer.state.global_step
        trainer.state.best_model_checkpoint = str(checkpoint_of(directory, best))
        trainer._load_from_checkpoint(str(checkpoint))
        storyteller.recall(trainer.state, student, ended=True)
        trainer._load_best_model()
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.state
    if stop.interrupted and not _is_last(checkpoint_of(directory, state.global_step), options):
        raise KeyboardInterrupt(f"interrupted after step {state.global_step}, which is saved")
    windows = _windows_seen(state.global_step, len(corpus.train), options)
    size = student.num_parameters()
    fitted = Fitted(state.log_history, size, state.global_step, windows * corpus.train.shape[1], storyteller.told)
    partial = finished.with_suffix(".partial")
    torch.save({"student": student.state_dict(), "fitted": vars(fitted)}, partial)
    partial.replace(finished)
    if stop.interrupted:
        raise KeyboardInterrupt(f"interrupted after the last step, {state.global_step}, which is saved")
    return fitted


def _is_last(checkpoint: Path, options: Options) -> bool:
    """Whether training ends with this checkpoint: all steps are done, or early stopping has ended it."""
    state, patience = state_of(checkpoint), options.training.early_stopping_patience
    kept: Any = state.stateful_callbacks
    count = kept.get("EarlyStoppingCallback", {}).get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state.global_step >= state.max_steps or 0 < patience <= count


def _windows_seen(steps: int, windows: int, options: Options) -> int:
    """How many windows so many steps took: the last step of an epoch may have fewer batches than the others."""
    batches, accumulated = windows // options.training.batch_size, options.training.gradient_accumulation_steps
    epochs, rest = divmod(steps, -(-batches // accumulated))
    return (epochs * batches + rest * accumulated) * options.training.batch_size


def _course(start: float, end: float | None, shape: Any) -> Course | None:
    return None if end is None else Course(start, end, shape)


class _ValidateAtEnd(TrainerCallback):
    """The last step is validated and saved too, or it could not be the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        return control


class _Progress(TrainerCallback):
    """One bar: the losses last logged, and the last validation."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        for name, shown, form in _SHOWN:
            if name in logs:
                self.shown[shown] = form.format(logs[name])
        self.bar.set_postfix(self.shown)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


#: What is logged → what it is called in the bar, and how it is printed there.
_SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("hard", "hard", "{:.3f}"),
    ("soft", "soft", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("eval_perplexity", "validation perplexity", "{:,.1f}"),
)


class _Storyteller(TrainerCallback):
    """Draws samples before training and after each epoch, and keeps them in a file, for a run that is resumed."""

    def __init__(self, tokenizer: Any, options: Options, directory: Path, stop: StopOnInterrupt) -> None:
        self.tokenizer, self.options, self._file, self._stop = tokenizer, options, directory / "samples.json", stop
        self.told: list[tuple[int, list[str]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recall(state, kwargs["model"], ended=float(state.epoch or 0).is_integer())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stop.interrupted or state.global_step == state.max_steps:
            self._tell(state, kwargs["model"])

    def recall(self, state: Any, model: Any, *, ended: bool) -> None:
        """Read what was drawn up to the step that is resumed from; draw its own, if an epoch `ended` with it."""
        if state.global_step and self._file.exists():
            drawn = json.loads(self._file.read_text(encoding="utf-8"))
            self.told = [(step, texts) for step, texts in drawn if step <= state.global_step]
        if ended and all(step != state.global_step for step, _ in self.told):
            self._tell(state, model)

    def _tell(self, state: Any, model: Any) -> None:
        found = samples(model, self.tokenizer, self.options.evaluation, self.options.training.seed)
        if found:
            self.told.append((state.global_step, found))
            write_whole(self._file, json.dumps(self.told))
