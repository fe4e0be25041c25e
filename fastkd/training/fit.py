"""Train one model, with a teacher or on the labels alone; return its best checkpoint and its history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

import fastkd
from fastkd.training.arguments import arguments, courses, steps_of_epoch
from fastkd.training.callbacks import DrawSamples, ShowProgress, StopOnInterrupt, ValidateAtEnd
from fastkd.training.checkpoints import Sealer, checkpoint_of, last_whole, state_of
from fastkd.training.data import Corpus, Windows, collate
from fastkd.training.joining import joined
from fastkd.training.launcher import started
from fastkd.training.lessons import Lessons
from fastkd.training.options import Options
from fastkd.training.sharding import whole_state
from fastkd.training.trainer import KDTrainer, logged_beside

__all__ = ["Fitted", "fit"]


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
    def beside(self) -> list[str]:
        """What the lines of losses have of terms, and of a teacher that learns."""
        return list(dict.fromkeys(name for line in self.losses for name in logged_beside(line)))

    @property
    def validations(self) -> list[dict[str, float]]:
        """Lines with eval_hard and eval_perplexity."""
        return [line for line in self.history if "eval_hard" in line]


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

    Of several processes each calls this, and the first one writes.

    Resumes from the last whole checkpoint there if options.training.resume: on the same machine it ends with the same
    weights, bit for bit, as a training that was not interrupted. Raises KeyboardInterrupt after Ctrl-C, when a
    checkpoint has been saved.
    """
    finished, processes = directory / "finished.pt", joined()
    if options.training.resume and processes.of_first(finished.exists):
        kept = torch.load(finished, map_location="cpu", weights_only=True)
        student.load_state_dict(kept["student"])
        return Fitted(**kept["fitted"])
    checkpoint = processes.of_first(lambda: last_whole(directory)) if options.training.resume else None
    set_seed(options.training.seed)
    stop = StopOnInterrupt()
    samples = DrawSamples(tokenizer, options, directory, stop)
    callbacks: list[TrainerCallback] = [stop, ValidateAtEnd(), samples, Sealer()]
    if options.training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(options.training.early_stopping_patience))
    trainer = KDTrainer(
        student,
        arguments(options, directory, resumed=checkpoint is not None),
        kd=kd,
        teacher=lessons.teacher,
        terms=lessons.terms,
        **courses(options.distillation),
        train_dataset=lessons.train,
        eval_dataset=Windows(corpus.validation),
        data_collator=lessons.collator,
        eval_collator=collate,
        callbacks=callbacks,
    )
    for theirs in (ProgressCallback, PrinterCallback):  # whichever Trainer has chosen
        trainer.remove_callback(theirs)
    trainer.add_callback(ShowProgress())
    if options.training.gradient_checkpointing:
        student.gradient_checkpointing_enable()
        beside: Any = trainer.teacher.model
        if trainer.teacher.trained:
            beside.gradient_checkpointing_enable()
    if checkpoint is not None and _is_last(checkpoint, options):  # Trainer would take a step more
        trainer.state = state_of(checkpoint)
        best = trainer.state.best_global_step or trainer.state.global_step
        trainer.state.best_model_checkpoint = str(checkpoint_of(directory, best))
        trainer.teacher.ready(student)
        trainer._load_from_checkpoint(str(checkpoint))
        samples.recall(trainer.state, student, ended=True)
        trainer._load_best_model()
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.state
    if stop.interrupted and not _is_last(checkpoint_of(directory, state.global_step), options):
        raise KeyboardInterrupt(f"interrupted after step {state.global_step}, which is saved")
    windows = _windows_seen(state.global_step, len(corpus.train), options)
    size = student.num_parameters()
    fitted = Fitted(state.log_history, size, state.global_step, windows * corpus.train.shape[1], samples.drawn)
    state_dict = whole_state(student)

    def save() -> None:
        trainer.teacher.save(directory)
        trainer.terms.save(directory)
        partial = finished.with_suffix(".partial")
        torch.save({"student": state_dict, "fitted": vars(fitted)}, partial)
        partial.replace(finished)

    processes.first_alone(save)
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
    size, accumulated = options.training.batch_size * started(), options.training.gradient_accumulation_steps
    epochs, rest = divmod(steps, steps_of_epoch(options.training, windows))
    return (epochs * (windows // size) + rest * accumulated) * size
