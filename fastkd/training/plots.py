"""The figures of the reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from fastkd.training.fit import Fitted
from fastkd.training.judge import AVERAGE, CE_ONLY, PEER, STUDENT, TEACHER, TRAINED, Contender
from fastkd.training.plain import figure_text

__all__ = [
    "ablation",
    "calibration",
    "confidence",
    "course",
    "likeliest",
    "logged",
    "losses",
    "next_tokens",
    "progressive",
    "sweep",
    "tasks",
    "temperatures",
    "validation",
]

_COLOURS = {  # seen on light and on dark pages
    TEACHER: "#808080",
    STUDENT: "#2b8ac6",
    CE_ONLY: "#d9822b",
    PEER: "#3f9e4d",
    TRAINED: "#a05195",
    AVERAGE: "#c9a227",
}
_SIZE = (4.6, 3.2)  # inches, of a figure of the page: letters are legible where it is as wide as a phone
_TASK_FORMS = {"retention": "{:.1f}".format, "kl": "{:.3f}".format}
_LONGEST = 40  # characters of a corpus' name on an axis
_LIKELIEST = 6  # tokens of a model's next-token distribution


def losses(student: Fitted, alone: Fitted | None) -> Figure:
    """Hard, soft and total loss of the student by step, and the hard loss of the one without a teacher."""
    figure, axes = _figure()
    for name, title, colour in (
        ("loss", "total", _COLOURS[STUDENT]),
        ("hard", "hard (labels)", "#2ca02c"),
        ("soft", "soft (teacher)", "#9467bd"),
    ):
        _line(axes, student.losses, name, title, colour)
    if alone is not None:
        _line(axes, alone.losses, "hard", f"hard, {CE_ONLY}", _COLOURS[CE_ONLY], "--")
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    return _with_legend_above(figure, axes)


def validation(fitted: Mapping[str, Fitted], teacher: float | None) -> Figure:
    """Validation perplexity by step, and the teacher's on held-out text as a line to reach for."""
    figure, axes = _figure()
    for name, one in fitted.items():
        _line(axes, one.validations, "eval_perplexity", name, _COLOURS[name])
    if teacher is not None:
        axes.axhline(teacher, color=_COLOURS[TEACHER], linestyle=":", label="teacher, held-out")
    axes.set(xlabel="step", ylabel="validation perplexity", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter("")
    return _with_legend_above(figure, axes)


def course(fitted: Mapping[str, Fitted], name: str, title: str) -> Figure:
    """What is logged under `name` by step, a line for each training that has it."""
    figure, axes = _figure()
    for model, one in fitted.items():
        if logged(one, name):
            _line(axes, one.losses, name, model, _COLOURS[model])
    axes.set(xlabel="step", ylabel=title, ylim=(0, 1.08 * axes.dataLim.ymax or 1))
    return _with_legend_above(figure, axes)


def logged(one: Fitted, name: str) -> bool:
    """Whether a training has a line with a number under `name`: there is no ratio where no teacher is listened to."""
    return any(math.isfinite(line.get(name, math.nan)) for line in one.losses)


def likeliest(contenders: Sequence[Contender], number: int) -> list[int]:
    """The tokens that any contender holds among its likeliest after a prompt, the first contender's likeliest first."""
    rows = [contender.next_tokens[number] for contender in contenders]
    tokens = {token for row in rows for token in row.topk(min(_LIKELIEST, len(row))).indices.tolist()}
    return sorted(tokens, key=lambda token: (-rows[0][token].item(), token))


def next_tokens(contenders: Sequence[Contender], number: int, decode: Callable[[int], str]) -> Figure:
    """Each contender's probabilities of the tokens that any of them finds likeliest after a prompt."""
    tokens = likeliest(contenders, number)
    figure, axes = _figure(1.0 + 0.08 * len(tokens) * (1 + len(contenders)))
    height = 0.8 / len(contenders)
    for place, contender in enumerate(contenders):
        probabilities = contender.next_tokens[number].softmax(-1)[tokens].tolist()
        at = [row + (place - (len(contenders) - 1) / 2) * height for row in range(len(tokens))]
        axes.barh(at, probabilities, height, color=_COLOURS[contender.name], label=contender.name)
    axes.set_yticks(range(len(tokens)), [_shown(decode(token)) for token in tokens])
    axes.invert_yaxis()  # the first on top
    axes.set(xlabel="probability")
    return _with_legend_above(figure, axes)


def tasks(contenders: Sequence[Contender], measure: str) -> Figure:
    """Retention or KL on each corpus of a mixture: a bar per student; the teacher's retention is a line at 100 %."""
    names = list(contenders[0].tasks)
    students = [one for one in contenders if one.name != TEACHER]
    figure, axes = _figure(1.0 + 0.26 * len(names) * (1 + len(students)))
    if measure == "retention":
        axes.axvline(100, color=_COLOURS[TEACHER], linestyle=":", label=TEACHER, zorder=0)
    for place, one in enumerate(students):
        values = [one.tasks[name].row()[measure] for name in names]
        at = [task * (len(students) + 1) + place + 0.5 for task in range(len(names))]
        lengths = [0.0 if value is None else value for value in values]
        bars = axes.barh(at, lengths, 0.9, color=_COLOURS[one.name], label=one.name)
        axes.bar_label(bars, ["–" if value is None else _TASK_FORMS[measure](value) for value in values], padding=3)
    for task, name in enumerate(names):  # above its bars, where it may be as long as the figure is wide
        height = task * (len(students) + 1) - 0.1
        axes.text(0.01, height, _shortened(name), transform=axes.get_yaxis_transform(), va="bottom", fontweight="bold")
    axes.set_yticks([])
    axes.set_ylim(len(names) * (len(students) + 1) - 0.8, -1)  # the first on top
    axes.margins(x=0.18)
    axes.set(xlabel={"retention": "retention, %", "kl": "KL to the teacher, nats per token"}[measure])
    return _with_legend_above(figure, axes)


def calibration(contenders: Sequence[Contender]) -> Figure:
    """How often the likeliest token is right, by how likely the model held it."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color="#b0b0b0", linewidth=1, label="perfect")
    for contender in contenders:
        bins = [row for row in contender.held_out.calibration if row[0] > 0]
        label = f"{contender.name} ({contender.held_out.calibration_error:.3f})"
        colour = _COLOURS[contender.name]
        axes.plot([row[1] for row in bins], [row[2] for row in bins], "o-", markersize=4, color=colour, label=label)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    return _with_legend_above(figure, axes)


def confidence(contenders: Sequence[Contender]) -> Figure:
    """How many tokens each bin of confidence has."""
    figure, axes = _figure()
    for contender in contenders:
        shares = [row[0] for row in contender.held_out.calibration]
        edges = [number / len(shares) for number in range(len(shares) + 1)]
        axes.stairs(shares, edges, color=_COLOURS[contender.name], linewidth=1.5, label=contender.name)
    axes.set(xlabel="confidence", ylabel="share of tokens", xlim=(0, 1), yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return _with_legend_above(figure, axes)


def sweep(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss and KL to the teacher at T = 1, by weight of the soft loss, a line per temperature."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2),
        (("loss", "validation cross-entropy, nats"), ("kl", "KL(teacher ‖ student) at T = 1, nats")),
        strict=True,
    ):
        for temperature in sorted({row["temperature"] for row in rows if row["soft_weight"] > 0}):
            # Without a soft loss there is no temperature: that point belongs to every line.
            mine = [row for row in rows if row["temperature"] == temperature or row["soft_weight"] == 0]
            points = sorted((row["soft_weight"], row[name]) for row in mine)
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"T = {temperature:g}")
        axes.set(xlabel="weight of the soft loss", ylabel=title)
        _finished(figure, axes)
    return figure


def ablation(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity and KL to the teacher of each row of a sweep, with standard deviations where there are several seeds.

    The best is on top.
    """
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(rows)), layout="constrained")
    grids = {_grid(row) for row in rows if row["teacher"] != "–"}
    names = [_kind(row, len(grids) > 1) for row in rows]
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("perplexity", "validation perplexity"), ("kl", "KL to the teacher, nats")),
        strict=True,
    ):
        values, spread = [row[name] for row in rows], [row.get(f"{name}_spread", 0.0) for row in rows]
        axes.errorbar(values, range(len(rows)), xerr=spread, fmt="o", capsize=4, color=_COLOURS[STUDENT])
        axes.set(xlabel=title, ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), names)
    return figure


def _kind(row: Mapping[str, Any], with_grid: bool) -> str:
    """What tells a row of a sweep from others, as a label."""
    if row["teacher"] == "–":
        return "labels alone"
    terms = "" if row["terms"] == "none" else f" + {row['terms']}"
    return figure_text(f"{row['teacher']}{terms}") + (f"\n{_grid(row)}" if with_grid else "")


def _grid(row: Mapping[str, Any]) -> str:
    return f"soft {row['soft_weight']:g}, T {row['temperature']:g}"


def progressive(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss of each stage's student, in order."""
    figure, axes = _figure()
    places = range(len(rows))
    axes.plot(places, [row["val_loss"] for row in rows], "o-", color=_COLOURS[STUDENT], label="student of the stage")
    names = [f"{figure_text(row['stage'])}\n{row['parameters'] / 1e6:,.3g} M" for row in rows]
    axes.set_xticks(places, names)
    axes.margins(x=0.15)
    axes.set(xlabel="stage, parameters of its student", ylabel="validation cross-entropy, nats")
    return _with_legend_above(figure, axes)


def temperatures(curves: Mapping[float, Sequence[float]], tokens: Sequence[str], title: str) -> Figure:
    """Probabilities of some tokens at several temperatures."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(curves)
    for place, (temperature, probabilities) in enumerate(curves.items()):
        at = [row + (place - (len(curves) - 1) / 2) * height for row in range(len(tokens))]
        colour = (0.12, 0.47, 0.71, 1 - 0.75 * place / max(len(curves) - 1, 1))
        axes.bar(at, probabilities, height, color=colour, label=f"T = {temperature:g}")
    axes.set_xticks(range(len(tokens)), [_shown(token) for token in tokens])
    axes.set(title=figure_text(title), ylabel="probability")
    return _finished(figure, axes)


def _shown(token: str) -> str:
    """A token as a label: blanks visible."""
    return figure_text(token.replace(" ", "␣")) or "∅"


def _shortened(name: str) -> str:
    """The name of a corpus as a label: its end, which tells files apart."""
    return figure_text(name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :])


def _figure(height: float = _SIZE[1]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    return figure, figure.subplots()


def _line(
    axes: Any, lines: Sequence[Mapping[str, float]], name: str, label: str, colour: str, style: str = "-"
) -> None:
    """What lines of a history say under `name`, with a point at each where they are few."""
    points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
    marker = "o" if len(points) < 25 else ""
    axes.plot(*zip(*points, strict=True), style, marker=marker, markersize=3.5, color=colour, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # of steps


def _with_legend_above(figure: Figure, axes: Any) -> Figure:
    """Where it hides no curve."""
    return _finished(figure, axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _finished(figure: Figure, axes: Any, **legend: Any) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, **legend)
    return figure
