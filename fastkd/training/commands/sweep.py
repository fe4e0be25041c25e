"""`fastkd sweep`: students of every weight and temperature of a grid, ranked by what does not depend on either."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from fastkd import training
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import (
    TAKES,
    TRAINED_TEACHER,
    DataOptions,
    DistillationOptions,
    EvaluationOptions,
    InputError,
    ModelOptions,
    ModeOptions,
    Options,
    TeachingOptions,
    TrainingOptions,
    did_you_mean,
    expand_home,
    option,
    set_text,
    set_title,
    term_set,
    unfolded_sets,
)
from fastkd.training.plain import visible

if TYPE_CHECKING:
    from fastkd.training.judge import Contender
    from fastkd.training.lessons import Lessons
    from fastkd.training.setup import Setup

__all__ = ["SweepOptions", "run", "sweep"]

#: What several seeds have a spread of.
SPREAD = ("loss", "perplexity", "kl", "top1_agreement")

_DESCRIPTION = """\
Train a student for every weight and temperature, and rank them by cross-entropy and KL to the teacher at T = 1.

Takes the options of fastkd distill beside the grid. Writes results.csv, results.md and plots. With more than one of
--teacher-mode or --terms it is an ablation: one thing differs from the first of each. With --seeds every student is
trained once for each, and the table has the spread. With --resume, an interrupted sweep keeps the students that are
finished.

examples:
  fastkd sweep --alpha 0 0.5 1 --temperature 1 2 4
  fastkd sweep config.yaml --alpha 0.2 0.5 0.8 --alpha-on soft --cache-dir caches
  fastkd sweep --alpha 0 0.5 --temperature 1 --terms none hidden --teacher-mode frozen ema --seeds 0 1 2
  fastkd sweep runs/distill/config.yaml --resume
"""


class Cell(NamedTuple):
    """One kind of student of a sweep."""

    distillation: DistillationOptions
    teaching: TeachingOptions
    terms: str  # as they are shown, or none
    assistant: str = ""  # learns from the teacher first, and then teaches the student

    @property
    def mode(self) -> str:
        """How it is taught: a teacher's mode; progressive where there is an assistant; nothing on the labels alone."""
        if not self.distillation.needs_teacher and not self.teaching.terms:
            return "–"
        return "progressive" if self.assistant else self.teaching.teacher_mode

    def name(self) -> str:
        """What tells it from the other cells, for a line on the terminal."""
        soft, hard = self.distillation.weights
        grid = f"soft weight {soft:g}, hard weight {hard:g}, temperature {self.distillation.temperature:g}"
        return grid if self.mode == "–" else f"{grid}, teacher {self.mode}, terms {self.terms}"


@dataclass(frozen=True)
class SweepOptions(ModeOptions):
    """The grid of `fastkd sweep`, in the place of DistillationOptions; every cell trains one student."""

    _argument_group_name: ClassVar[str] = "sweep"
    unfolds: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {"terms": unfolded_sets}

    alpha: list[float] = option([0.0, 0.5, 1.0], "weights to try; alpha_on says of which loss, the other has the rest")
    alpha_on: Literal["soft", "hard"] = option("soft", "the loss that alpha multiplies")
    temperature: list[float] = option([1.0, 2.0, 4.0], "temperatures of the soft loss to try")
    divergence: str = option(
        "forward_kl", "forward_kl, reverse_kl, jsd, ...: a name of fastkd's table, or a sum: forward_kl:0.5+tvd:0.5"
    )
    teacher_mode: list[str] = option(
        ["frozen"],
        f"teachers to try, the first with all terms, the others with the first of them: {', '.join(TAKES)}",
    )
    terms: list[str] = option(
        ["none"],
        "sets of terms to try, each of them none, a term as fastkd distill takes it, several as hidden+attention, or a "
        "list in JSON; in a file also [hidden, attention]. A file's list in which none of these is none, has a + or is "
        "a list itself, is one set, as fastkd distill reads it",
    )
    assistant: str = option(
        "", "a model between teacher and student, named as student is: tried too, first as a student, then as teacher"
    )
    seeds: list[int] = option([], "train every student once for each of these [the one of --seed]")
    cache_dir: str = option("", "directory of caches, one for each temperature; for frozen teachers without terms")
    cache_format: Literal["sampled", "topk"] = option("sampled", "what a cache keeps of each prediction")
    cache_tokens: int | None = option(None, "tokens that a cache keeps of each prediction [sampled: 12, topk: 64]")

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "cache_dir", "assistant")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {self.seeds}: one is there twice")
        for mode in self.teacher_mode:
            if mode not in TAKES:
                raise InputError(f"teacher_mode has {mode!r}{did_you_mean(mode, TAKES)}; there are {', '.join(TAKES)}")
        self.check_taken(self.teacher_mode)
        object.__setattr__(self, "terms", [set_text(term_set(given)) for given in self.terms])
        self._check_taught()

    def _check_taught(self) -> None:
        """What is asked of teachers is refused where no student has one."""
        unsoft = 0.0 if self.alpha_on == "soft" else 1.0
        if set(self.alpha) != {unsoft}:
            return
        for name, nothing in (("teacher_mode", ["frozen"]), ("terms", ["none"]), ("assistant", "")):
            value = getattr(self, name)
            if value not in (nothing, []):
                raise InputError(
                    f"{name} is {value!r}, but alpha is {unsoft:g} on {self.alpha_on} alone, with which students have "
                    "no teacher: give an alpha that has a soft part"
                )

    def cells(self) -> list[Cell]:
        """One of each: without a soft loss there is no temperature. Raises InputError for impossible values."""
        found: dict[tuple[Any, ...], Cell] = {}
        for alpha in self.alpha:
            for temperature in self.temperature:
                for cell in self._taught(alpha, temperature):
                    learns = cell.mode != "–"
                    what = (temperature, cell.mode, cell.terms) if learns else ()
                    found.setdefault((cell.distillation.weights, *what), cell)
        return list(found.values())

    def _taught(self, alpha: float, temperature: float) -> Iterator[Cell]:
        """The cells of one weight and temperature: the first mode and terms, and what differs from them in one."""
        settings: dict[str, Any] = {
            "temperature": temperature,
            "alpha": alpha,
            "alpha_on": self.alpha_on,
            "divergence": self.divergence,
        }
        live = DistillationOptions(**settings)
        cached = live
        if self.cache_dir:
            place = f"{self.cache_dir}/temperature-{temperature:g}"
            settings |= {"cache_format": self.cache_format, "cache_tokens": self.cache_tokens, "cache_dir": place}
            cached = DistillationOptions(**settings)
        if not live.needs_teacher:
            yield Cell(cached, TeachingOptions(), "none")
            return
        sets = [(set_title(terms), terms) for terms in map(term_set, self.terms)]
        for mode in self.teacher_mode:
            for name, terms in sets if mode == self.teacher_mode[0] else sets[:1]:
                plain = mode in ("frozen", "cached") and not terms
                yield Cell(cached if plain else live, self.of_mode(mode, terms), name)
        if self.assistant:
            name, terms = sets[0]
            yield Cell(live, TeachingOptions(terms=terms), name, self.assistant)


def run(arguments: Sequence[str]) -> None:
    """`fastkd sweep`."""
    groups = (SweepOptions, ModelOptions, DataOptions, TrainingOptions, EvaluationOptions)
    grid, models, data, optimisation, evaluation, extra = Parser("sweep", _DESCRIPTION, groups).parse(arguments)
    if extra.print_config:
        print(dump((grid, models, data, optimisation, evaluation)), end="")
        return
    cells = grid.cells()
    if not cells:
        raise InputError("the grid is empty: give --alpha, --temperature, --teacher-mode and --terms")
    sweep(Options(models, data, cells[0].distillation, optimisation, evaluation), grid, extra.config)


def sweep(options: Options, grid: SweepOptions, config: str | None = None) -> list[dict[str, Any]]:
    """Train and judge a student per cell; returns the rows of results.csv, best first.

    All of one seed start from the same weights and see the same text in the same order. They are judged on validation
    text, so that held-out text is left to judge the chosen one; and ranked by the mean of their ranks in cross-entropy
    and in KL to the teacher at T = 1: training losses of different weights and temperatures cannot be compared.

    Raises InputError and KeyboardInterrupt as `distill` does; a sweep that is resumed keeps the rows of finished cells.
    """
    options = training.precision.decided(options)
    if options.models.teacher == TRAINED_TEACHER:
        raise InputError(
            f"a sweep needs a teacher that is there: train one with fastkd distill --teacher {TRAINED_TEACHER}, "
            "whose run has it in its folder 'teacher'"
        )
    cells, seeds = grid.cells(), grid.seeds or [options.training.seed]
    for cell in cells:
        training.arguments.distillation_loss(cell.distillation)
    groups = (grid, options.models, options.data, options.training, options.evaluation)
    with training.run.claimed(options, "sweep", groups, config) as run:
        materials = training.setup.gather(options)
        for cell in cells:
            asked = options._replace(distillation=cell.distillation, teaching=cell.teaching)
            _, tokenizer, ours = training.setup.check(asked)
            training.teaching_checks.check_length(asked, len(materials.corpus.train))
            if cell.assistant:
                _check_assistant(asked, cell, ours, tokenizer)
        output = run.begin(**materials.fingerprints())
        setup = training.setup.with_teacher(options, materials, on_validation=True)
        student = setup.student()
        run.pin(**setup.fingerprints(student))
        before = setup.judge.judge("student before", student)
        training.checks.check_better(setup.judge.teacher.held_out.loss, before.held_out.loss)
        rows = _ranked(_rows(setup, cells, seeds, output / training.run.CHECKPOINTS))
        with run.results() as staging:
            training.report.write_csv(staging / "results.csv", rows)
            (staging / "results.md").write_text(_markdown(rows, setup.judge.teacher), encoding="utf-8")
            first = next(((cell.mode, cell.terms) for cell in cells if cell.mode != "–"), ())
            plain = [row for row in rows if row["teacher"] == "–" or (row["teacher"], row["terms"]) == first]
            draw = {"sweep.png": lambda path: training.plots.sweep(plain).savefig(path, dpi=110)}
            if len(rows) > len(plain):
                draw["ablation.png"] = lambda path: training.plots.ablation(rows).savefig(path, dpi=110)
            failed = training.report.write_each(staging, draw)
    print("\n" + training.report.table(_table(rows)) + "\n")
    print(visible(f"saved to {run.output}: results.csv, results.md{'' if failed else ', ' + ', '.join(draw)}"))
    training.report.warn(failed, f"{run.output / 'results.csv'} has all that it would show")
    return rows


def _check_assistant(asked: Options, cell: Cell, student: Any, tokenizer: Any) -> None:
    """All that is checked of a student, and then of a teacher: it is both, after all other cells. Raises InputError."""
    place = "in the student's place"
    try:
        _, _, assistant = training.setup.check(asked._replace(models=_assisted(asked.models, cell)))
        place = "in the teacher's place"
        training.checks.common_vocabulary({"teacher": assistant, "student": student}, tokenizer)
        training.teaching_checks.check_terms(asked, student, assistant, tokenizer)
    except InputError as error:
        raise InputError(f"the assistant {cell.assistant!r}, {place}: {error}") from error


def _rows(setup: Setup, cells: list[Cell], seeds: list[int], work: Path) -> list[dict[str, Any]]:
    """A row per cell. What was found of finished students is kept in a file, with which a resumed sweep begins."""
    file = work / "rows.json"
    asked = [(cell, seed) for cell in cells for seed in seeds]
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if found:
        print(f"{len(found)} of {len(asked)} students are finished")
    for number, (cell, seed) in enumerate(asked[len(found) :], len(found) + 1):
        checkpoints = work / f"cell-{number}"
        print(f"student {number} of {len(asked)}: {cell.name()}{f', seed {seed}' if len(seeds) > 1 else ''}")
        found.append(_measured(setup, cell, seed, checkpoints))
        training.whole.write_whole(file, json.dumps(found))
        shutil.rmtree(checkpoints)
    return [_row(cell, found[place * len(seeds) :][: len(seeds)]) for place, cell in enumerate(cells)]


def _measured(setup: Setup, cell: Cell, seed: int, directory: Path) -> dict[str, Any]:
    """Train one student and judge it."""
    options = setup.options
    optimisation = replace(options.training, seed=seed)
    mine = replace(
        setup,
        options=options._replace(distillation=cell.distillation, teaching=cell.teaching, training=optimisation),
    )
    tokenizer = setup.materials.tokenizer
    mine.counted, _, _ = training.setup.configurations(mine.options, tokenizer)  # a cell may have teachers of its own
    student = mine.student()  # before the teacher is another: it may be made of it
    attention = setup.teacher.config._attn_implementation
    if cell.teaching.teacher_mode == "online":
        mine.teacher = copy.deepcopy(setup.teacher)  # the next cell needs it as it was
    if cell.assistant:
        mine.teacher = _assistant(mine, cell, directory / "assistant")
        configs = {"teacher": mine.teacher.config, "student": mine.student_config}
        mine.counted = training.checks.common_vocabulary(configs, tokenizer)
    _fit(mine, student, training.lessons.lessons_of(mine, student), directory)
    if setup.teacher.config._attn_implementation != attention:  # a term has asked for another
        setup.teacher.set_attn_implementation(attention)
    some = setup.materials.corpus.validation[:4]
    found = setup.judge.judge("student", training.adapters.merged(student, some, directory))
    return {"loss": found.held_out.loss, **found.row()}


def _assistant(setup: Setup, cell: Cell, directory: Path) -> Any:
    """A model that has learnt from the teacher, to teach in its place."""
    mine = replace(setup, options=setup.options._replace(models=_assisted(setup.options.models, cell)))
    mine.counted, mine.student_config, _ = training.setup.configurations(mine.options, setup.materials.tokenizer)
    assistant = mine.student()
    _fit(mine, assistant, training.lessons.lessons_of(mine, assistant), directory)
    return assistant.eval().requires_grad_(False)


def _assisted(models: ModelOptions, cell: Cell) -> ModelOptions:
    return replace(models, student=cell.assistant, student_layers="", student_width=0)


def _fit(setup: Setup, student: Any, given: Lessons, directory: Path) -> None:
    kd = training.arguments.distillation_loss(setup.options.distillation, setup.counted)
    materials = setup.materials
    training.fit.fit(student, materials.tokenizer, materials.corpus, given, kd, setup.options, directory)


def _row(cell: Cell, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the students of one cell have in the mean; of several seeds also standard deviations."""
    soft, hard = cell.distillation.weights
    asked = {"soft_weight": soft, "hard_weight": hard, "temperature": cell.distillation.temperature}
    columns = {name: [one[name] for one in found] for name in found[0]}
    means = {
        name: None if None in values else statistics.fmean(values) if len(values) > 1 else values[0]
        for name, values in columns.items()
    }
    spread = {}
    if len(found) > 1:
        spread = {f"{name}_spread": statistics.stdev(columns[name]) for name in SPREAD}
    return {**asked, "teacher": cell.mode, "terms": cell.terms, **means, **spread}


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A header, then what is shown of each row."""
    several = len({(row["teacher"], row["terms"]) for row in rows}) > 1
    taught = ("teacher", "terms") if several else ()
    shown = ("rank", "soft_weight", "hard_weight", "temperature", *taught, "loss", "perplexity", "kl", "top1_agreement")
    return [list(shown), *([_short(row, name) for name in shown] for row in rows)]


def _markdown(rows: Sequence[Mapping[str, Any]], teacher: Contender) -> str:
    header, *lines = _table(rows)
    spread = "; ± is the standard deviation over seeds" if f"{SPREAD[0]}_spread" in rows[0] else ""
    return "\n".join(
        [
            f"On validation text, on which the teacher's perplexity is {teacher.held_out.perplexity:,.1f}{spread}.",
            "",
            "| " + " | ".join(header) + " |",
            "|---" * len(header) + "|",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = [{id(row): place for place, row in enumerate(sorted(rows, key=_by(name)))} for name in ("loss", "kl")]
    best = sorted(rows, key=lambda row: (sum(place[id(row)] for place in places), row["loss"]))
    return [{"rank": rank, **row} for rank, row in enumerate(best, 1)]


def _by(name: str) -> Any:
    return lambda row: row[name]


def _short(row: Mapping[str, Any], name: str) -> str:
    value, spread = row[name], row.get(f"{name}_spread")
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"
