"""Students of every weight and temperature of a grid, ranked by what does not depend on either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fastkd.training import checks, plots, report
from fastkd.training.adapters import merged
from fastkd.training.command_options import SweepOptions
from fastkd.training.fit import distillation_loss, fit
from fastkd.training.lessons import lessons
from fastkd.training.options import TRAINED_TEACHER, DistillationOptions, InputError, Options
from fastkd.training.plain import visible
from fastkd.training.run import CHECKPOINTS, claimed, write_whole
from fastkd.training.setup import Setup, gather, with_teacher

__all__ = ["sweep"]


def sweep(options: Options, grid: SweepOptions, config: str | None = None) -> list[dict[str, Any]]:
    """Train and judge a student per cell; returns the rows of results.csv, best first.

    All start from the same weights and see the same text in the same order. They are judged on validation text, so
    that held-out text is left to judge the chosen one; and ranked by the mean of their ranks in cross-entropy and in
    KL to the teacher at T = 1: training losses of different weights and temperatures cannot be compared.

    Raises InputError and KeyboardInterrupt as `distill` does; a sweep that is resumed keeps the rows of finished cells.
    """
    if options.models.teacher == TRAINED_TEACHER:
        raise InputError(
            f"a sweep needs a teacher that is there: train one with fastkd distill --teacher {TRAINED_TEACHER}, "
            "whose run has it in its folder 'teacher'"
        )
    cells = grid.cells()
    for cell in cells:
        distillation_loss(cell)
    groups = (grid, options.models, options.data, options.training, options.evaluation)
    with claimed(options, "sweep", groups, config) as run:
        materials = gather(options)
        output = run.begin(**materials.fingerprints())
        setup = with_teacher(options, materials, on_validation=True)
        student = setup.student()
        run.pin(**setup.fingerprints(student))
        before = setup.judge.judge("student before", student)
        checks.check_better(setup.judge.teacher.held_out.loss, before.held_out.loss)
        rows = _ranked(_rows(setup, cells, output / CHECKPOINTS))
        with run.results() as staging:
            report.write_csv(staging / "results.csv", rows)
            draw = {"sweep.png": lambda path: plots.sweep(rows).savefig(path, dpi=110)}
            failed = report.write_each(staging, draw)
    shown = ("rank", "soft_weight", "hard_weight", "temperature", "loss", "kl", "top1_agreement")
    print("\n" + report.table([shown, *([_short(row[name]) for name in shown] for row in rows)]) + "\n")
    print(visible(f"saved to {run.output}: results.csv{'' if failed else ', sweep.png'}"))
    report.warn(failed, f"{run.output / 'results.csv'} has all that it would show")
    return rows


def _rows(setup: Setup, cells: list[DistillationOptions], work: Path) -> list[dict[str, Any]]:
    """A row per cell. Those of finished cells are kept in a file, with which a resumed sweep begins."""
    file = work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if rows:
        print(f"{len(rows)} of {len(cells)} students are finished")
    for number, cell in enumerate(cells[len(rows) :], len(rows) + 1):
        checkpoints = work / f"cell-{number}"
        rows.append(_row(setup, cell, checkpoints, f"{number} of {len(cells)}"))
        write_whole(file, json.dumps(rows))
        shutil.rmtree(checkpoints)
    return rows


def _row(setup: Setup, cell: DistillationOptions, directory: Path, count: str) -> dict[str, Any]:
    soft, hard = cell.weights
    print(f"student {count}: soft weight {soft:g}, hard weight {hard:g}, temperature {cell.temperature:g}")
    setup.options = setup.options._replace(distillation=cell)
    teacher = setup.teacher
    given = lessons(setup)
    setup.teacher = teacher  # the next cell may need it
    student = setup.student()
    kd = distillation_loss(cell, setup.counted)
    fit(student, setup.materials.tokenizer, setup.materials.corpus, given, kd, setup.options, directory)
    found = setup.judge.judge("student", merged(student, setup.materials.corpus.validation[:4], directory))
    settings = {"soft_weight": soft, "hard_weight": hard, "temperature": cell.temperature}
    return {**settings, "loss": found.held_out.loss, **found.row()}


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = [{id(row): place for place, row in enumerate(sorted(rows, key=_by(name)))} for name in ("loss", "kl")]
    best = sorted(rows, key=lambda row: (sum(place[id(row)] for place in places), row["loss"]))
    return [{"rank": rank, **row} for rank, row in enumerate(best, 1)]


def _by(name: str) -> Any:
    return lambda row: row[name]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
