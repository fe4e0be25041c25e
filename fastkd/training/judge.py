"""Contenders side by side: teacher, student and, if trained, the same student without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.processes import Processes
from fastkd.training.bootstrap import interval, resampled_means
from fastkd.training.data import Corpus
from fastkd.training.evaluation import (
    LARGEST_LOSS,
    Finding,
    Measures,
    Predictions,
    diagnosis,
    measure,
    predict,
    retention,
    unigram_loss,
)
from fastkd.training.options import METRICS, Options
from fastkd.training.samples import next_token, samples

__all__ = [
    "AVERAGE",
    "CE_ONLY",
    "PEER",
    "STUDENT",
    "TEACHER",
    "TRAINED",
    "Contender",
    "Judge",
    "TaskResult",
    "differences",
    "verdict",
]

TEACHER, STUDENT, CE_ONLY = "teacher", "student", "CE-only student"
PEER, TRAINED, AVERAGE = "second student", "teacher after training", "moving average"


@dataclass(frozen=True)
class TaskResult:
    """What was found about a model on the held-out text of one corpus of a mixture."""

    share: float  # of the mixture's windows that are this corpus'
    held_out: Measures
    retention: float | None  # of the teacher's gain over this corpus' unigrams, in percent
    intervals: dict[str, list[float] | None]  # of perplexity and kl

    def row(self) -> dict[str, float | None]:
        """The measures, by the names of METRICS; there is no out-of-domain text of one corpus."""
        extra = {"out_of_domain_perplexity": None, "retention": self.retention, "perplexity": self.held_out.perplexity}
        return {name: extra[name] if name in extra else getattr(self.held_out, name) for name in METRICS}

    def record(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        measured = {name: value for name, value in self.row().items() if name != "out_of_domain_perplexity"}
        return {"share": self.share, **measured, "intervals": self.intervals, "held_out": self.held_out.record()}


@dataclass(frozen=True)
class Contender:
    """A model and what was found about it."""

    name: str
    parameters: int
    held_out: Measures
    out_of_domain: Measures | None
    retention: float | None  # of the teacher's gain over unigrams, on held-out text, in percent
    samples: list[str]  # of the first process; others have none
    next_tokens: list[Tensor]  # logits [V] after each prompt, also of the first process alone
    #: Of perplexity, out_of_domain_perplexity and kl: [lower, upper] end. A single window has no interval: None.
    intervals: dict[str, list[float] | None]
    #: On each corpus of a mixture, by its name; the measures above are on the mixture. Empty where there is one corpus.
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    def row(self) -> dict[str, float | None]:
        """The measures, by the names of METRICS."""
        other = None if self.out_of_domain is None else self.out_of_domain.perplexity
        extra = {"out_of_domain_perplexity": other, "retention": self.retention, "perplexity": self.held_out.perplexity}
        return {name: extra[name] if name in extra else getattr(self.held_out, name) for name in METRICS}

    def record(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {
            "parameters": self.parameters,
            **self.row(),
            "intervals": self.intervals,
            "held_out": self.held_out.record(),
            "out_of_domain": None if self.out_of_domain is None else self.out_of_domain.record(),
            "samples": self.samples,
            **({"tasks": {name: task.record() for name, task in self.tasks.items()}} if self.tasks else {}),
        }


class _Read(NamedTuple):
    """What a model expects over each text that it is judged on."""

    held_out: Predictions
    out_of_domain: Predictions | None
    tasks: list[Predictions]


class Judge:
    """Measures contenders on the same text against the same teacher, whose body it does not keep.

    All `processes` judge together, and come to the same. The first one alone draws samples.
    """

    def __init__(
        self,
        teacher: Any,
        tokenizer: Any,
        corpus: Corpus,
        options: Options,
        vocab_size: int | None,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Processes()
        self.tokenizer, self.corpus, self.options, self._counted = tokenizer, corpus, options, vocab_size
        self._teacher = self._read(teacher)
        self.vocab_size = self._teacher.held_out.vocab_size  # ids that count
        self._baseline = unigram_loss(corpus.train, corpus.held_out, self.vocab_size)
        self._baselines = [unigram_loss(task.train, task.held_out, self.vocab_size) for task in corpus.tasks]
        self._teacher_losses: dict[str | None, float] = {}  # by task; of the mixture, or of the only corpus, by None
        self.teacher = self._contender(TEACHER, teacher, self._teacher)

    def judge(self, name: str, model: Any) -> Contender:
        """Run and measure a student."""
        return self._contender(name, model, self._read(model))

    def _read(self, model: Any) -> _Read:
        size, corpus = self.options.evaluation.eval_batch_size, self.corpus

        def run(windows: Tensor) -> Predictions:
            return predict(model, windows, size, self._counted, self._processes)

        elsewhere = None if corpus.out_of_domain is None else run(corpus.out_of_domain)
        return _Read(run(corpus.held_out), elsewhere, [run(task.held_out) for task in corpus.tasks])

    def _contender(self, name: str, model: Any, read: _Read) -> Contender:
        found = measure(read.held_out, self.corpus.held_out, self._teacher.held_out)
        elsewhere = None
        if read.out_of_domain is not None:
            assert self.corpus.out_of_domain is not None
            elsewhere = measure(read.out_of_domain, self.corpus.out_of_domain, self._teacher.out_of_domain)
        evaluation, seed = self.options.evaluation, self.options.training.seed
        first = self._processes.first
        intervals = _intervals(found, seed)
        intervals["out_of_domain_perplexity"] = None if elsewhere is None else _intervals(elsewhere, seed)["perplexity"]
        return Contender(
            name,
            model.num_parameters(),
            found,
            elsewhere,
            self._retention(None, found.loss, self._baseline),
            samples(model, self.tokenizer, evaluation, seed) if first else [],
            next_token(model, self.tokenizer, evaluation.prompts, self.vocab_size) if first else [],
            intervals,
            self._task_results(read),
        )

    def _task_results(self, read: _Read) -> dict[str, TaskResult]:
        results = {}
        rows = zip(self.corpus.tasks, read.tasks, self._teacher.tasks, self._baselines, strict=True)
        for task, expected, teacher, baseline in rows:
            found = measure(expected, task.held_out, teacher)
            retained = self._retention(task.name, found.loss, baseline)
            intervals = _intervals(found, self.options.training.seed)
            results[task.name] = TaskResult(task.share, found, retained, intervals)
        return results

    def _retention(self, task: str | None, loss: float, baseline: float) -> float | None:
        """The first that is asked for is the teacher's, with which the others are compared."""
        return retention(loss, self._teacher_losses.setdefault(task, loss), baseline)


def differences(contenders: Sequence[Contender], seed: int) -> dict[str, dict[str, Any]]:
    """The student minus each other contender on held-out text, by that one's name: value and interval per measure.

    Both are drawn on the same windows, whose difficulty so cancels: the interval is narrower than those of the two.
    """
    student = next(one for one in contenders if one.name == STUDENT)
    found: dict[str, dict[str, Any]] = {}
    for other in contenders:
        if other is student:
            continue
        measures = [student.held_out, other.held_out]
        ours, theirs = (_resampled(one, seed) for one in measures)
        found[other.name] = {
            name: {
                "difference": getattr(student.held_out, name) - getattr(other.held_out, name),
                "interval": _interval(ours[name] - theirs[name], other.held_out),
            }
            for name in ours
        }
    return found


def _intervals(measures: Measures, seed: int) -> dict[str, list[float] | None]:
    return {name: _interval(values, measures) for name, values in _resampled(measures, seed).items()}


def _interval(values: Tensor, measures: Measures) -> list[float] | None:
    return interval(values) if len(measures.sums.tokens) > 1 else None


def _resampled(measures: Measures, seed: int) -> dict[str, Tensor]:
    """Perplexity and KL, by the names of METRICS, in every resample of the windows."""
    sums = measures.sums
    assert sums.kl is not None  # a judge compares with a teacher
    loss, kl = resampled_means(torch.stack((sums.loss, sums.kl), 1), sums.tokens, seed).unbind(1)
    return {"perplexity": loss.clamp(max=LARGEST_LOSS).exp(), "kl": kl}


def verdict(contenders: Sequence[Contender], before: Contender | None = None) -> list[Finding]:
    """What the comparison says, a line each.

    The student against what it was before training, and against the one without a teacher; then the diagnosis.
    """
    found = {contender.name: contender for contender in contenders}
    student, alone = found[STUDENT], found.get(CE_ONLY)
    lines = []
    if before is not None and not student.held_out.perplexity <= before.held_out.perplexity:
        text = (
            f"WORSE: held-out perplexity {student.held_out.perplexity:,.1f} after training, "
            f"{before.held_out.perplexity:,.1f} before it: the student was better as it began. A smaller "
            "learning_rate, more warm-up or data closer to the held-out text may help"
        )
        lines.append(Finding(text, met=False))
    if alone is not None and student.held_out.kl is not None and alone.held_out.kl is not None:
        gain = 1 - student.held_out.kl / alone.held_out.kl
        better = student.held_out.perplexity < alone.held_out.perplexity and gain >= 0.1
        text = (
            f"{'PASS' if better else 'FAIL'}: held-out perplexity {student.held_out.perplexity:,.1f} against "
            f"{alone.held_out.perplexity:,.1f} on the labels alone (must be lower), KL to the teacher "
            f"{student.held_out.kl:.3f} against {alone.held_out.kl:.3f}, {gain:.1%} lower (must be 10 %)"
        )
        lines.append(Finding(text, better))
    return [*lines, *diagnosis(student.held_out, None if alone is None else alone.held_out)]
