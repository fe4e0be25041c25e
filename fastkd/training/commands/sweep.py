"""`fastkd sweep`: students of every weight and temperature of a grid, ranked by what does not depend on either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastkd import training
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import (
    TRAINED_TEACHER,
    DataOptions,
    DistillationOptions,
    EvaluationOptions,
    InputError,
    ModelOptions,
    Options,
    TrainingOptions,
    expand_home,
    option,
)
from fastkd.training.plain import visible

if TYPE_CHECKING:
    from fastkd.training.setup import Setup

__all__ = ["SweepOptions", "run", "sweep"]

_DESCRIPTION = """\
Train a student for every weight and temperature, and rank them by cross-entropy and KL to the teacher at T = 1.

Takes the options of fastkd distill beside the grid. Writes results.csv and sweep.png. With --resume, an interrupted
sweep keeps the students that are finished.

examples:
  fastkd sweep --alpha 0 0.5 1 --temperature 1 2 4
  fastkd sweep config.yaml --alpha 0.2 0.5 0.8 --alpha-on soft --cache-dir caches
  fastkd sweep runs/distill/config.yaml --resume
"""


@dataclass(frozen=True)
class SweepOptions:
    """The grid of `fastkd sweep`, in the place of DistillationOptions; every cell trains one student."""

    _argument_group_name: ClassVar[str] = "sweep"

    alpha: list[float] = option([0.0, 0.5, 1.0], "weights to try; alpha_on says of which loss, the other has the rest")
    alpha_on: Literal["soft", "hard"] = option("soft", "the loss that alpha multiplies")
    temperature: list[float] = option([1.0, 2.0, 4.0], "temperatures of the soft loss to try")
    divergence: str = option("forward_kl", "forward_kl, reverse_kl, jsd, ...: the names of fastkd's table")
    cache_dir: str = option("", "directory of caches, one for each temperature")
    cache_format: Literal["sampled", "topk"] = option("sampled", "what a cache keeps of each prediction")
    cache_tokens: int | None = option(None, "tokens that a cache keeps of each prediction [sampled: 12, topk: 64]")

    def __post_init__(self) -> None:
        expand_home(self, "cache_dir")

    def cells(self) -> list[DistillationOptions]:
        """One of each: without a soft loss there is no temperature. Raises InputError for impossible values."""
        found: dict[tuple[tuple[float, float], float | None], DistillationOptions] = {}
        for alpha in self.alpha:
            for temperature in self.temperature:
                cell = DistillationOptions(
                    temperature=temperature,
                    alpha=alpha,
                    alpha_on=self.alpha_on,
                    divergence=self.divergence,
                    cache_dir=f"{self.cache_dir}/temperature-{temperature:g}" if self.cache_dir else "",
                    cache_format=self.cache_format,
                    cache_tokens=self.cache_tokens,
                )
                found.setdefault((cell.weights, temperature if cell.needs_teacher else None), cell)
        return list(found.values())


def run(arguments: Sequence[str]) -> None:
    """`fastkd sweep`."""
    groups = (SweepOptions, ModelOptions, DataOptions, TrainingOptions, EvaluationOptions)
    grid, models, data, optimisation, evaluation, extra = Parser("sweep", _DESCRIPTION, groups).parse(arguments)
    if extra.print_config:
        print(dump((grid, models, data, optimisation, evaluation)), end="")
        return
    cells = grid.cells()
    if not cells:
        raise InputError("the grid is empty: give --alpha and --temperature")
    sweep(Options(models, data, cells[0], optimisation, evaluation), grid, extra.config)


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
        training.arguments.distillation_loss(cell)
    groups = (grid, options.models, options.data, options.training, options.evaluation)
    with training.run.claimed(options, "sweep", groups, config) as run:
        materials = training.setup.gather(options)
        output = run.begin(**materials.fingerprints())
        setup = training.setup.with_teacher(options, materials, on_validation=True)
        student = setup.student()
        run.pin(**setup.fingerprints(student))
        before = setup.judge.judge("student before", student)
        training.checks.check_better(setup.judge.teacher.held_out.loss, before.held_out.loss)
        rows = _ranked(_rows(setup, cells, output / training.run.CHECKPOINTS))
        with run.results() as staging:
            training.report.write_csv(staging / "results.csv", rows)
            draw = {"sweep.png": lambda path: training.plots.sweep(rows).savefig(path, dpi=110)}
            failed = training.report.write_each(staging, draw)
    shown = ("rank", "soft_weight", "hard_weight", "temperature", "loss", "kl", "top1_agreement")
    print("\n" + training.report.table([shown, *([_short(row[name]) for name in shown] for row in rows)]) + "\n")
    print(visible(f"saved to {run.output}: results.csv{'' if failed else ', sweep.png'}"))
    training.report.warn(failed, f"{run.output / 'results.csv'} has all that it would show")
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
        training.run.write_whole(file, json.dumps(rows))
        shutil.rmtree(checkpoints)
    return rows


def _row(setup: Setup, cell: DistillationOptions, directory: Path, count: str) -> dict[str, Any]:
    soft, hard = cell.weights
    print(f"student {count}: soft weight {soft:g}, hard weight {hard:g}, temperature {cell.temperature:g}")
    setup.options = setup.options._replace(distillation=cell)
    teacher = setup.teacher
    student = setup.student()
    given = training.lessons.lessons_of(setup, student)
    setup.teacher = teacher  # the next cell may need it
    kd = training.arguments.distillation_loss(cell, setup.counted)
    training.fit.fit(student, setup.materials.tokenizer, setup.materials.corpus, given, kd, setup.options, directory)
    found = setup.judge.judge(
        "student", training.adapters.merged(student, setup.materials.corpus.validation[:4], directory)
    )
    asked = {"soft_weight": soft, "hard_weight": hard, "temperature": cell.temperature}
    return {**asked, "loss": found.held_out.loss, **found.row()}


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = [{id(row): place for place, row in enumerate(sorted(rows, key=_by(name)))} for name in ("loss", "kl")]
    best = sorted(rows, key=lambda row: (sum(place[id(row)] for place in places), row["loss"]))
    return [{"rank": rank, **row} for rank, row in enumerate(best, 1)]


def _by(name: str) -> Any:
    return lambda row: row[name]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
