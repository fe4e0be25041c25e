"""The commands on top of the trainer: what each may be asked, then the module that does it."""

from __future__ import annotations

from collections.abc import Sequence

from fastkd.training.configuration import Parser, dump
from fastkd.training.options import GROUPS, Options

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


def distill(arguments: Sequence[str]) -> None:
    """`fastkd distill`."""
    *groups, extra = Parser("distill", _DISTILL, GROUPS).parse(arguments)
    if extra.print_config:
        print(dump(groups), end="")
        return
    from fastkd.training.distill import distill as run

    run(Options(*groups))
