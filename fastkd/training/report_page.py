"""report.html: what came of a run, on one page without outside references, for wide screens and for phones.

Every section begins with a sentence that says what to look for. A table defines its columns below itself.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fastkd.training import plots
from fastkd.training.bootstrap import RESAMPLES
from fastkd.training.configuration import dump
from fastkd.training.evaluation import Finding
from fastkd.training.fit import Fitted
from fastkd.training.inline_svg import inline_svg
from fastkd.training.judge import CE_ONLY, STUDENT, TEACHER, Contender
from fastkd.training.options import Options
from fastkd.training.plain import visible
from fastkd.training.report_tables import INTERVAL, Cell, Column, Table, comparison, results, tasks, trainings

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --faint: #666; --line: #ddd; --box: #f6f6f6;
  --good: #176f35; --good-back: #e2f4e7; --bad: #a3161b; --bad-back: #fce6e6 }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e4e4e4; --faint: #a0a0a0; --line: #3a3d42;
  --box: #212429; --good: #7fd69a; --good-back: #173322; --bad: #ff9b98; --bad-back: #421c1e } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78em; margin: 0 auto; padding: 1em; overflow-wrap: anywhere;
  color: var(--text); background: var(--back) }
h1 { font-size: 1.6em; line-height: 1.25; margin: .6em 0 .2em }
h2 { font-size: 1.25em; margin: 2em 0 .3em; border-top: 1px solid var(--line); padding-top: .8em }
h3 { font-size: 1em; margin: 1.2em 0 .3em }
.look, .summary, dd, figcaption, small, summary { color: var(--faint) } .look { margin: 0 0 1em; max-width: 52em }
.scroll { overflow-x: auto; overflow-wrap: normal }
table { border-collapse: collapse; margin: .3em 0; font-size: .95em }
.scroll + .look { margin-top: .7em } .figures + .scroll { margin-top: 1.5em }
td, th { padding: .4em .6em; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { vertical-align: bottom; font-weight: 600 } td { white-space: nowrap; font-variant-numeric: tabular-nums }
th small { font-weight: 400 } td:first-child, th:first-child { text-align: left } small { display: block }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--back) }
dl { font-size: .87em; margin: .5em 0; display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: .25em 1em }
dt { font-weight: 600; max-width: 14em } dd { margin: 0; max-width: 52em } dl.facts, dl.said { font-size: 1em }
dl.facts dd, dl.said dd { color: var(--text) }
.verdict { list-style: none; padding: 0 } .verdict li { margin: .5em 0; display: flex; gap: .7em;
  align-items: baseline }
.mark { flex: none; min-width: 7.6em; text-align: center; font-size: .8em; font-weight: 700; padding: .15em .6em;
  border-radius: .3em; border: 1px solid var(--line); color: var(--faint) }
.pass { color: var(--good); background: var(--good-back); border-color: currentColor }
.fail { color: var(--bad); background: var(--bad-back); border-color: currentColor }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23em), 1fr)); gap: 1.2em }
figure { margin: 0; min-width: 0 } figcaption { font-size: .87em } svg { display: block; width: 100%;
  height: auto; overflow: visible }
svg * { stroke-linejoin: round; stroke-linecap: butt }
pre { background: var(--box); padding: 1em; overflow-x: auto; font-size: .87em; overflow-wrap: normal }
@media (max-width: 40em) { body { padding: .7em } dl { grid-template-columns: minmax(0, 1fr); gap: 0 }
  dt { max-width: none } dd { margin-bottom: .5em } .verdict li { flex-direction: column; gap: .2em }
  td, th { padding: .35em .5em } }
"""
_BOOTSTRAP = (
    f"The small numbers are the {INTERVAL}: percentile bootstrap, {RESAMPLES:,} draws of as many windows as there are, "
    "with replacement. It says how far another sample of this text could move the value, not how far another training "
    "would. With fewer than about 20 windows it is too narrow."
)


def page(
    title: str,
    contenders: Sequence[Contender],
    fitted: Mapping[str, Fitted],
    lines: Sequence[str],
    options: Options,
    decode: Callable[[int], str],
    record: Mapping[str, Any],
    undrawn: list[str],
) -> str:
    """The HTML. `record` is what metrics.json says. A figure that cannot be drawn is added to `undrawn`, and said."""

    def figure(name: str, caption: str, draw: Callable[[], Figure]) -> str:
        try:
            drawing = inline_svg(draw(), name, visible(caption))
        except Exception as error:  # the rest of the page is worth more
            undrawn.append(failure(f"the figure of {name.replace('-', ' ')}", error))
            drawing = f"<p>{_text(undrawn[-1])}</p>"
        return f"<figure><figcaption>{_text(caption)}</figcaption>{drawing}</figure>"

    sections = [
        _section("Verdict", "Look for crosses first: each line is a goal, and what to try where it is missed.")
        + _verdict(lines),
        _section(
            "Results",
            "Look at how close the student comes to the teacher, and whether it is ahead of the student without one.",
        )
        + _table(results(contenders, options.evaluation.metrics), _BOOTSTRAP),
    ]
    if contenders[0].tasks:
        look = (
            "Look for a corpus on which the student has much less of the teacher's gain than on the others: a larger "
            "weight in the mixture, or more of its text, may help. All other numbers of this page are of the mixture."
        )
        sections.append(_section("Each task", look) + _figures(_tasks(contenders, figure)) + _table(tasks(contenders)))
    if record.get("differences"):
        look = "Look at the last column: it says whether the student differs from another model by more than chance."
        sections.append(_section("Student against the others", look) + _table(comparison(record["differences"])))
    if STUDENT in fitted:
        look = "Look for losses that still fall at the end (train longer) and for jumps (a smaller learning rate)."
        sections.append(_section("Training", look) + _figures(_training(fitted, contenders, figure)))
        sections.append(_table(trainings(record.get("training", {}))))
    prompts = options.evaluation.prompts
    expected = (
        figure(
            f"next-token-{number}",
            f"after “{prompt}”",
            lambda number=number: plots.next_tokens(contenders, number, decode),  # type: ignore[misc]
        )
        for number, prompt in enumerate(prompts)
    )
    look = (
        "Look for long bars of one model alone: there it expects what the others do not. The tokens are those that any "
        "of the models holds among its likeliest; ␣ is a blank."
    )
    if prompts:
        sections.append(_section("What the models expect next", look) + _figures(expected))
    look = "Look for points below the diagonal: there a model is surer than it is right."
    drawn = (
        figure(
            "calibration",
            "How often the likeliest token is right, by how sure the model is of it. In brackets: calibration error.",
            lambda: plots.calibration(contenders),
        ),
        figure(
            "confidence",
            "How sure the model is: the share of held-out tokens in each of 15 bins of confidence.",
            lambda: plots.confidence(contenders),
        ),
    )
    sections.append(_section("Calibration", look) + _figures(drawn))
    if contenders[0].samples:
        look = f"Look for text that reads like the teacher's. Drawn with top_p {options.evaluation.top_p}, a seed each."
        sections.append(_section("Samples", look) + _samples(contenders, prompts))
    look = "Look here before you compare with another run: times and sizes depend on these."
    sections.append(_section("The run", look) + _facts(_run(record, contenders, options)))
    look = "Look up any option; <code>config.yaml</code> in the same folder has the same text."
    sections.append(_section("Configuration", look) + f"<pre>{_text(dump(options))}</pre>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join([f"<h1>{_text(title)}</h1>", f'<p class="summary">{_summary(record, contenders)}</p>', *sections])
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def failure(name: str, error: Exception) -> str:
    """What is said of a part of the report that could not be made."""
    return f"{name} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"


def _tasks(contenders: Sequence[Contender], figure: Callable[[str, str, Callable[[], Figure]], str]) -> Iterable[str]:
    for name, caption in (
        ("retention", "Retention by task: % of the teacher's gain over the frequencies of the corpus' tokens."),
        ("kl", "KL(teacher ‖ student) by task, nats per token: 0 where both predict alike."),
    ):
        yield figure(f"tasks-{name}", caption, lambda name=name: plots.tasks(contenders, name))  # type: ignore[misc]


def _training(
    fitted: Mapping[str, Fitted],
    contenders: Sequence[Contender],
    figure: Callable[[str, str, Callable[[], Figure]], str],
) -> Iterable[str]:
    student = fitted[STUDENT]
    teacher = next((one.held_out.perplexity for one in contenders if one.name == TEACHER), None)
    yield figure(
        "losses",
        "Training losses, means since the last point. Total is their weighted sum; soft has the factor T².",
        lambda: plots.losses(student, fitted.get(CE_ONLY)),
    )
    yield figure(
        "validation",
        "Perplexity on validation text. The checkpoint that is lowest here is kept.",
        lambda: plots.validation(fitted, teacher),
    )
    for name, title, caption in (
        (
            "ratio",
            "hard ÷ soft loss",
            "Hard loss divided by soft loss, before their weights: which of them pulls harder.",
        ),
        *((name, name, f"{name}: of a term or a teacher that learns, before its weight.") for name in student.beside),
        ("learning_rate", "learning rate", "Learning rate: it rises during warm-up, then follows its schedule."),
        ("grad_norm", "gradient norm", "Norm of the gradient before clipping. Peaks go with jumps of the loss."),
    ):
        drawn = {model: one for model, one in fitted.items() if plots.logged(one, name)}
        if drawn:
            yield figure(
                name.replace("_", "-"),
                caption,
                lambda drawn=drawn, name=name, title=title: plots.course(drawn, name, title),  # type: ignore[misc]
            )


def _run(record: Mapping[str, Any], contenders: Sequence[Contender], options: Options) -> Iterable[tuple[str, str]]:
    """Facts of the run, as far as they are recorded: what, and its value with its unit."""
    machine, seconds = record.get("machine", {}), record.get("seconds", {})
    if record.get("student"):
        yield "student", str(record["student"])
    if machine:
        yield "processor", f"{machine['processor']}, cores: {machine['cores']}, threads: {machine['threads']}"
        yield "device", str(machine["device"])
        yield "system", str(machine["system"])
    if record.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    if "total" in seconds:
        yield "wall time", f"{seconds['total']:,.1f} s for the whole command"
    if options.distillation.cache_dir and "cache" in seconds:
        yield "teacher's cache", f"{seconds['cache']:,.1f} s of it to write or find the teacher's predictions"
    judged = contenders[0]
    for name, measures in (("held-out text", judged.held_out), ("out-of-domain text", judged.out_of_domain)):
        if measures is not None:
            yield name, _size(measures.record())


def _size(measures: Mapping[str, Any]) -> str:
    return f"{measures['windows']:,} windows, {measures['tokens']:,} predicted tokens"


def _summary(record: Mapping[str, Any], contenders: Sequence[Contender]) -> str:
    said = [f"judged on {_size(contenders[0].held_out.record())}"]
    for one in [record.get("training", {}).get(STUDENT)]:
        if one is not None:
            said.append(f"trained on {one['tokens']:,} tokens, {one['tokens_per_second']:,.0f} tokens/s")
    if "total" in record.get("seconds", {}):
        said.append(f"{record['seconds']['total']:,.0f} s in all")
    return _text(" · ".join(said))


def _text(text: str) -> str:
    """Any text as HTML that shows it."""
    return html.escape(visible(text))


def _section(title: str, look: str) -> str:
    return f'<h2>{title}</h2><p class="look">{look}</p>'


def _figures(drawn: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(drawn)}</div>'


def _mark(met: bool | None, word: str) -> str:
    """A word in a box: green with a tick, red with a cross, or grey."""
    kind, sign = {True: ("pass", "✓ "), False: ("fail", "✗ "), None: ("note", "")}[met]
    return f'<span class="mark {kind}">{sign}{_text(word)}</span>'


def _verdict(lines: Sequence[str]) -> str:
    items = []
    for line in lines:
        met = line.met if isinstance(line, Finding) else None
        word, _, rest = line.partition(": ")
        if not word.isupper():  # a line without a word of its own
            word, rest = {True: "MET", False: "MISSED", None: "NOTE"}[met], line
        items.append(f"<li>{_mark(met, word)}<span>{_text(rest)}</span></li>")
    return f'<ul class="verdict">{"".join(items)}</ul>'


def _table(table: Table, note: str = "") -> str:
    """The table in a box that scrolls, then what its columns are."""

    def head(column: Column) -> str:
        below = {"lower": "↓ lower is better", "higher": "↑ higher is better", "": ""}[column.better]
        return f"<th>{_text(column.title)}" + (f"<small>{below}</small>" if below else "") + "</th>"

    def cell(one: Cell) -> str:
        text = _text(one.text) if one.met is None else _mark(one.met, one.text)
        return f"<td>{text}" + (f"<small>{_text(one.small)}</small>" if one.small else "") + "</td>"

    header = "".join(map(head, table.columns))
    rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows)
    meanings = [
        (column.title, f"{column.meaning} Unit: {column.unit}." if column.unit else column.meaning)
        for column in table.columns
    ]
    explained = f'<p class="look">{_text(note)}</p>' if note else ""
    shown = f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"{shown}{explained}{_facts(meanings, 'columns')}"


def _facts(facts: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    return f'<dl class="{kind}">{items}</dl>'


def _samples(contenders: Sequence[Contender], prompts: Sequence[str]) -> str:
    """Each prompt, and below it how each model continues it."""
    parts = []
    for number, prompt in enumerate(prompts):
        told = ((one.name, one.samples[number]) for one in contenders if one.samples)
        parts.append(f"<h3>{_text(prompt)} …</h3>{_facts(told, 'said')}")
    return "".join(parts)
