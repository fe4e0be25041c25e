"""Students of every weight and temperature of a grid, ranked by what does not depend on either."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastkd.training import checks, plots, report
from fastkd.training.command_options import SweepOptions
from fastkd.training.distill import whole
from fastkd.training.fit import distillation_loss, fit
from fastkd.training.lessons import lessons
from fastkd.training.options import TRAINED_TEACHER, DistillationOptions, InputError, Options
from fastkd.training.run import CHECKPOINTS, check_output, results, working
from fastkd.training.setup import Setup, gather, with_teacher

__all__ = ["sweep"]


def sweep(options: Options, grid: SweepOptions) -> list[dict[str, Any]]:
    """Train and judge a student per cell; returns the rows of results.csv, best first.

    All start from the same weights and see the same text in the same order. They are judged on validation text, so
    that held-out text is left to judge the chosen one; and ranked by the mean of their ranks in cross-entropy and in
    KL to the teacher at T = 1: training losses of different weights and temperatures cannot be compared.
    """
    if options.training.resume:
        raise InputError("a sweep cannot be resumed: leave --resume away")
    if options.models.teacher == TRAINED_TEACHER:
        raise InputError(
            f"a sweep needs a teacher that is there: train one with fastkd distill --teacher {TRAINED_TEACHER}, "
            "whose run has it in its folder 'teacher'"
        )
    check_output(options)
    cells = grid.cells()
    for cell in cells:
        distillation_loss(cell)
    materials = gather(options)
    with working(options) as output:
        setup = with_teacher(options, materials, on_validation=True)
        before = setup.judge.judge("student before", setup.student())
        checks.check_better(setup.judge.teacher.held_out.loss, before.held_out.loss)
        rows = [_row(setup, cell, output, f"{number} of {len(cells)}") for number, cell in enumerate(cells, 1)]
        rows = _ranked(rows)
        shutil.rmtree(output / CHECKPOINTS)
        with results(output) as staging:
            report.write_csv(staging / "results.csv", rows)
            plots.sweep(rows).savefig(staging / "sweep.png", dpi=110)
    shown = ("rank", "soft_weight", "hard_weight", "temperature", "loss", "kl", "top1_agreement")
    print("\n" + report.table([shown, *([_short(row[name]) for name in shown] for row in rows)]) + "\n")
    print(f"saved to {output}: results.csv, sweep.png")
    return rows


def _row(setup: Setup, cell: DistillationOptions, output: Path, count: str) -> dict[str, Any]:
    soft, hard = cell.weights
    print(f"student {count}: soft weight {soft:g}, hard weight {hard:g}, temperature {cell.temperature:g}")
    setup.options = setup.options._replace(distillation=cell)
    teacher = setup.teacher
    given = lessons(setup)
    setup.teacher = teacher  # the next cell may need it
    student, directory = setup.student(), output / CHECKPOINTS
    shutil.rmtree(directory, ignore_errors=True)
    kd = distillation_loss(cell, setup.counted)
    fit(student, setup.materials.tokenizer, setup.materials.corpus, given, kd, setup.options, directory)
    found = setup.judge.judge("student", whole(student))
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
