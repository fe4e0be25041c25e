"""What happens between the steps of a training: a clean stop, the last validation, progress, samples."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastkd.training.joining import joined
from fastkd.training.options import Options
from fastkd.training.progress import Progress
from fastkd.training.samples import samples
from fastkd.training.sharding import is_sharded
from fastkd.training.trainer import logged_beside
from fastkd.training.whole import write_whole

__all__ = ["DrawSamples", "ShowProgress", "StopOnInterrupt", "ValidateAtEnd"]


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the training after the step under way, with a checkpoint; a second one ends it at once.

    Of several processes all stop after one step, whichever was interrupted first.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Take over the signal."""
        try:
            self._before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not in the main thread, where alone signals can be handled
            self._before = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Give it back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop, if asked to."""
        self.interrupted = joined().any(self.interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        return control

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\ninterrupted: a checkpoint follows the step under way; press Ctrl-C again to end at once", flush=True)


class ValidateAtEnd(TrainerCallback):
    """The last step is validated and saved too, or it could not be the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for both after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        return control


#: What is logged → what it is called beside the progress, and how it is printed there.
_SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("hard", "hard", "{:.3f}"),
    ("soft", "soft", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("eval_perplexity", "validation perplexity", "{:,.1f}"),
)


class ShowProgress(TrainerCallback):
    """The steps done, the losses last logged, and the last validation."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at the step that is resumed from."""
        self._progress = Progress("training", state.max_steps, "step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step more."""
        assert self._progress is not None
        self._progress.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """New values."""
        assert self._progress is not None
        logs = kwargs["logs"]
        rows = (*_SHOWN, *((name, name, "{:.3g}") for name in logged_beside(logs) if "loss" in logs))
        found = {shown: form.format(logs[name]) for name, shown, form in rows if name in logs}
        self._progress.update(state.global_step, found)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The training is over, or stopped."""
        assert self._progress is not None
        self._progress.close()


class DrawSamples(TrainerCallback):
    """Draws samples before training and after each epoch, and keeps them in a file, for a run that is resumed."""

    def __init__(self, tokenizer: Any, options: Options, directory: Path, stop: StopOnInterrupt) -> None:
        self._tokenizer, self._options, self._file, self._stop = tokenizer, options, directory / "samples.json", stop
        self.drawn: list[tuple[int, list[str]]] = []  # (step, a continuation of each prompt)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw before the first step, or read what was drawn up to the step that is resumed from."""
        self.recall(state, kwargs["model"], ended=float(state.epoch or 0).is_integer())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw, unless Ctrl-C has cut the epoch short."""
        if not self._stop.interrupted or state.global_step == state.max_steps:
            self._draw(state, kwargs["model"])

    def recall(self, state: Any, model: Any, *, ended: bool) -> None:
        """Read what was drawn up to the step that is resumed from; draw its own, if an epoch `ended` with it."""
        if state.global_step:
            kept = joined().of_first(self._kept)
            self.drawn = [(step, texts) for step, texts in kept if step <= state.global_step]
        if ended and all(step != state.global_step for step, _ in self.drawn):
            self._draw(state, model)

    def _kept(self) -> list[Any]:
        found: list[Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        return found

    def _draw(self, state: Any, model: Any) -> None:
        first = joined().first
        if not (first or is_sharded(model)):  # a sharded model runs in all processes or in none
            return
        found = samples(model, self._tokenizer, self._options.evaluation, self._options.training.seed)
        if found:
            self.drawn.append((state.global_step, found))
        if found and first:
            write_whole(self._file, json.dumps(self.drawn))
