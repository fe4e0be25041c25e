"""The tables of a run's report. A column is its title, its unit and what it means, so none is shown undefined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fastkd.training.bootstrap import LEVEL
from fastkd.training.judge import AVERAGE, CE_ONLY, PEER, STUDENT, TEACHER, TRAINED, Contender

__all__ = [
    "INTERVAL",
    "MEASURES",
    "TASK_MEASURES",
    "Cell",
    "Column",
    "Table",
    "comparison",
    "results",
    "tasks",
    "trainings",
]

INTERVAL = f"{LEVEL:.0%} interval"


@dataclass(frozen=True)
class Column:
    """A column of a table, or an entry of a list of facts."""

    title: str
    unit: str  # "" of what has none
    meaning: str  # sentences
    form: Callable[[Any], str] = str
    better: str = ""  # "lower", "higher", or "" of what is neither


class Cell(NamedTuple):
    """What a table shows in one place."""

    text: str
    small: str = ""  # below it
    met: bool | None = None  # marked as passed or failed


class Table(NamedTuple):
    """Columns, and rows of as many cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


#: By the names of METRICS.
MEASURES = {
    "perplexity": Column(
        "perplexity",
        "tokens",
        "exp of the mean cross-entropy on held-out text: the model is as unsure of the next token as if it chose "
        "evenly among so many.",
        "{:,.1f}".format,
        "lower",
    ),
    "out_of_domain_perplexity": Column(
        "out-of-domain perplexity",
        "tokens",
        "The same on text of another kind, which shows whether the student learnt more than the style of its text.",
        "{:,.1f}".format,
        "lower",
    ),
    "kl": Column(
        "KL(teacher ‖ student)",
        "nats per token",
        "Mean Kullback-Leibler divergence of the model from the teacher at temperature 1: 0 where both predict alike.",
        "{:.3f}".format,
        "lower",
    ),
    "top1_agreement": Column(
        "top-1 agreement",
        "% of tokens",
        "How often the model and the teacher hold the same token likeliest.",
        "{:.1%}".format,
        "higher",
    ),
    "top5_agreement": Column(
        "top-5 agreement",
        "% of tokens",
        "How many of the teacher's five likeliest tokens are among the model's five.",
        "{:.1%}".format,
        "higher",
    ),
    "probability_correlation": Column(
        "probability correlation",
        "none; from −1 to 1",
        "Pearson's correlation of the model's and the teacher's probabilities, over all tokens and the vocabulary.",
        "{:.3f}".format,
        "higher",
    ),
    "calibration_error": Column(
        "calibration error",
        "none; from 0 to 1",
        "Mean gap between how sure the model is of its likeliest token and how often that token is right.",
        "{:.3f}".format,
        "lower",
    ),
    "retention": Column(
        "retention",
        "%",
        "Share of the teacher's gain in cross-entropy that the model has: 0 % is no better than the frequencies of "
        "tokens in the training text, 100 % is as good as the teacher.",
        "{:.1f} %".format,
        "higher",
    ),
}

#: What is told of each corpus of a mixture, by the names of METRICS.
TASK_MEASURES = ("perplexity", "kl", "retention")

_MODEL = Column(
    "model",
    "",
    f"The {TEACHER} is what the {STUDENT} learns from. The {CE_ONLY}, if there is one, is the same {STUDENT} trained "
    f"for as many steps on the labels alone, without the {TEACHER}. "
    f"A {PEER} and a {TRAINED} learnt beside the {STUDENT}; a {AVERAGE} is of its weights.",
)
_PARAMETERS = Column("parameters", "weights", "Size of the model, trained or not.", "{:,}".format)
_TASK = Column("task", "", "A corpus of the mixture, judged on documents of its own that no model was trained on.")
_SHARE = Column("share", "% of windows", "How much of the training text is this corpus.", "{:.1%}".format)
_TRAINING = {
    "steps": Column("steps", "steps", "Updates of the weights.", "{:,}".format),
    "tokens": Column("tokens", "tokens", "Tokens trained on. A token counts once for every epoch.", "{:,}".format),
    "seconds": Column("time", "s", "Wall time of the steps, without validations and checkpoints.", "{:,.1f}".format),
    "tokens_per_second": Column("speed", "tokens/s", "Tokens divided by time.", "{:,.0f}".format),
}
_COMPARISON = (
    Column("student minus", "", "The model that the student is compared with, on the same held-out windows."),
    Column("measure", "", "As in the table of results. Lower is better in both."),
    Column(
        "difference", "that of the measure", "The student's value minus the other model's: negative where it is lower."
    ),
    Column(
        INTERVAL,
        "that of the measure",
        "From the same draws of windows for both models. It is usually narrower than the intervals of the two, because "
        "a window that is hard for one is hard for the other.",
    ),
    Column(
        "reading",
        "",
        "Better or worse: the whole interval is on one side of 0. Undecided: 0 is in it, so this text cannot tell. "
        "Most students are worse than their teacher.",
    ),
)


def results(contenders: Sequence[Contender], metrics: Sequence[str]) -> Table:
    """A row per model, a column per measure, with its interval where it has one."""
    rows = []
    for one in contenders:
        values = one.row()
        cells = [_measured(MEASURES[name], values[name], one.intervals.get(name)) for name in metrics]
        rows.append([Cell(one.name), Cell(_PARAMETERS.form(one.parameters)), *cells])
    return Table([_MODEL, _PARAMETERS, *(MEASURES[name] for name in metrics)], rows)


def tasks(contenders: Sequence[Contender]) -> Table:
    """A row per corpus of a mixture and model."""
    rows = []
    for name, first in contenders[0].tasks.items():
        for one in contenders:
            task = one.tasks[name]
            values = task.row()
            cells = [_measured(MEASURES[key], values[key], task.intervals.get(key)) for key in TASK_MEASURES]
            rows.append([Cell(name), Cell(_SHARE.form(first.share)), Cell(one.name), *cells])
    return Table([_TASK, _SHARE, _MODEL, *(_of_task(MEASURES[key]) for key in TASK_MEASURES)], rows)


def _of_task(column: Column) -> Column:
    return replace(column, meaning=column.meaning.replace("the training text", "the corpus' training text"))


def _measured(column: Column, value: float | None, ends: Sequence[float] | None) -> Cell:
    if value is None:
        return Cell("–")
    exact = ends is None or ends[0] == ends[1]  # the teacher's divergence from itself
    return Cell(column.form(value), "" if exact or ends is None else _range(column, ends))


def comparison(differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """The student minus each other model, as `judge.differences` gives it."""
    rows = []
    for model, measures in differences.items():
        for name, found in measures.items():
            if (model, name) == (TEACHER, "kl"):  # the teacher's is 0: the difference is the student's
                continue
            column, ends = MEASURES[name], found["interval"]
            reading = Cell("undecided")
            if ends is not None and ends[1] < 0:
                reading = Cell("better", met=True)
            elif ends is not None and ends[0] > 0:
                reading = Cell("worse", met=None if model == TEACHER else False)  # as most students are
            shown = "–" if ends is None else _range(column, ends, signed=True)
            value = _signed(column, found["difference"])
            rows.append([Cell(model), Cell(column.title), Cell(value), Cell(shown), reading])
    return Table(_COMPARISON, rows)


def trainings(record: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per training, of what metrics.json says of it."""
    rows = []
    for name, one in record.items():
        cells = [Cell(column.form(one[key])) for key, column in _TRAINING.items()]
        rows.append([Cell(name), *cells])
    return Table([_MODEL, *_TRAINING.values()], rows)


def _range(column: Column, ends: Sequence[float], *, signed: bool = False) -> str:
    lower, upper = (_signed(column, end) if signed else column.form(end) for end in ends)
    return f"{lower} to {upper}"


def _signed(column: Column, value: float) -> str:
    text = column.form(abs(value))
    zero = not any(digit in text for digit in "123456789")
    return text if zero else ("−" if value < 0 else "+") + text
