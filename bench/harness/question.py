"""What a benchmark asks (`Question`), on which inputs (`Case`), and which ratio is to be reached (`Bar`).

A bar compares two contenders of a case by name; one without a limit is reported and not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import torch

from bench.harness import machine

__all__ = ["Bar", "Case", "Question", "Section", "faster", "near", "selected", "within"]


class Section(Enum):
    """The headings of the report, in its order."""

    LOGITS = "Losses from logits"
    HIDDEN = "Losses from hidden states"
    FUNCTIONS = "Functions of one row"
    MEMORY = "Peak memory"
    ACCURACY = "Accuracy of gradients"
    CACHES = "Caches of a teacher's predictions"
    TRAINING = "Training"
    SCALING = "Scaling"


@dataclass(frozen=True)
class Question:
    """What is asked, and the least work an answer takes: `passes` × rows × vocab × bytes, or a case's FLOPs."""

    name: str  # in files of results
    section: Section
    title: str
    about: str  # a sentence or two for the reader of the table
    passes: int = 1  # over a [rows, vocab] tensor
    unit: str = "ms"
    measure: Literal["bytes", "flops"] = "bytes"  # of the least work
    floor: str | None = None  # the contender that does this least work and nothing else
    both_allocators: bool = False  # or torch's default one alone
    on_cpus: bool = False  # alone: with a GPU it is not asked
    gated: bool = False  # whether `bench.gate` compares its quick cases with the baseline


@dataclass(frozen=True)
class Bar:
    """What `ours` must reach against `other`, or on its own where `other` is None."""

    ours: str
    other: str | None
    at_least: float | None = None
    at_most: float | None = None
    inverse: bool = False  # about other ÷ ours, how many times faster, rather than ours ÷ other or ours itself

    def measured(self, values: Mapping[str, float]) -> float | None:
        """The ratio this bar is about, or None where a contender did not run."""
        if self.ours not in values or (self.other is not None and self.other not in values):
            return None
        if self.other is None:
            return values[self.ours]
        return values[self.other] / values[self.ours] if self.inverse else values[self.ours] / values[self.other]

    def met(self, measured: float) -> bool | None:
        """None where there is nothing to meet."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or measured >= self.at_least) and (
            self.at_most is None or measured <= self.at_most
        )


def faster(ours: str, other: str, times: float | None = None) -> Bar:
    return Bar(ours, other, at_least=times, inverse=True)


def within(ours: str, other: str | None, limit: float | None = None) -> Bar:
    return Bar(ours, other, at_most=limit)


def near(ours: str, other: str) -> Bar:
    return Bar(ours, other, at_least=0.9, at_most=1.1)


@dataclass(frozen=True)
class Case:
    question: Question
    rows: int
    vocab: int
    dtype: torch.dtype
    bars: tuple[Bar, ...]
    divergence: str = "forward_kl"
    hidden: tuple[int, ...] | None = None  # H of student and teacher, if any, where logits come from hidden states
    entries: int | None = None  # of each row, where the teacher is sparse
    threads: int | None = None  # None: as many as torch takes
    family: str | None = None  # how the student's rows differ from the teacher's, where that is the question
    in_quick: bool = False  # part of `--quick`, with at most 256 rows
    both_allocators: bool = True  # where its question asks for both

    def __str__(self) -> str:
        name = f"{self.rows}x{self.vocab} {str(self.dtype).removeprefix('torch.')}"
        if self.hidden is not None:
            name += " hidden " + "/".join(map(str, self.hidden))
        if self.entries is not None:
            name += f" K = {self.entries}"
        if self.threads is not None:
            name += f", {self.threads} thread" + "s" * (self.threads > 1)
        if self.family is not None:
            name = f"{self.family} {name}"
        return name if self.divergence == "forward_kl" else f"{self.divergence} {name}"

    @property
    def allocators(self) -> tuple[str, ...]:
        """Under which it is run."""
        both = self.both_allocators and self.question.both_allocators
        return machine.ALLOCATORS if both else machine.ALLOCATORS[:1]

    @property
    def matrix_bytes(self) -> int:
        """Of one [rows, vocab] tensor."""
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of d hidden and d weight together."""
        assert self.hidden is not None
        return (self.rows + self.vocab) * self.hidden[0] * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the matrix products: both logits, or the student's without a teacher, d hidden, d weight."""
        assert self.hidden is not None
        student, *teacher = self.hidden
        return 2 * self.rows * self.vocab * (3 * student + sum(teacher))

    @property
    def work(self) -> int:
        """The least this case takes, in the measure of its question."""
        return self.flops if self.question.measure == "flops" else self.question.passes * self.matrix_bytes


def _of_cpus(case: Case) -> bool:
    return case.question.on_cpus or case.threads is not None


def selected(cases: tuple[Case, ...], quick: bool) -> list[Case]:
    """The cases to run on this machine under this allocator; with `quick` a few, cut to 256 rows."""
    here = [
        case
        for case in cases
        if machine.allocator() in case.allocators and (machine.DEVICE.type == "cpu" or not _of_cpus(case))
    ]
    return [replace(case, rows=min(case.rows, 256)) for case in here if case.in_quick] if quick else here
