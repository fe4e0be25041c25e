"""`fastkd eval`: a saved student beside its teacher and, where there is one, the student without a teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import training
from fastkd.training.configuration import Parser
from fastkd.training.options import GROUPS, TRAINED_TEACHER, InputError, Options, TeachingOptions, at_home
from fastkd.training.plain import visible

if TYPE_CHECKING:
    from fastkd.processes import Processes
    from fastkd.training.judge import Contender
    from fastkd.training.setup import Setup

__all__ = ["evaluate", "run"]

_DESCRIPTION = """\
Judge a student beside its teacher, on held-out and on other text, and write a report into its folder 'eval'.

Options begin as the run's config.yaml has them, so that the text is split as it was; those of the training have no
effect but for the seed.

examples:
  fastkd eval runs/demo
  fastkd eval runs/demo --out-of-domain news.txt --eval-windows 500
  fastkd eval ./my-student --teacher gpt2-large --data reviews.jsonl --baseline ./my-other-student
"""


def run(arguments: Sequence[str]) -> None:
    """`fastkd eval`."""
    parser = Parser("eval", _DESCRIPTION, GROUPS, config=False)
    parser.add("model", metavar="STUDENT", help="directory of a finished run, or of any model with its tokenizer")
    parser.add("--baseline", metavar="DIRECTORY", help="a model to compare with; a run's ce-only, if it has one")
    config = Path(parser.named(arguments).model).expanduser() / "config.yaml"
    *groups, extra = parser.parse(arguments, str(config) if config.is_file() else None)
    baseline = extra.baseline and at_home(extra.baseline, "--baseline")
    evaluate(at_home(extra.model, "STUDENT"), Options(*groups), baseline)


def evaluate(student: str, options: Options, baseline: str | None = None) -> dict[str, Any]:
    """Judge the model in the directory `student`, print the table and write the report into its folder `eval`.

    `baseline` is a model to compare with; by default the one that a run with ce_baseline left. Several processes
    judge together, and the first one writes. Raises InputError.
    """
    training.launcher.check_launch("eval", several=True)
    with training.launcher.quiet():
        processes = training.joining.joined(options.models)
        started = time.perf_counter()
        made = f" ({options.models.student_name})" if options.models.cut else ""
        setup, contenders = processes.agree(lambda: _judged(student, options, baseline, processes))
        return processes.of_first(lambda: _written(student, made, setup, contenders, started))


def _judged(
    student: str, options: Options, baseline: str | None, processes: Processes
) -> tuple[Setup, list[Contender]]:
    """The teacher, the student and the one to compare with."""
    directory, judge = Path(student), training.judge
    if not (directory / "config.json").is_file():
        unfinished = directory / training.run.CONFIG_FILE
        has = f"an unfinished run: see its {unfinished.name}" if unfinished.is_file() else "no config.json"
        raise InputError(f"{student} holds no model ({has}); name the directory of a finished run or of a model")
    if baseline is None and (directory / "ce-only" / "config.json").is_file():
        baseline = str(directory / "ce-only")
    options = _of_saved(student, options)
    setup = training.setup.with_teacher(options, training.setup.gather(options), processes=processes)
    contenders = [setup.judge.teacher, setup.judge.judge(judge.STUDENT, setup.student())]
    if baseline is not None:
        models = replace(setup.options.models, student=baseline)
        other = training.loading.load_student(models, None, setup.materials.device)
        contenders.append(setup.judge.judge(judge.CE_ONLY, other))
    return setup, contenders


def _of_saved(student: str, options: Options) -> Options:
    """Options that load the student as it is, and train nothing."""
    models = replace(
        options.models,
        student=student,
        student_layers="",
        student_width=0,
        from_scratch=False,
        lora_rank=0,
        lora_targets=[],
    )
    if models.teacher == TRAINED_TEACHER:
        models = replace(models, teacher=str(Path(student) / "teacher"))
    without_cache = replace(options.distillation, cache_dir="")
    return options._replace(models=models, distillation=without_cache, teaching=TeachingOptions())


def _written(student: str, made: str, setup: Setup, contenders: list[Contender], started: float) -> dict[str, Any]:
    """Write the report and print the table; returns what metrics.json says."""
    directory, judge, options = Path(student), training.judge, setup.options
    lines = judge.verdict(contenders)
    record = {
        "models": {one.name: one.record() for one in contenders},
        "student": f"{student}{made}",
        "verdict": lines,
        "differences": judge.differences(contenders, options.training.seed),
        **training.machine.made_on(setup.materials.device),
        "seconds": {"total": time.perf_counter() - started},
    }
    if not (directory / "eval").exists():
        (directory / "eval").mkdir()
        training.run.note_files(directory, ["eval"])
    with training.whole.results(directory / "eval") as staging:
        title = f"{options.models.teacher} and {student}{made}"
        failed = training.report.write(
            staging, title, contenders, {}, lines, options, setup.materials.tokenizer, record
        )
    training.report.print_results(contenders, lines, options.evaluation.metrics)
    print(visible(f"saved to {directory / 'eval'}"))
    training.report.warn(failed, "the rest is there; the same command makes it again")
    return record
