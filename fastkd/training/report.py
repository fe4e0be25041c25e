"""The evidence of a run, as files: metrics.json, results.csv, samples.md and report.html, which is one file.

A file or figure that cannot be made costs nothing else: the others are written, and a warning names it.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastkd.training import plots
from fastkd.training.configuration import dump
from fastkd.training.fit import Fitted
from fastkd.training.judge import CE_ONLY, STUDENT, Contender
from fastkd.training.options import EvaluationOptions, Options
from fastkd.training.plain import markdown, visible
from fastkd.training.run import METRICS_FILE

__all__ = ["print_results", "result_table", "table", "warn", "write", "write_csv", "write_each"]

_TITLES: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("perplexity", "{:,.1f}".format),
    "out_of_domain_perplexity": ("out-of-domain perplexity", "{:,.1f}".format),
    "kl": ("KL(teacher ‖ student)", "{:.3f}".format),
    "top1_agreement": ("top-1 agreement", "{:.1%}".format),
    "top5_agreement": ("top-5 agreement", "{:.1%}".format),
    "probability_correlation": ("probability correlation", "{:.3f}".format),
    "calibration_error": ("calibration error", "{:.3f}".format),
    "retention": ("retention", "{:.1f} %".format),
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child, .text td { text-align: left } img { max-width: 100% }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto } .text td { vertical-align: top }"""


def result_table(contenders: Sequence[Contender], metrics: Sequence[str]) -> list[list[str]]:
    """A header, then a row of texts per contender."""
    rows = [["", "parameters", *(_TITLES[name][0] for name in metrics)]]
    for contender in contenders:
        values = contender.row()
        cells = ["–" if (value := values[name]) is None else _TITLES[name][1](value) for name in metrics]
        rows.append([contender.name, f"{contender.parameters:,}", *cells])
    return rows


def print_results(contenders: Sequence[Contender], lines: Sequence[str], metrics: Sequence[str]) -> None:
    """The result table, turned so that it fits a terminal, and the verdict."""
    print("\n" + table(list(zip(*result_table(contenders, metrics), strict=True))) + "\n")
    print("".join(f"- {line}\n" for line in lines))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Texts in columns: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def write(
    directory: Path,
    title: str,
    contenders: Sequence[Contender],
    fitted: dict[str, Fitted],
    lines: Sequence[str],
    options: Options,
    tokenizer: Any,
    record: dict[str, Any],
) -> list[str]:
    """All files of the report. `fitted` is by contender's name; `lines` are the verdict; `record` is metrics.json.

    Returns what could not be made, and why, for `warn`.
    """
    rows = [{"model": one.name, "parameters": one.parameters, **one.row()} for one in contenders]
    undrawn: list[str] = []

    def page() -> str:
        def decode(token: int) -> str:
            return str(tokenizer.decode([token]))

        return _page(title, contenders, fitted, lines, options, decode, undrawn)

    story = fitted.get(STUDENT)
    files: dict[str, Callable[[Path], None]] = {
        METRICS_FILE: lambda path: _write(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n"),
        "results.csv": lambda path: write_csv(path, rows),
        "samples.md": lambda path: _write(path, _samples(contenders, story, options.evaluation)),
        "report.html": lambda path: _write(path, page()),
    }
    return write_each(directory, files) + undrawn


def write_each(directory: Path, files: Mapping[str, Callable[[Path], None]]) -> list[str]:
    """Have each file written by its function; returns what failed, and why. A failed file is not there."""
    failed = []
    for name, writer in files.items():
        try:
            writer(directory / name)
        except Exception as error:  # whatever it is, what was trained is worth more
            (directory / name).unlink(missing_ok=True)
            failed.append(_failure(name, error))
    return failed


def warn(failed: Sequence[str], again: str) -> None:
    """Say on stderr what could not be made; `again` says what is saved nevertheless, and how to make the rest."""
    for failure in failed:
        print(visible(f"fastkd: warning: {failure}"), file=sys.stderr)
    if failed:
        print(visible(f"fastkd: warning: {again}"), file=sys.stderr)


def _failure(name: str, error: Exception) -> str:
    return f"{name} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a lone surrogate: JSON's own escape


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """`rows` have the same keys, which are the columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _samples(contenders: Sequence[Contender], fitted: Fitted | None, evaluation: EvaluationOptions) -> str:
    """Markdown. Continuations of each prompt: by each contender, and by the student in the course of its training."""
    lines = ["# Samples", f"\n{evaluation.sample_tokens} new tokens, top_p {evaluation.top_p}."]
    for number, prompt in enumerate(evaluation.prompts):
        lines.append(f"\n## {markdown(prompt)}\n")
        told = [(f"student, step {step}", texts) for step, texts in (fitted.samples if fitted else [])]
        told += [(contender.name, contender.samples) for contender in contenders]
        lines += [f"- **{name}**: {markdown(texts[number])}" for name, texts in told if texts]
    return "\n".join(lines) + "\n"


def _page(
    title: str,
    contenders: Sequence[Contender],
    fitted: dict[str, Fitted],
    lines: Sequence[str],
    options: Options,
    decode: Callable[[int], str],
    undrawn: list[str],
) -> str:
    """HTML without outside references. A figure that cannot be drawn is added to `undrawn`."""

    def image(draw: Callable[[], Figure], alternative: str) -> str:
        try:
            return _image(draw(), alternative)
        except Exception as error:  # the rest of the page is worth more
            undrawn.append(_failure(f"the figure of {alternative}", error))
            return f"<p>{_text(undrawn[-1])}</p>"

    evaluation = options.evaluation
    student = next(contender for contender in contenders if contender.name == STUDENT)
    parts = [f"<h1>{_text(title)}</h1>", _table(result_table(contenders, evaluation.metrics))]
    parts.append("<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>")
    if STUDENT in fitted:
        alone = fitted.get(CE_ONLY)
        teacher = next((one.held_out.perplexity for one in contenders if one.name == "teacher"), None)
        parts += ["<h2>Training</h2>", image(lambda: plots.losses(fitted[STUDENT], alone), "losses by step")]
        parts.append(image(lambda: plots.validation(fitted, teacher), "validation perplexity by step"))
    expected = image(lambda: plots.next_tokens(contenders, evaluation.prompts, decode), "next-token distributions")
    parts += ["<h2>What the models expect next</h2>", expected]
    parts += ["<h2>Calibration</h2>", image(lambda: plots.calibration(contenders), "calibration")]
    if student.samples:
        rows = [["prompt", *(contender.name for contender in contenders)]]
        rows += [
            [prompt, *(contender.samples[number] for contender in contenders)]
            for number, prompt in enumerate(evaluation.prompts)
        ]
        parts += ["<h2>Samples</h2>", _table(rows, "text")]
    parts += ["<h2>Configuration</h2>", f"<pre>{_text(dump(options))}</pre>"]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def _text(text: str) -> str:
    """Any text as HTML that shows it."""
    return html.escape(visible(text))


def _table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<table class="{kind}">{line(rows[0], "th")}' + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def _image(figure: Figure, alternative: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_text(alternative)}" src="data:image/png;base64,{data}">'
