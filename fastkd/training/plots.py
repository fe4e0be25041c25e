"""The figures of the reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from fastkd.training.fit import Fitted
from fastkd.training.judge import CE_ONLY, STUDENT, TEACHER, Contender
from fastkd.training.plain import figure_text

__all__ = ["calibration", "losses", "next_tokens", "sweep", "temperatures", "validation"]

_COLOURS = {TEACHER: "#555555", STUDENT: "#1f77b4", CE_ONLY: "#d9822b"}
_SHOWN = 8  # tokens of a next-token distribution


def losses(student: Fitted, alone: Fitted | None) -> Figure:
    """Hard, soft and total loss of the student by step, and the hard loss of the one without a teacher."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in student.losses]
    for name, title, colour, style in (
        ("loss", "total", "#1f77b4", "-"),
        ("hard", "hard (labels)", "#2ca02c", "-"),
        ("soft", "soft (teacher, T² included)", "#9467bd", "-"),
    ):
        axes.plot(steps, [line[name] for line in student.losses], style, color=colour, label=title)
    if alone is not None:
        lines = alone.losses
        axes.plot(
            [line["step"] for line in lines],
            [line["hard"] for line in lines],
            "--",
            color=_COLOURS[CE_ONLY],
            label=f"hard, {CE_ONLY}",
        )
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    return _finished(figure, axes)


def validation(fitted: Mapping[str, Fitted], teacher: float | None) -> Figure:
    """Validation perplexity by step, and the teacher's on held-out text as a line to reach for."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, one in fitted.items():
        points = [(line["step"], line["eval_perplexity"]) for line in one.validations]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, color=_COLOURS.get(name), label=name)
    if teacher is not None:
        axes.axhline(teacher, color=_COLOURS[TEACHER], linestyle=":", label="teacher (held-out text)")
    axes.set(xlabel="step", ylabel="validation perplexity", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    return _finished(figure, axes)


def next_tokens(contenders: Sequence[Contender], prompts: Sequence[str], decode: Callable[[int], str]) -> Figure:
    """Each contender's probabilities of the teacher's likeliest tokens after each prompt."""
    figure = Figure(figsize=(9, 2.6 * len(prompts)), layout="constrained")
    height = 0.8 / len(contenders)
    for axes, number in zip(figure.subplots(len(prompts), 1, squeeze=False)[:, 0], range(len(prompts)), strict=True):
        first = contenders[0].next_tokens[number]
        tokens = first.topk(min(_SHOWN, len(first))).indices.tolist()
        for place, contender in enumerate(contenders):
            probabilities = contender.next_tokens[number].softmax(-1)[tokens].tolist()
            at = [row + (place - (len(contenders) - 1) / 2) * height for row in range(len(tokens))]
            axes.bar(at, probabilities, height, color=_COLOURS.get(contender.name), label=contender.name)
        axes.set_xticks(range(len(tokens)), [_shown(decode(token)) for token in tokens])
        axes.set(title=f"after “{figure_text(prompts[number])}”", ylabel="probability")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


def calibration(contenders: Sequence[Contender]) -> Figure:
    """How often the likeliest token is right, by how likely the model held it; and how many tokens that is."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    right, shares = figure.subplots(1, 2)
    right.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="perfect")
    for contender in contenders:
        bins = [row for row in contender.held_out.calibration if row[0] > 0]
        label = f"{contender.name} ({contender.held_out.calibration_error:.3f})"
        colour = _COLOURS.get(contender.name)
        right.plot([row[1] for row in bins], [row[2] for row in bins], "o-", markersize=4, color=colour, label=label)
        width = 1 / len(contender.held_out.calibration)
        edges = [number * width for number in range(len(contender.held_out.calibration) + 1)]
        shares.stairs([row[0] for row in contender.held_out.calibration], edges, color=colour, linewidth=1.5)
    right.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    shares.set(xlabel="confidence", ylabel="share of tokens", xlim=(0, 1), yscale="log")
    shares.spines[["top", "right"]].set_visible(False)
    _finished(figure, right).axes[0].legend(frameon=False, loc="upper left")
    return figure


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


def _finished(figure: Figure, axes: Any) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
