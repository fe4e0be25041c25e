"""The evidence of a run, as files: metrics.json, results.csv, samples.md and report.html, which is one file."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastkd.training import plots
from fastkd.training.configuration import dump
from fastkd.training.fit import Fitted
from fastkd.training.judge import CE_ONLY, STUDENT, Contender
from fastkd.training.options import EvaluationOptions, Options
from fastkd.training.run import METRICS_FILE

__all__ = ["print_results", "result_table", "table", "write", "write_csv"]

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
) -> None:
    """All files of the report. `fitted` is by contender's name; `lines` are the verdict; `record` is metrics.json."""
    rows = [{"model": one.name, "parameters": one.parameters, **one.row()} for one in contenders]
    write_csv(directory / "results.csv", rows)
    _write_samples(directory / "samples.md", contenders, fitted.get(STUDENT), options.evaluation)
    page = _page(title, contenders, fitted, lines, options, lambda token: str(tokenizer.decode([token])))
    (directory / "report.html").write_text(page, encoding="utf-8")
    (directory / METRICS_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """`rows` have the same keys, which are the columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_samples(
    path: Path, contenders: Sequence[Contender], fitted: Fitted | None, evaluation: EvaluationOptions
) -> None:
    """Continuations of each prompt: by each contender, and by the student in the course of its training."""
    lines = ["# Samples", f"\n{evaluation.sample_tokens} new tokens, top_p {evaluation.top_p}."]
    for number, prompt in enumerate(evaluation.prompts):
        lines.append(f"\n## {prompt}\n")
        told = [(f"student, step {step}", texts) for step, texts in (fitted.samples if fitted else [])]
        told += [(contender.name, contender.samples) for contender in contenders]
        lines += [f"- **{name}**: {' '.join(texts[number].split())}" for name, texts in told if texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _page(
    title: str,
    contenders: Sequence[Contender],
    fitted: dict[str, Fitted],
    lines: Sequence[str],
    options: Options,
    decode: Callable[[int], str],
) -> str:
    """HTML without outside references."""
    evaluation = options.evaluation
    student = next(contender for contender in contenders if contender.name == STUDENT)
    parts = [f"<h1>{html.escape(title)}</h1>", _table(result_table(contenders, evaluation.metrics))]
    parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")
    if STUDENT in fitted:
        alone = fitted.get(CE_ONLY)
        teacher = next((one.held_out.perplexity for one in contenders if one.name == "teacher"), None)
        parts += ["<h2>Training</h2>", _image(plots.losses(fitted[STUDENT], alone), "losses by step")]
        parts.append(_image(plots.validation(fitted, teacher), "validation perplexity by step"))
    parts += ["<h2>What the models expect next</h2>"]
    parts.append(_image(plots.next_tokens(contenders, evaluation.prompts, decode), "next-token distributions"))
    parts += ["<h2>Calibration</h2>", _image(plots.calibration(contenders), "calibration")]
    if student.samples:
        rows = [["prompt", *(contender.name for contender in contenders)]]
        rows += [
            [prompt, *(contender.samples[number] for contender in contenders)]
            for number, prompt in enumerate(evaluation.prompts)
        ]
        parts += ["<h2>Samples</h2>", _table(rows, "text")]
    parts += ["<h2>Configuration</h2>", f"<pre>{html.escape(dump(options))}</pre>"]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def _table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<table class="{kind}">{line(rows[0], "th")}' + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def _image(figure: Figure, alternative: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'
