"""The commands on top of the trainer: what each may be asked, then the module that does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastkd.training.configuration import Parser, dump
from fastkd.training.options import (
    GROUPS,
    DataOptions,
    EvaluationOptions,
    InputError,
    InspectOptions,
    ModelOptions,
    Options,
    SweepOptions,
    TrainingOptions,
)

__all__ = ["distill", "evaluate", "export", "inspect_teacher", "sweep"]

_DISTILL = """\
Train a small causal language model on a frozen teacher's predictions and the labels.

With no options, the packaged SmolLM2-135M teaches a GPT-2 of 16 M parameters on the packaged IMDB reviews. The run's
directory gets the student in Hugging Face format, metrics.json, results.csv, samples.md, report.html and config.yaml.

examples:
  fastkd distill
  fastkd distill --teacher gpt2-medium --data reviews.jsonl --size full --epochs 5 --output runs/reviews
  fastkd distill config.yaml --temperature 3 --cache-dir cache
  fastkd distill runs/reviews/config.yaml --resume
"""
_EVAL = """\
Judge a student beside its teacher, on held-out and on other text, and write a report into its folder 'eval'.

Options begin as the run's config.yaml has them, so that the text is split as it was; those of the training have no
effect but for the seed.

examples:
  fastkd eval runs/demo
  fastkd eval runs/demo --out-of-domain news.txt --eval-windows 500
  fastkd eval ./my-student --teacher gpt2-large --data reviews.jsonl --baseline ./my-other-student
"""
_SWEEP = """\
Train a student for every weight and temperature, and rank them by cross-entropy and KL to the teacher at T = 1.

Takes the options of fastkd distill beside the grid. Writes results.csv and sweep.png.

examples:
  fastkd sweep --alpha 0 0.5 1 --temperature 1 2 4
  fastkd sweep config.yaml --alpha 0.2 0.5 0.8 --alpha-on soft --cache-dir caches
"""
_INSPECT = """\
Show what a teacher expects next: its likeliest tokens, its entropy, and what temperatures make of it.

examples:
  fastkd inspect-teacher
  fastkd inspect-teacher --teacher gpt2 --prompts "The film was great" --temperatures 1 2 4 --plot teacher.png
"""
_EXPORT = """\
Write a student in the format of where it will run.

hf: as save_pretrained writes it. int4: likewise, linear layers in 4 bits (torchao; not for GPT-2s).
gguf: one file in fp32 that llama.cpp runs and transformers loads, of a GPT-2 or a Llama.

examples:
  fastkd export runs/demo --to gguf --output demo-gguf
"""


def distill(arguments: Sequence[str]) -> None:
    """`fastkd distill`."""
    *groups, extra = Parser("distill", _DISTILL, GROUPS).parse(arguments)
    if extra.print_config:
        print(dump(groups), end="")
        return
    from fastkd.training.distill import distill as run

    run(Options(*groups))


def evaluate(arguments: Sequence[str]) -> None:
    """`fastkd eval`."""
    parser = Parser("eval", _EVAL, GROUPS, config=False)
    parser.add("model", metavar="STUDENT", help="directory of a finished run, or of any model with its tokenizer")
    parser.add("--baseline", metavar="DIRECTORY", help="a model to compare with; a run's ce-only, if it has one")
    config = next((str(path) for path in _configurations(arguments)), None)
    *groups, extra = parser.parse(arguments, config)
    from fastkd.training.evaluate import evaluate as run

    run(extra.model, Options(*groups), extra.baseline)


def sweep(arguments: Sequence[str]) -> None:
    """`fastkd sweep`."""
    groups = (SweepOptions, ModelOptions, DataOptions, TrainingOptions, EvaluationOptions)
    grid, models, data, training, evaluation, extra = Parser("sweep", _SWEEP, groups).parse(arguments)
    if extra.print_config:
        print(dump((grid, models, data, training, evaluation)), end="")
        return
    cells = grid.cells()
    if not cells:
        raise InputError("the grid is empty: give --alpha and --temperature")
    from fastkd.training.sweep import sweep as run

    run(Options(models, data, cells[0], training, evaluation), grid)


def inspect_teacher(arguments: Sequence[str]) -> None:
    """`fastkd inspect-teacher`."""
    parser = Parser("inspect-teacher", _INSPECT, (InspectOptions, ModelOptions))
    inspection, models, extra = parser.parse(arguments)
    if extra.print_config:
        print(dump((inspection, models)), end="")
        return
    from fastkd.training.inspect_teacher import inspect_teacher as run

    run(models, inspection)


def export(arguments: Sequence[str]) -> None:
    """`fastkd export`."""
    parser = Parser("export", _EXPORT, (), config=False)
    parser.add("student", metavar="STUDENT", help="directory of a finished run, or of any model with its tokenizer")
    parser.add("--to", choices=("hf", "int4", "gguf"), required=True, help="the format")
    parser.add("--output", metavar="DIRECTORY", required=True, help="a new directory")
    (asked,) = parser.parse(arguments)
    from fastkd.training.export import export as run

    run(asked.student, asked.to, asked.output)


def _configurations(arguments: Sequence[str]) -> list[Path]:
    """The config.yaml of a run among the arguments."""
    return [path for path in (Path(text) / "config.yaml" for text in arguments[:1]) if path.is_file()]
