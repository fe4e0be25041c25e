"""`fastkd inspect-teacher`: the likeliest next tokens, how sure a teacher is, and what temperature does to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import training
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import InputError, ModelOptions, at_least, check_temperatures, expand_home, option
from fastkd.training.plain import visible

__all__ = ["InspectOptions", "Prediction", "inspect_teacher", "run", "temperature_table"]

_DESCRIPTION = """\
Show what a teacher expects next: its likeliest tokens, its entropy, and what temperatures make of it.

examples:
  fastkd inspect-teacher
  fastkd inspect-teacher --teacher gpt2 --prompts "The film was great" --temperatures 1 2 4 --plot teacher.png
"""


@dataclass(frozen=True)
class InspectOptions:
    """What `fastkd inspect-teacher` looks at."""

    _argument_group_name: ClassVar[str] = "inspection"

    prompts: list[str] = option(
        ["This movie was one of the best", "I would not recommend this film to anyone"],
        "texts whose last token is to be predicted from the others",
    )
    top_k: int = option(10, "tokens to show of each prediction")
    temperatures: list[float] = option([0.5, 1.0, 2.0, 5.0, 10.0], "temperatures to compare")
    plot: str = option("", "a .png file to draw the last prompt's distributions at these temperatures into")

    def __post_init__(self) -> None:
        expand_home(self, "plot")
        at_least(self, top_k=1)
        check_temperatures(self, "temperatures")
        if self.plot and not self.plot.endswith(".png"):
            raise InputError(f"plot is {self.plot!r}; name a .png file")


def run(arguments: Sequence[str]) -> None:
    """`fastkd inspect-teacher`."""
    inspection, models, extra = Parser("inspect-teacher", _DESCRIPTION, (InspectOptions, ModelOptions)).parse(arguments)
    if extra.print_config:
        print(dump((inspection, models)), end="")
        return
    inspect_teacher(models, inspection)


class Prediction(NamedTuple):
    """What a teacher expects after a text, and what came."""

    context: str
    target: str
    target_probability: float
    entropy: float  # nats
    likeliest: list[tuple[str, float]]
    logits: Tensor  # [V]


def inspect_teacher(models: ModelOptions, options: InspectOptions) -> list[Prediction]:
    """Print a table per prompt, and one of temperatures; draw the last prompt's if asked to. Raises InputError."""
    if options.plot:
        training.places.check_writable(options.plot, "plot")
    table = training.report.table
    tokenizer = training.loading.load_tokenizer(models.teacher)
    teacher = training.loading.load_teacher(models, training.loading.device_of(models))
    found = [_prediction(teacher, tokenizer, prompt, options.top_k) for prompt in options.prompts]
    for one in found:
        bits = one.entropy / math.log(2)
        print(f"\nafter {one.context!r}")
        print(
            f"  the text goes on with {one.target!r}, which has probability {one.target_probability:.4f}\n"
            f"  entropy {one.entropy:.3f} nats, {bits:.3f} bits: so much more does the teacher say than the label alone"
        )
        print(
            _indented(
                training.report.table(
                    [["token", "probability"], *([repr(name), f"{p:.4f}"] for name, p in one.likeliest)]
                )
            )
        )
        print(_indented(table(temperature_table(one.logits, options.temperatures))))
    if options.plot:
        last = found[-1]
        ids = last.logits.topk(min(options.top_k, len(last.logits))).indices
        curves = {t: (last.logits / t).softmax(-1)[ids].tolist() for t in sorted(options.temperatures)}
        figure = training.plots.temperatures(curves, [name for name, _ in last.likeliest], f"after “{last.context}”")
        try:
            Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(options.plot, dpi=110)
        except OSError as error:
            raise InputError(f"cannot write {options.plot}: {error.strerror}") from error
        print(visible(f"\ndrawn into {options.plot}"))
    return found


def temperature_table(logits: Tensor, temperatures: list[float]) -> list[list[str]]:
    """A header, then a row per temperature: entropy in nats and bits, and the largest probabilities. logits `[V]`."""
    count = min(5, len(logits))
    rows = [["temperature", "nats", "bits", *(f"{place}." for place in range(1, count + 1))]]
    for temperature in temperatures:
        entropy = fastkd.row_statistics(logits[None], temperature=temperature).entropy.item()
        largest = (logits / temperature).softmax(-1).topk(count).values.tolist()
        rows.append(
            [f"{temperature:g}", f"{entropy:.4f}", f"{entropy / math.log(2):.4f}", *(f"{p:.4f}" for p in largest)]
        )
    return rows


def _prediction(teacher: Any, tokenizer: Any, prompt: str, top_k: int) -> Prediction:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise InputError(f"the prompt {prompt!r} has {len(ids)} tokens; 2 are needed, one of them to be predicted")
    context = tokenizer.decode(ids[:-1])
    logits = training.samples.next_token(teacher, tokenizer, [context])[0]
    probabilities = logits.softmax(-1)
    largest = probabilities.topk(min(top_k, len(logits)))
    names = [tokenizer.decode([token]) for token in largest.indices.tolist()]
    statistics = fastkd.row_statistics(logits[None], torch.tensor([ids[-1]], dtype=torch.int64, device=logits.device))
    return Prediction(
        context,
        tokenizer.decode([ids[-1]]),
        statistics.label_logprob.exp().item(),
        statistics.entropy.item(),
        list(zip(names, largest.values.tolist(), strict=True)),
        logits,
    )


def _indented(text: str) -> str:
    return "\n" + "\n".join("  " + line for line in text.splitlines())
