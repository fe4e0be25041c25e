"""`fastkd distill`: distil a causal language model into a smaller one, and show what came of it. Read it top to bottom.

The order: check all that can be checked without work; get the teacher and see what it makes of held-out text; write
its predictions into a cache, if there is to be one; train; train without a teacher, to compare; judge; report.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from fastkd import training
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import GROUPS, TRAINED_TEACHER, DistillationOptions, Options, TeachingOptions
from fastkd.training.plain import visible

if TYPE_CHECKING:
    from fastkd.training.fit import Fitted
    from fastkd.training.judge import Contender
    from fastkd.training.lessons import Lessons
    from fastkd.training.run import Run
    from fastkd.training.setup import Materials, Setup

__all__ = ["LABELS_ALONE", "distill", "run"]

_DESCRIPTION = """\
Train a small causal language model on a frozen teacher's predictions and the labels.

With no options, the packaged SmolLM2-135M teaches a GPT-2 of 16 M parameters on the packaged IMDB reviews. The run's
directory gets the student in Hugging Face format, metrics.json, results.csv, samples.md, report.html and config.yaml.

examples:
  fastkd distill
  fastkd distill --teacher gpt2-medium --data reviews.jsonl --size full --epochs 5 --output runs/reviews
  fastkd distill config.yaml --temperature 3 --cache-dir cache
  fastkd distill runs/reviews/config.yaml --resume
"""

#: Models that learn beside the student: (name of the contender, folder a training leaves it in, folder of the run).
_BESIDE = (
    ("second student", "peer", "peer"),
    ("teacher after training", "teacher", "trained-teacher"),
    ("moving average", "ema", "ema"),
)
LABELS_ALONE = DistillationOptions(soft_weight=0.0, hard_weight=1.0)


def run(arguments: Sequence[str]) -> None:
    """`fastkd distill`."""
    *groups, extra = Parser("distill", _DESCRIPTION, GROUPS).parse(arguments)
    if extra.print_config:
        print(dump(groups), end="")
        return
    distill(Options(*groups), extra.config)


def distill(options: Options, config: str | None = None) -> dict[str, Any]:
    """Run the distillation, print its report and return what metrics.json says.

    `config` is the file that the options were read from. Raises InputError, before any training and with nothing
    written, where the options cannot be met; after Ctrl-C KeyboardInterrupt, whose text says what resumes the run. A
    report that cannot be made is no failure of the run, which has its student: a warning names what is missing.
    """
    training.launcher.check_launch("distill", several=True)
    with training.launcher.quiet():
        processes = training.joining.joined(options.models)
        options = processes.of_first(lambda: training.precision.decided(options))
        with training.run.claimed(options, config=config, processes=processes) as run:
            return _distilled(options, run)


def _distilled(options: Options, run: Run) -> dict[str, Any]:
    started, processes, judge = time.perf_counter(), run.processes, training.judge
    materials = processes.agree(lambda: training.setup.gather(options))
    output = run.begin(**materials.fingerprints(), number_of_processes=str(processes.size))
    taught = options
    if options.models.teacher == TRAINED_TEACHER:
        _train_teacher(options, materials, run)
        taught, options = (_taught_by(options, folder / "teacher") for folder in (output, run.output))
    setup = processes.agree(lambda: training.setup.with_teacher(taught, materials, processes=processes))
    setup.options = options  # they name a trained teacher by the place where it ends up
    student = processes.agree(setup.student)
    run.pin(**setup.fingerprints(student))
    before = processes.agree(lambda: _before(setup, student))

    clock = time.perf_counter()
    # What is cut from the teacher is cut before the teacher learns, or is loaded in another precision.
    early = setup.student() if options.models.cut and options.evaluation.ce_baseline else None
    given = processes.agree(lambda: training.lessons.lessons_of(setup, student))
    run.pin(**training.teaching.fingerprints(given.teacher))
    seconds = {"cache": time.perf_counter() - clock}
    work, some = output / training.run.CHECKPOINTS, materials.corpus.validation[:4]
    fitted = {judge.STUDENT: _fit(setup, student, given, options, work / "student")}
    listens = given.listens
    student = training.sharding.whole(student, setup.materials.device)
    del given  # a teacher, a second student or an average: the rest is done without them
    training.lessons.free(setup)
    merged = partial(training.adapters.merged, windows=some, saves=processes.first)
    students = {judge.STUDENT: processes.agree(lambda: merged(student, directory=work / "student"))}
    if options.evaluation.ce_baseline:
        alone = early or setup.student()
        without = options._replace(
            distillation=LABELS_ALONE, teaching=TeachingOptions(), training=_as_long(options, fitted[judge.STUDENT])
        )
        plain = training.lessons.labels_alone(materials.corpus)
        fitted[judge.CE_ONLY] = _fit(setup, alone, plain, without, work / "ce-only")
        alone = training.sharding.whole(alone, setup.materials.device)
        students[judge.CE_ONLY] = processes.agree(lambda: merged(alone, directory=work / "ce-only"))
    beside = processes.of_first(lambda: _save(run, materials, students, work))
    contenders = processes.agree(lambda: _contenders(setup, students, beside))

    def conclude() -> dict[str, Any]:
        cost = _flops(setup, fitted[judge.STUDENT], listens)
        lines = [*judge.verdict(contenders, before), *_cost_lines(cost)]
        spent = seconds | {name: one.seconds for name, one in fitted.items()}
        record = _record(setup, before, contenders, fitted, lines) | {"flops": cost}
        record["differences"] = judge.differences(contenders, options.training.seed)
        record["seconds"] = spent | {"total": time.perf_counter() - started}
        _report(run, setup, contenders, fitted, lines, record)
        return record

    return processes.of_first(conclude)


def _before(setup: Setup, student: Any) -> Contender:
    """The student before training, which has something to learn from the teacher."""
    options = setup.options
    before = setup.judge.judge("student before", student)
    if options.learns and not options.teaching.of_itself:
        training.checks.check_better(setup.judge.teacher.held_out.loss, before.held_out.loss)
    _introduce(setup, before)
    return before


def _save(run: Run, materials: Materials, students: dict[str, Any], work: Path) -> dict[str, Path]:
    """Put the students into the run, first of all results: nothing that follows costs them.

    Returns where the models that learnt beside the student are, by the names of their contenders.
    """
    beside = {name: (work / "student" / left, to) for name, left, to in _BESIDE if (work / "student" / left).is_dir()}
    with run.results() as staging:
        for name, model in students.items():
            folder = staging if name == training.judge.STUDENT else staging / "ce-only"
            model.save_pretrained(folder)
            materials.tokenizer.save_pretrained(folder)
        for of_terms in (work / "student").glob("*.safetensors"):  # such as heads that predict further ahead
            shutil.copy2(of_terms, staging)
        for source, place in beside.values():
            shutil.copytree(source, staging / place)
            materials.tokenizer.save_pretrained(staging / place)
    return {name: kept for name, (kept, _) in beside.items()}


def _contenders(setup: Setup, students: dict[str, Any], beside: dict[str, Path]) -> list[Contender]:
    """The teacher, the students, and what learnt beside them, judged."""
    contenders = [setup.judge.teacher, *(setup.judge.judge(name, model) for name, model in students.items())]
    for name, kept in beside.items():
        models = replace(setup.options.models, teacher=str(kept), teacher_dtype="float32", teacher_quantization="none")
        contenders.append(setup.judge.judge(name, training.loading.load_teacher(models, setup.materials.device)))
    return contenders


def _report(
    run: Run,
    setup: Setup,
    contenders: list[Contender],
    fitted: dict[str, Fitted],
    lines: list[str],
    record: dict[str, Any],
) -> None:
    options = setup.options
    with run.results() as staging:
        title = f"{options.models.teacher} → {options.models.student_name}: {run.output.name}"
        failed = training.report.write(
            staging, title, contenders, fitted, lines, options, setup.materials.tokenizer, record
        )
    training.report.print_results(contenders, lines, options.evaluation.metrics)
    page = run.output / "report.html"
    print(visible(f"saved to {run.output} after {record['seconds']['total']:.0f} s; see {page}"))
    again = shlex.join(["fastkd", "eval", str(run.output)])
    training.report.warn(
        failed, f"the student is saved all the same; {again} writes a report into {run.output / 'eval'}"
    )


def _introduce(setup: Setup, before: Contender) -> None:
    teacher, student = setup.judge.teacher, before
    if setup.options.models.cut:
        print(visible(f"student: made of {setup.options.models.student_name}"))
    print(
        f"student: {student.parameters:,} parameters on {setup.materials.device}, "
        f"{student.parameters / teacher.parameters:.2%} of the teacher's {teacher.parameters:,}; perplexity on "
        f"held-out text {student.held_out.perplexity:,.1f} against the teacher's {teacher.held_out.perplexity:,.1f}"
    )
    if teacher.parameters < 2 * student.parameters:
        print(
            f"note: the teacher has {teacher.parameters / student.parameters:.1f} times the student's parameters; "
            "teachers at least 2 to 3 times as large are usual"
        )


def _train_teacher(options: Options, materials: Materials, run: Run) -> None:
    """Train a GPT-2 on the labels of the corpus and save it in the run's folder `teacher`, unless it is there."""
    if run.processes.of_first((run.directory / "teacher" / "config.json").exists):
        return
    transformers.set_seed(options.training.seed)
    teacher = training.loading.teacher_to_train(materials.tokenizer).to(materials.device)
    print(f"teacher: {teacher.num_parameters():,} parameters, trained on the labels first")
    given = training.lessons.labels_alone(materials.corpus)
    alone = options._replace(distillation=LABELS_ALONE, teaching=TeachingOptions())
    checkpoints = run.directory / training.run.CHECKPOINTS / "teacher"
    training.fit.fit(
        teacher,
        materials.tokenizer,
        materials.corpus,
        given,
        training.arguments.distillation_loss(LABELS_ALONE),
        alone,
        checkpoints,
    )
    teacher = training.sharding.whole(teacher, materials.device)

    def save() -> None:
        with run.results() as staging:
            teacher.save_pretrained(staging / "teacher")
            materials.tokenizer.save_pretrained(staging / "teacher")

    run.processes.first_alone(save)


def _taught_by(options: Options, teacher: Path) -> Options:
    return options._replace(models=replace(options.models, teacher=str(teacher)))


def _fit(setup: Setup, student: Any, given: Lessons, options: Options, directory: Path) -> Fitted:
    kd = training.arguments.distillation_loss(options.distillation, setup.counted)
    return training.fit.fit(student, setup.materials.tokenizer, setup.materials.corpus, given, kd, options, directory)


def _flops(setup: Setup, student: Fitted, listens: bool) -> dict[str, float]:
    """Of the teacher's forwards, once per window where there is a cache, and of the student's training.

    Nothing where others than the teacher teach, or where it learns.
    """
    if setup.options.teaching.teacher_mode not in ("frozen", "cached"):
        return {}
    options, teacher = setup.options.distillation, setup.judge.teacher.parameters
    read = setup.materials.corpus.train.numel() if options.cache_dir else student.tokens
    trained = training.evaluation.flops(student.tokens, 0, student.parameters)
    return {
        "teacher": training.evaluation.flops(0, teacher, 0, read) if listens else 0.0,
        "student": trained,
    }


def _cost_lines(cost: dict[str, float]) -> list[str]:
    if not cost:
        return []
    share = cost["teacher"] / cost["student"]
    return [
        f"training took {sum(cost.values()):.2e} floating-point operations, {cost['teacher']:.2e} of them by the "
        f"teacher: {1 + share:.1f} times as many as the labels alone"
    ]


def _as_long(options: Options, fitted: Fitted) -> Any:
    """Training options of as many steps, all of them: an early stop of the student is a shorter training here."""
    return replace(options.training, epochs=None, max_steps=fitted.steps, early_stopping_patience=0)


def _record(
    setup: Setup,
    before: Contender,
    contenders: list[Contender],
    fitted: dict[str, Fitted],
    lines: list[str],
) -> dict[str, Any]:
    """What metrics.json says."""
    return {
        "models": {one.name: one.record() for one in (before, *contenders)},
        "student": setup.options.models.student_name,
        "verdict": lines,
        "training": {
            name: {
                "steps": one.steps,
                "tokens": one.tokens,
                "seconds": one.seconds,
                "tokens_per_second": one.tokens / one.seconds,
                "history": one.history,
            }
            for name, one in fitted.items()
        },
        **training.machine.made_on(setup.materials.device),
        "peak_memory": training.machine.peak_memory(setup.materials.device),
        "options": {name: asdict(group) for name, group in setup.options._asdict().items()},
    }
