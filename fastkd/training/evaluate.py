"""`fastkd eval`: a saved student beside its teacher and, where there is one, the student without a teacher."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.training import loading, report
from fastkd.training.judge import CE_ONLY, STUDENT, verdict
from fastkd.training.machine import machine, versions
from fastkd.training.options import TRAINED_TEACHER, InputError, Options
from fastkd.training.plain import visible
from fastkd.training.run import CONFIG_FILE, note_files, results
from fastkd.training.setup import gather, with_teacher

__all__ = ["evaluate"]


def evaluate(student: str, options: Options, baseline: str | None = None) -> dict[str, Any]:
    """Judge the model in the directory `student`, print the table and write the report into its folder `eval`.

    `baseline` is a model to compare with; by default the one that a run with ce_baseline left. Raises InputError.
    """
    started = time.perf_counter()
    directory = Path(student)
    if not (directory / "config.json").is_file():
        has = f"an unfinished run: see its {CONFIG_FILE}" if (directory / CONFIG_FILE).is_file() else "no config.json"
        raise InputError(f"{student} holds no model ({has}); name the directory of a finished run or of a model")
    models = replace(options.models, student=student, from_scratch=False, lora_rank=0, lora_targets=[])
    if models.teacher == TRAINED_TEACHER:
        models = replace(models, teacher=str(directory / "teacher"))
    options = options._replace(models=models, distillation=replace(options.distillation, cache_dir=""))  # none is read
    if baseline is None and (directory / "ce-only" / "config.json").is_file():
        baseline = str(directory / "ce-only")
    setup = with_teacher(options, gather(options))
    contenders = [setup.judge.teacher, setup.judge.judge(STUDENT, setup.student())]
    if baseline is not None:
        other = loading.load_student(replace(models, student=baseline), None, setup.materials.device)
        contenders.append(setup.judge.judge(CE_ONLY, other))
    lines = verdict(contenders)
    record = {
        "models": {one.name: one.record() for one in contenders},
        "verdict": lines,
        "device": str(setup.materials.device),
        "machine": machine(setup.materials.device),
        "versions": versions(),
        "seconds": {"total": time.perf_counter() - started},
    }
    if not (directory / "eval").exists():
        (directory / "eval").mkdir()
        note_files(directory, ["eval"])
    with results(directory / "eval") as staging:
        title = f"{options.models.teacher} and {student}"
        failed = report.write(staging, title, contenders, {}, lines, options, setup.materials.tokenizer, record)
    report.print_results(contenders, lines, options.evaluation.metrics)
    print(visible(f"saved to {directory / 'eval'}"))
    report.warn(failed, "the rest is there; the same command makes it again")
    return record
