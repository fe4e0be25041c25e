"""What is asked, on which inputs, and what is to be reached: `Question`, `Case`, `Bar`.

A bar compares two contenders of a race by name; one without a limit is reported and not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

__all__ = [
    "BUDGETS",
    "COMPILING",
    "MIB",
    "OBJECTIVES",
    "QUESTIONS",
    "Bar",
    "Case",
    "Objective",
    "Question",
    "faster",
    "near",
    "within",
]

FRESH, IN_PLACE, LOSS_ONLY = "fastkd", "fastkd in place", "fastkd loss only"
ONE_GRADIENT = "one gradient"
CROSS_ENTROPY, CROSS_ENTROPY_IN_PLACE = "cross-entropy", "cross-entropy in place"
CHUNKED, PRODUCTS, WIDENED = "chunked", "products", "fastkd fp32"
SMALL, LARGE = "fastkd 32 MiB", "fastkd 1 GiB"
LIGER, LIGER_TRITON, TRL = "liger", "liger triton", "trl"
LINEAR_CE, LINEAR_CE_CHUNKED = "linear_cross_entropy", "linear_cross_entropy chunked"  # torch's own, since 2.13
CUT_CE = "cut-cross-entropy"
ROUNDED_TRUTH, ALLOWED = "rounded truth", "2 × eager + 1e-6"
STEP, EAGER_STEP = "fastkd step", "eager step"
LIVE_STEP, CACHED_STEP = "fastkd step, live teacher", "fastkd step, cached teacher"
MIB = 2**20
#: Contenders given hidden states → their `memory_budget`; None is the default one.
BUDGETS: dict[str, int | None] = {FRESH: None, WIDENED: None, SMALL: 32 * MIB, LARGE: 1024 * MIB}
#: Contenders that compile, themselves or inside, and therefore warm up at the very shape they are measured at.
COMPILING = ("compile", "compile fp32", LIGER, CUT_CE)


class Objective(NamedTuple):
    """What is minimised: soft · T² · divergence(teacher, student) + hard · cross-entropy, mean over rows."""

    soft: float
    hard: float


BOTH, SOFT, HARD = Objective(0.5, 0.5), Objective(1, 0), Objective(0, 1)
#: Of the questions from hidden states that are not about both terms.
OBJECTIVES = {"projections_soft": SOFT, "projections_hard": HARD}


def beyond_gradients(budget: str) -> str:
    """What a contender with this much working memory may need."""
    return f"gradients + {budget}"


def predicted(contender: str) -> str:
    """What `fastkd.plan` says it will need."""
    return contender.replace(FRESH, "predicted", 1)


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
    question: str
    rows: int
    vocab: int
    dtype: torch.dtype
    bars: tuple[Bar, ...]
    divergence: str = "forward_kl"
    hidden: tuple[int, ...] | None = None  # H of student and teacher, if any, where logits come from hidden states
    entries: int | None = None  # of each row, where the teacher is sparse
    family: str | None = None  # how the student's rows differ from the teacher's, where that is the question
    in_quick: bool = False  # part of `--quick`, with at most 256 rows

    def __str__(self) -> str:
        name = f"{self.rows}x{self.vocab} {str(self.dtype).removeprefix('torch.')}"
        if self.hidden is not None:
            name += " hidden " + "/".join(map(str, self.hidden))
        if self.entries is not None:
            name += f" K = {self.entries}"
        if self.family is not None:
            name = f"{self.family} {name}"
        return name if self.divergence == "forward_kl" else f"{self.divergence} {name}"

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
        question = QUESTIONS[self.question]
        return self.flops if question.measure == "flops" else question.passes * self.matrix_bytes


@dataclass(frozen=True)
class Question:
    """What a benchmark file asks, and the least work it takes.

    That is `passes` × rows × vocab × bytes per element, or a case's FLOPs.
    """

    title: str
    passes: int
    least: str
    unit: str = "ms"
    measure: Literal["bytes", "flops"] = "bytes"


QUESTIONS: dict[str, Question] = {
    "logits": Question(
        "Forward KL (T = 2) and cross-entropy on logits, forward and backward",
        3,
        "Least traffic: read student and teacher, write the gradient: 3·N·V·b bytes",
    ),
    "divergences": Question(
        "The other divergences (T = 2) with cross-entropy, forward and backward",
        3,
        "Least traffic: read student and teacher, write the gradient: 3·N·V·b bytes",
    ),
    "log_softmax": Question(
        "log_softmax(z / 2), forward and backward",
        5,
        "Least traffic: read z, write the result; read z and the upstream gradient, write the gradient: 5·N·V·b bytes",
    ),
    "row_statistics": Question("Row statistics (T = 2)", 1, "Least traffic: read z: N·V·b bytes"),
    "memory": Question(
        "Peak memory above the resident inputs, forward and backward, a process each, default allocator",
        1,
        "One gradient: N·V·b bytes",
        unit="MiB",
    ),
    "projections": Question(
        "From hidden states to forward KL (T = 2) and cross-entropy, d hidden and d weight included",
        0,
        "Matrix products: 2·N·V·(3·H of the student + H of the teacher) FLOPs",
        measure="flops",
    ),
    "projections_soft": Question(
        "From hidden states to T²·forward KL alone (T = 2), d hidden and d weight included",
        0,
        "Matrix products: 2·N·V·(3·H of the student + H of the teacher) FLOPs",
        measure="flops",
    ),
    "projections_hard": Question(
        "From hidden states to cross-entropy alone, d hidden and d weight included",
        0,
        "Matrix products: 2·N·V·3·H FLOPs",
        measure="flops",
    ),
    "accuracy": Question(
        "How far the gradient is off: of a divergence alone (T = 2), w.r.t. the student's logits",
        1,
        "Relative L2 error against float64 on the same rounded inputs. Rounded truth: float64's own gradient, rounded "
        "to the inputs' dtype",
        unit="relative error",
    ),
    "projection_accuracy": Question(
        "How far the gradient is off: of forward KL alone (T = 2), from hidden states; the worse of d hidden and "
        "d weight",
        1,
        "Relative L2 error against float64 on the same rounded inputs. Rounded truth: float64's own gradient, rounded "
        "to the inputs' dtype",
        unit="relative error",
    ),
    "sparse": Question(
        "Forward KL (T = 2) to K tokens and the mass of the others, and cross-entropy, forward and backward",
        2,
        "Least traffic: read the student, write the gradient: 2·N·V·b bytes",
    ),
    "top_k": Question(
        "The 64 likeliest tokens of a row, their log-probabilities and the mass that is left (T = 2)",
        1,
        "Least traffic: read z: N·V·b bytes",
    ),
    "sample": Question(
        "A sample of 12 tokens of a row, its weights and the row's entropy (T = 2)",
        1,
        "Least traffic: read z: N·V·b bytes",
    ),
    "cache_write": Question(
        "Writing a sampled cache, k = 12, from SmolLM2-135M on 128-token windows of IMDB reviews",
        1,
        "The teacher's bare forward, its output head included; GB/s are of its logits",
    ),
    "cache_read": Question(
        "Reading a cache, k = 12: one of many shuffled batches of 32 sequences of 128 tokens",
        0,
        "No floor is given; 8.192 ms are 500,000 tokens per second",
    ),
    "cache_size": Question(
        "Files of a finished cache, everything included",
        1,
        "What K ids and log-probabilities take: 16 bits an id at this vocabulary",
        unit="bytes per token",
    ),
    "cache_gradient": Question(
        "Angle between the gradient of the student's head from a cache and from the teacher's whole rows (T = 1), "
        "SmolLM2-135M on IMDB reviews",
        1,
        "None: 0 is dense distillation. The student is the teacher seen through so many of its principal directions",
        unit="degrees",
    ),
    "training": Question(
        "A training step of the demo's student (GPT-2, 4 layers, 256 wide; 128-token windows; T = 2; AdamW included), "
        "the teacher's hidden states given, or its whole forward included, or its predictions in a cache",
        0,
        "Matrix products of the output heads: 2·N·V·(3·H of the student + H of the teacher) FLOPs",
        measure="flops",
    ),
    "training_memory": Question(
        "Peak memory above the resident model, optimizer and inputs of that training step, default allocator",
        0,
        "Gradients of the output head: (N + V)·H·b bytes",
        unit="MiB",
    ),
    "projection_memory": Question(
        "Peak memory above the resident inputs, from hidden states to loss and gradients, default allocator",
        1,
        "Gradients: (N + V)·H·b bytes. Predicted: `fastkd.plan(...).peak_bytes`",
        unit="MiB",
    ),
}
