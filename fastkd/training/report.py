"""The evidence of a run, as files: metrics.json, results.csv, samples.md and report.html, which is one file.

A file or figure that cannot be made costs nothing else: the others are written, and a warning names it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.training.fit import Fitted
from fastkd.training.judge import STUDENT, Contender
from fastkd.training.options import EvaluationOptions, Options
from fastkd.training.plain import markdown, visible
from fastkd.training.report_page import failure, page
from fastkd.training.report_tables import MEASURES, TASK_MEASURES, results
from fastkd.training.run import METRICS_FILE

__all__ = ["print_results", "result_table", "table", "warn", "write", "write_csv", "write_each"]


def result_table(contenders: Sequence[Contender], metrics: Sequence[str]) -> list[list[str]]:
    """A header, then a row of texts per contender."""
    columns, rows = results(contenders, metrics)
    return [["", *(column.title for column in columns[1:])], *([cell.text for cell in row] for row in rows)]


def print_results(contenders: Sequence[Contender], lines: Sequence[str], metrics: Sequence[str]) -> None:
    """The result table, turned so that it fits a terminal; that of each corpus of a mixture; and the verdict."""
    print("\n" + table(list(zip(*result_table(contenders, metrics), strict=True))) + "\n")
    if contenders[0].tasks:
        print(visible(table(_task_table(contenders))) + "\n")
    print("".join(f"- {line}\n" for line in lines))


def _task_table(contenders: Sequence[Contender]) -> list[list[str]]:
    """A header, then a row of texts per corpus and measure, so that it fits a terminal too."""
    rows = [["", *(one.name for one in contenders)]]
    for task in contenders[0].tasks:
        for name in TASK_MEASURES:
            values = [one.tasks[task].row()[name] for one in contenders]
            column = MEASURES[name]
            rows.append([f"{task}: {column.title}", *("–" if one is None else column.form(one) for one in values)])
    return rows


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
    rows = [row for one in contenders for row in _rows(one)]
    undrawn: list[str] = []

    def decode(token: int) -> str:
        return str(tokenizer.decode([token]))

    def html() -> str:
        return page(title, contenders, fitted, lines, options, decode, record, undrawn)

    story = fitted.get(STUDENT)
    files: dict[str, Callable[[Path], None]] = {
        METRICS_FILE: lambda path: _write(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n"),
        "results.csv": lambda path: write_csv(path, rows),
        "samples.md": lambda path: _write(path, _samples(contenders, story, options.evaluation)),
        "report.html": lambda path: _write(path, html()),
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
            failed.append(failure(name, error))
    return failed


def warn(failed: Sequence[str], again: str) -> None:
    """Say on stderr what could not be made; `again` says what is saved nevertheless, and how to make the rest."""
    for one in failed:
        print(visible(f"fastkd: warning: {one}"), file=sys.stderr)
    if failed:
        print(visible(f"fastkd: warning: {again}"), file=sys.stderr)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a lone surrogate: JSON's own escape


def _rows(contender: Contender) -> Iterator[dict[str, Any]]:
    """A row of results.csv; of a mixture, one for each of its corpora too, told apart by the column `task`."""
    model = {"model": contender.name}
    size = {"parameters": contender.parameters}
    whole = {**size, **contender.row(), **_bounds(contender.intervals)}
    if not contender.tasks:
        yield model | whole
        return
    yield {**model, "task": "mixture", **whole}
    for name, task in contender.tasks.items():
        bounds = _bounds({key: task.intervals.get(key) for key in contender.intervals})
        yield {**model, "task": name, **size, **task.row(), **bounds}


def _bounds(intervals: Mapping[str, list[float] | None]) -> dict[str, float | None]:
    """The ends of intervals as columns, such as perplexity_low and perplexity_high."""
    found: dict[str, float | None] = {}
    for name, ends in intervals.items():
        found[f"{name}_low"], found[f"{name}_high"] = (None, None) if ends is None else ends
    return found


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
