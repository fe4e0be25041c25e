"""`fastkd progressive`: one student after the other, each taught by the one before it.

A stage is an ordinary run of `fastkd distill` in a directory of the output, in a process of its own: when it ends, the
system has all its memory back, whatever libraries keep. The student that it leaves is the next one's teacher.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import training
from fastkd.training.configuration import Parser, dump, dump_over
from fastkd.training.options import GROUPS, InputError, Options, ProgressiveOptions, TrainingOptions
from fastkd.training.plain import visible

if TYPE_CHECKING:
    from fastkd.training.run import Run

__all__ = ["Stage", "progressive", "run", "stages_of"]

_DESCRIPTION = """\
Train one student after the other, each on the predictions of the one before it.

The file has the options of fastkd distill that all stages share, the first one's teacher among them, and a list of
stages with their own. Each is a run of fastkd distill in a directory of the output, and a process of its own. A stage
that is finished is not run again: with --resume, an interrupted one is resumed. Writes progressive.json, results.csv,
progressive.md and progressive.png.

  teacher: gpt2-large
  data: reviews.jsonl
  output: runs/stages
  stages:
    - {name: medium, student: medium.json, tokens: 4_000_000}
    - {name: small, student: small.json, tokens: 2_000_000, temperature: 2}

examples:
  fastkd progressive stages.yaml
  fastkd progressive runs/stages/config.yaml --resume
"""

#: Options that are of the whole, not of a stage.
_WHOLE = ("teacher", "output", "overwrite", "resume")
_JSON, _TABLE, _PLOT = "progressive.json", "progressive.md", "progressive.png"
_MIB = 1 << 20
_REFUSED, _INTERRUPTED = 2, 130  # statuses of fastkd.cli
#: Column of the table → how it is shown.
_SHOWN = {
    "stage": "{}",
    "parameters": "{:,}",
    "tokens": "{:,}",
    "val_loss": "{:.4f}",
    "perplexity": "{:,.2f}",
    "kl": "{:.4f}",
    "seconds": "{:,.0f}",
    "peak_mib": "{:,.0f}",
    "left_mib": "{:,.0f}",
}


@dataclass(frozen=True)
class Stage:
    """A run of `fastkd distill`. Its teacher and its output are known when the run's directory is."""

    name: str
    options: Options


def run(arguments: Sequence[str]) -> None:
    """`fastkd progressive`."""
    asked, *common, extra = Parser("progressive", _DESCRIPTION, (ProgressiveOptions, *GROUPS)).parse(arguments)
    if extra.print_config:
        print(dump((asked, *common)), end="")
        return
    progressive(Options(*common), asked, extra.config)


def progressive(common: Options, asked: ProgressiveOptions, config: str | None = None) -> list[dict[str, Any]]:
    """Run the stages that are not finished; returns the rows of results.csv, one a stage.

    `val_loss` is the cross-entropy on validation text of the student that a stage leaves; `peak_mib` what its process
    held at most, `left_mib` what this one holds when it has ended. Raises InputError, with nothing trained or written,
    where any stage cannot be what it is asked to be; KeyboardInterrupt as `distill` does; ChildProcessError, with the
    finished stages kept, where a stage fails.
    """
    if common.training.overwrite:
        raise InputError("a progressive run does not replace an earlier one: name another --output, or delete it")
    stages = stages_of(common, asked)
    # As they were understood, with absolute paths: what config.yaml has, from which the run is resumed anywhere.
    asked = replace(asked, stages=[json.dumps(_own(stage, common)) for stage in stages], tokens=None)
    with training.run.claimed(common, "progressive", (asked, *common), config) as whole:
        _check(stages, common, whole.output)
        output = whole.begin()
        rows: list[dict[str, Any]] = []
        for number, stage in enumerate(stages, 1):
            rows.append(_row(whole, stage, f"{number} of {len(stages)}", _teacher(stages, number - 1, common, output)))
        with whole.results() as staging:
            training.report.write_csv(staging / "results.csv", rows)
            table = [list(_SHOWN), *([_text(row, name) for name in _SHOWN] for row in rows)]
            files = {
                _TABLE: lambda path: path.write_text(_markdown(table), encoding="utf-8"),
                _PLOT: lambda path: training.plots.progressive(rows).savefig(path, dpi=110),
            }
            failed = training.report.write_each(staging, files)
    print("\n" + training.report.table(table) + "\n")
    print(visible(f"saved to {whole.output}: {_JSON}, results.csv, {_TABLE}, {_PLOT}, and a directory for each stage"))
    training.report.warn(failed, f"{whole.output / 'results.csv'} has all that it would show")
    return rows


def stages_of(common: Options, asked: ProgressiveOptions) -> list[Stage]:
    """The options of each stage. Raises InputError for what is no option, no stage's, or contradicts itself."""
    if not asked.stages:
        raise InputError("there are no stages: name a file that has a list of them under 'stages'")
    for option in ("epochs", "max_steps"):
        length, unasked = (getattr(group, option) for group in (common.training, TrainingOptions()))
        if asked.tokens is not None and length not in (None, unasked):
            raise InputError(f"tokens is {asked.tokens} and {option} is {length:g}: they exclude each other, give one")
    parser, found = Parser("distill", "", GROUPS, config=False), []
    for mapping in asked.mappings():
        name, tokens = mapping.pop("name"), mapping.pop("tokens", None)
        try:
            found.append(Stage(name, _options(parser, common, mapping, name, tokens, asked.tokens)))
        except InputError as error:
            raise InputError(f"stage {name!r}: {error}") from error
    return found


def _options(
    parser: Parser, common: Options, mapping: dict[str, Any], name: str, tokens: int | None, tokens_of_all: int | None
) -> Options:
    given = parser.names(mapping)
    for option in _WHOLE:
        if option in given:
            raise InputError(f"{option} is of the whole run: give it beside 'stages', not in one of them")
    options = Options(*parser.parse_over(common, mapping, "it"))
    lengths = sorted(given & {"epochs", "max_steps"})
    if tokens is not None and lengths:
        raise InputError(f"it has both tokens and {lengths[0]}: give one")
    tokens = tokens_of_all if tokens is None and not lengths else tokens
    if tokens is not None:
        windows = options.training.batch_size * options.training.gradient_accumulation_steps
        steps = -(-tokens // (windows * options.data.max_length))
        options = options._replace(training=replace(options.training, epochs=None, max_steps=steps))
    if options.distillation.cache_dir and "cache_dir" not in given:  # each stage has another teacher
        cache = f"{options.distillation.cache_dir}/{name}"
        options = options._replace(distillation=replace(options.distillation, cache_dir=cache))
    return Options(*(training.places.anchored(group) for group in options))


def _own(stage: Stage, common: Options) -> dict[str, Any]:
    """What of a stage's options is not common, as a file would have it."""
    shared = {name: value for group in common for name, value in asdict(training.places.anchored(group)).items()}
    mine = {name: value for group in stage.options for name, value in asdict(group).items()}
    return {"name": stage.name, **{name: value for name, value in mine.items() if value != shared[name]}}


def _teacher(stages: Sequence[Stage], place: int, common: Options, output: Path) -> str:
    """Of the stage at a place: the student of the one before."""
    if place == 0:
        return str(training.places.anchored(common.models).teacher)
    return str((output / stages[place - 1].name).absolute())


def _at(stage: Stage, teacher: str, output: Path) -> Options:
    """A stage's options with its place."""
    options = stage.options
    trained = replace(options.training, output=str((output / stage.name).absolute()), resume=False)
    return options._replace(models=replace(options.models, teacher=teacher), training=trained)


def _check(stages: Sequence[Stage], common: Options, output: Path) -> None:
    """All that each run checks before it trains. Raises InputError, which names the stage.

    Teachers that are not trained yet have a configuration and a tokenizer already, which is all that is looked at.
    """
    read: dict[str, int] = {}  # what decides which windows there are → how many; they are read once
    with tempfile.TemporaryDirectory() as scratch:
        for place, stage in enumerate(stages):
            if training.run.is_finished(output / stage.name):
                continue
            known = training.run.is_finished(output / stages[place - 1].name) if place else True
            options = _at(stage, _teacher(stages, place, common, output if known else Path(scratch)), output)
            settings = (options.evaluation.eval_windows, options.training.seed, options.training.batch_size)
            windows = repr((options.data, *settings))
            try:
                with contextlib.redirect_stdout(None):
                    _, tokenizer, config = training.setup.check(options)
                    if windows not in read:
                        read[windows] = len(training.setup.gather(options).corpus.train)
                    training.teaching_checks.check_length(options, read[windows])
            except InputError as error:
                raise InputError(f"stage {stage.name!r}: {error}") from error
            for one in (config, tokenizer):
                one.save_pretrained(Path(scratch) / stage.name)


def _row(whole: Run, stage: Stage, count: str, teacher: str) -> dict[str, Any]:
    """Run a stage, unless it is finished, and say what it left."""
    output: Path = whole.directory
    kept = output / _JSON
    rows: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    directory = output / stage.name
    if training.run.is_finished(directory) and stage.name in rows:
        print(visible(f"stage {count}, {stage.name}: finished earlier"))
        row: dict[str, Any] = rows[stage.name]
        return row
    if not training.run.is_finished(directory):
        print(
            visible(f"stage {count}, {stage.name}: {stage.options.models.student_name}, taught by {teacher}"),
            flush=True,
        )
        _distill(_at(stage, teacher, output), stage.name, output)
    record = json.loads((directory / training.run.METRICS_FILE).read_text(encoding="utf-8"))
    student, trained = record["models"]["student"], record["training"]["student"]
    peak, left = record["peak_memory"], training.machine.resident()
    row = {
        "stage": stage.name,
        "val_loss": _val_loss(trained["history"]),
        "student": stage.options.models.student_name,
        "teacher": teacher,
        "parameters": student["parameters"],
        "teacher_parameters": record["models"]["teacher"]["parameters"],
        "steps": trained["steps"],
        "tokens": trained["tokens"],
        "seconds": record["seconds"]["total"],
        "perplexity": student["perplexity"],
        "kl": student["kl"],
        "top1_agreement": student["top1_agreement"],
        "peak_mib": None if peak["process"] is None else peak["process"] / _MIB,
        "peak_device_mib": None if peak["device"] is None else peak["device"] / _MIB,
        "left_mib": None if left is None else left / _MIB,
    }
    with whole.results() as staging:
        rows[stage.name] = row
        (staging / _JSON).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return row


def _val_loss(history: Sequence[dict[str, Any]]) -> float:
    """Of the weights that a training ends with: the best of those that were validated and saved."""
    # There is no checkpoint of step 0, which is validated for the curves.
    return min(float(line["eval_hard"]) for line in history if "eval_hard" in line and line["step"] > 0)


def _distill(options: Options, name: str, output: Path) -> None:
    """`fastkd distill` in a process of its own, resumed where it was begun. Raises as `progressive` says."""
    directory = output / name
    command = [sys.executable, "-m", "fastkd.cli", "distill"]
    if training.run.is_begun(directory):
        file = directory / training.run.CONFIG_FILE
        # The output may have been moved, and with it the teacher, whose weights the stage knows by their fingerprint.
        training.whole.write_whole(file, dump_over(file, teacher=options.models.teacher))
        place = f"--output={options.training.output}"
        command += [str(file), f"--device={options.models.device}", place, "--resume"]
    else:
        file = output / training.run.CHECKPOINTS / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        training.whole.write_whole(file, dump(options))
        command += [str(file)]
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has told the stage too, which saves a checkpoint
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:  # no one is left to wait for it
            process.terminate()
            process.wait()
        if directory.exists():
            training.run.note_files(output, [name])
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    if status == _REFUSED:
        raise InputError(f"stage {name!r} cannot be done: the message above says why")
    if status:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise ChildProcessError(f"stage {name!r} {how}")


def _end(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)  # by which the stage is ended too


def _text(row: dict[str, Any], name: str) -> str:
    return "–" if row[name] is None else _SHOWN[name].format(row[name])


def _markdown(table: Sequence[Sequence[str]]) -> str:
    ruled = [table[0], [":--", *["--:"] * (len(table[0]) - 1)], *table[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in ruled)
