"""Distil a causal language model into a smaller one, and show what came of it. Read it top to bottom.

    fastkd distill                                                     # packaged teacher and reviews, on 2 cores
    fastkd distill --teacher gpt2 --data reviews.txt --epochs 5        # your own
    fastkd distill config.yaml --temperature 3                         # options from a file

The order: check all that can be checked without work; get the teacher and see what it makes of held-out text; write
its predictions into a cache, if there is to be one; train; train without a teacher, to compare; judge; report.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import fastkd
from fastkd.training import checks, loading, report
from fastkd.training.configuration import dump
from fastkd.training.data import Corpus, Windows, collate, load_corpus
from fastkd.training.evaluation import flops
from fastkd.training.fit import Fitted, Lessons, arguments, distillation_loss, fit
from fastkd.training.judge import CE_ONLY, STUDENT, Contender, Judge, verdict
from fastkd.training.lessons import cached, close_enough
from fastkd.training.options import TRAINED_TEACHER, DistillationOptions, InputError, Options
from fastkd.training.run import CHECKPOINTS, check_output, results, working

__all__ = ["distill"]

LABELS_ALONE = DistillationOptions(soft_weight=0.0, hard_weight=1.0)


def distill(options: Options) -> dict[str, Any]:
    """Run the distillation, print its report and return what metrics.json says.

    Raises InputError, before any training and with nothing written, where the options cannot be met; `Interrupted`
    after Ctrl-C, with a run that `--resume` goes on with.
    """
    started = time.perf_counter()
    check_output(options)
    device = training_device(options)
    transformers.utils.logging.disable_progress_bar()  # of loading and saving: there is one for the training
    distillation_loss(options.distillation)  # refuses what it cannot mean
    tokenizer = loading.load_tokenizer(options.models.teacher)
    checks.check_tokenizers(tokenizer, loading.student_tokenizer(options.models, tokenizer))
    if options.models.teacher != TRAINED_TEACHER:  # whose configuration is ours
        _check_configurations(options, tokenizer)
    corpus = load_corpus(options.data, tokenizer, options.evaluation.eval_windows, options.training.seed)
    if len(corpus.train) < options.training.batch_size:
        raise InputError(
            f"{options.data.data} gives {len(corpus.train)} windows to train on, but a batch needs "
            f"{options.training.batch_size}: use more text (--size), a smaller --max-length or a smaller --batch-size"
        )
    print(f"data: {corpus.description()}")

    with working(options) as output:
        if options.models.teacher == TRAINED_TEACHER:
            options = _train_teacher(options, tokenizer, corpus, output)
        vocab_size, config = _check_configurations(options, tokenizer)
        teacher = loading.load_teacher(options.models, device)
        checks.check_frozen(teacher)
        judge = Judge(teacher, tokenizer, corpus, options, vocab_size)
        transformers.set_seed(options.training.seed)
        student = loading.load_student(options.models, config, device)
        before = judge.judge("student before", student)
        if options.distillation.needs_teacher:
            checks.check_better(judge.teacher.held_out.loss, before.held_out.loss)
        sizes = {"teacher": judge.teacher.parameters, "student": student.num_parameters()}
        print(
            f"student: {sizes['student']:,} parameters on {device}, {sizes['student'] / sizes['teacher']:.2%} of the "
            f"teacher's {sizes['teacher']:,}; the teacher's perplexity on held-out text is "
            f"{judge.teacher.held_out.perplexity:,.1f}"
        )
        close_enough(sizes)
        cache_started = time.perf_counter()
        if options.distillation.cache_dir and options.distillation.needs_teacher:
            lessons = cached(teacher, tokenizer, corpus, options)
            del teacher  # what is left of it is in the cache, and its head in the judge
            gc.collect()
        else:
            lessons = Lessons(Windows(corpus.train), collate, teacher)
        seconds = {"cache": time.perf_counter() - cache_started}

        fitted = {
            STUDENT: _fit(student, tokenizer, corpus, lessons, options, vocab_size, output / CHECKPOINTS / "student")
        }
        contenders = [judge.teacher, judge.judge(STUDENT, whole(student))]
        if options.evaluation.ce_baseline:
            transformers.set_seed(options.training.seed)
            alone = loading.load_student(options.models, config, device)
            without = options._replace(distillation=LABELS_ALONE, training=_as_long(options, fitted[STUDENT]))
            lessons = Lessons(Windows(corpus.train), collate)
            fitted[CE_ONLY] = _fit(
                alone, tokenizer, corpus, lessons, without, vocab_size, output / CHECKPOINTS / "ce-only"
            )
            contenders.append(judge.judge(CE_ONLY, whole(alone)))

        lines = verdict(contenders)
        record = _record(options, before, contenders, fitted, lines, corpus, device)
        record["seconds"] = seconds | {name: one.seconds for name, one in fitted.items()}
        record["seconds"]["total"] = time.perf_counter() - started
        with results(output) as staging:
            whole(student).save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            if options.evaluation.ce_baseline:
                whole(alone).save_pretrained(staging / "ce-only")
                tokenizer.save_pretrained(staging / "ce-only")
            rows = [{"model": one.name, "parameters": one.parameters, **one.row()} for one in contenders]
            report.write_csv(staging / "results.csv", rows)
            report.write_samples(staging / "samples.md", contenders, fitted[STUDENT], options.evaluation)
            title = f"{options.models.teacher} → {options.models.student}: {output.name}"
            decode = lambda token: str(tokenizer.decode([token]))  # noqa: E731
            report.write_html(
                staging / "report.html", title, contenders, fitted, lines, options.evaluation, decode, dump(options)
            )
            report.write_metrics(staging / report.METRICS_FILE, record)
    print_results(contenders, lines, options)
    print(f"saved to {output} after {time.perf_counter() - started:.0f} s; open {output / 'report.html'}")
    return record


def training_device(options: Options) -> torch.device:
    """Where Trainer will put the student. Raises InputError for what it cannot do in one process."""
    chosen = arguments(options, Path(options.training.output))
    if chosen.world_size > 1 or chosen.n_gpu > 1:
        raise InputError(
            f"fastkd distill trains in one process on one device, but there are {chosen.world_size} processes and "
            f"{max(chosen.n_gpu, 1)} devices: set CUDA_VISIBLE_DEVICES=0, or start your own script with torchrun, in "
            "which fastkd.training.trainer.KDTrainer trains on all of them"
        )
    return chosen.device


def whole(student: Any) -> Any:
    """A student as a plain transformers model, its adapters merged into it."""
    return student.merge_and_unload() if hasattr(student, "merge_and_unload") else student


def print_results(contenders: list[Contender], lines: list[str], options: Options) -> None:
    """The result table, turned so that it fits a terminal, and the verdict."""
    columns = list(zip(*report.result_table(contenders, options.evaluation.metrics), strict=True))
    widths = [max(len(row[place]) for row in columns) for place in range(len(contenders) + 1)]
    print()
    for row in columns:
        print(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    print()
    for line in lines:
        print(f"- {line}")
    print()


def _check_configurations(options: Options, tokenizer: Any) -> tuple[int | None, Any]:
    """(number of ids that count, or None for all; the student's configuration)."""
    teacher = loading.teacher_config(options.models.teacher)
    student = loading.student_config(options.models, loading.vocabulary_size(teacher), tokenizer)
    checks.check_context(options.data.max_length, student=student, teacher=teacher)
    return checks.common_vocabulary(teacher, student, tokenizer), student


def _train_teacher(options: Options, tokenizer: Any, corpus: Corpus, output: Path) -> Options:
    """Train a GPT-2 on the labels of the corpus and save it; the options with its directory as the teacher."""
    directory = output / "teacher"
    if not (directory / "config.json").exists():
        transformers.set_seed(options.training.seed)
        teacher = loading.teacher_to_train(tokenizer).to(training_device(options))
        print(f"teacher: {teacher.num_parameters():,} parameters, trained on the labels first")
        alone = options._replace(distillation=LABELS_ALONE)
        _fit(
            teacher,
            tokenizer,
            corpus,
            Lessons(Windows(corpus.train), collate),
            alone,
            None,
            output / CHECKPOINTS / "teacher",
        )
        with results(output) as staging:
            teacher.save_pretrained(staging / "teacher")
            tokenizer.save_pretrained(staging / "teacher")
    return options._replace(models=replace(options.models, teacher=str(directory)))


def _fit(
    model: Any, tokenizer: Any, corpus: Corpus, lessons: Lessons, options: Options, vocab_size: int | None, path: Path
) -> Fitted:
    kd = distillation_loss(options.distillation, vocab_size)
    return fit(model, tokenizer, corpus, lessons, kd, options, path)


def _as_long(options: Options, fitted: Fitted) -> Any:
    """Training options of as many steps, all of them: an early stop of the student is a shorter training here."""
    return replace(options.training, epochs=None, max_steps=fitted.steps, early_stopping_patience=0)


def _record(
    options: Options,
    before: Contender,
    contenders: list[Contender],
    fitted: dict[str, Fitted],
    lines: list[str],
    corpus: Corpus,
    device: torch.device,
) -> dict[str, Any]:
    student, teacher = fitted[STUDENT], contenders[0]
    once = corpus.train.numel() if options.distillation.cache_dir else None
    work = flops(student.tokens, teacher.parameters, contenders[1].parameters, once)
    return {
        "models": {one.name: one.record() for one in (before, *contenders)},
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
        "flops": work,
        "flops_of_labels_alone": flops(student.tokens, 0, contenders[1].parameters),
        "device": str(device),
        "options": {name: asdict(group) for name, group in options._asdict().items()},
        "versions": {module.__name__: module.__version__ for module in (fastkd, torch, transformers)},
    }
