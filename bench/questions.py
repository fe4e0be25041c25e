"""What the benchmark files ask, and the least work that an answer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.names import CROSS_ENTROPY, HARD, PRODUCTS, SOFT

__all__ = [
    "OBJECTIVES",
    "QUESTIONS",
    "Question",
]

#: Of the questions from hidden states that are not about both terms.
OBJECTIVES = {"projections_soft": SOFT, "projections_hard": HARD}


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
    floor: str | None = None  # the contender that does this least work and nothing else
    headline: bool = False  # its cases are in the README, if they are headlines too


_FROM_LOGITS = "read student and teacher, write the gradient: 3·N·V·b bytes"
_FROM_HIDDEN = "2·N·V·(3·H of the student + H of the teacher) FLOPs"

QUESTIONS: dict[str, Question] = {
    "logits": Question(
        "Forward KL (T = 2) and cross-entropy on logits, forward and backward",
        3,
        f"Least traffic: {_FROM_LOGITS}",
        floor="add",
        headline=True,
    ),
    "divergences": Question(
        "The other divergences (T = 2) with cross-entropy, forward and backward",
        3,
        f"Least traffic: {_FROM_LOGITS}",
        floor="add",
        headline=True,
    ),
    "log_softmax": Question(
        "log_softmax(z / 2), forward and backward",
        5,
        "Least traffic: read z, write the result; read z and the upstream gradient, write the gradient: 5·N·V·b bytes",
    ),
    "row_statistics": Question("Row statistics (T = 2)", 1, "Least traffic: read z: N·V·b bytes", floor="sum"),
    "memory": Question(
        "Peak memory above the resident inputs, forward and backward, a process each, default allocator",
        1,
        "One gradient: N·V·b bytes",
        unit="MiB",
    ),
    "projections": Question(
        "From hidden states to forward KL (T = 2) and cross-entropy, d hidden and d weight included",
        0,
        f"Matrix products: {_FROM_HIDDEN}",
        measure="flops",
        floor=PRODUCTS,
        headline=True,
    ),
    "projections_soft": Question(
        "From hidden states to T²·forward KL alone (T = 2), d hidden and d weight included",
        0,
        f"Matrix products: {_FROM_HIDDEN}",
        measure="flops",
        floor=PRODUCTS,
        headline=True,
    ),
    "projections_hard": Question(
        "From hidden states to cross-entropy alone, d hidden and d weight included",
        0,
        "Matrix products: 2·N·V·3·H FLOPs",
        measure="flops",
        floor=PRODUCTS,
        headline=True,
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
        floor=CROSS_ENTROPY,
        headline=True,
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
        floor="teacher forward",
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
        f"Matrix products of the output heads: {_FROM_HIDDEN}",
        measure="flops",
        headline=True,
    ),
    "training_memory": Question(
        "Peak memory above the resident model, optimizer and inputs of that training step, default allocator",
        0,
        "Gradients of the output head: (N + V)·H·b bytes",
        unit="MiB",
    ),
    "scaling_logits": Question(
        "Forward KL (T = 2) and cross-entropy on logits, by tokens, vocabulary and threads",
        3,
        f"Least traffic: {_FROM_LOGITS}",
        floor="add",
    ),
    "scaling_hidden": Question(
        "Forward KL (T = 2) and cross-entropy from hidden states, by tokens, vocabulary, hidden size and threads",
        0,
        f"Matrix products: {_FROM_HIDDEN}",
        measure="flops",
        floor=PRODUCTS,
    ),
    "projection_memory": Question(
        "Peak memory above the resident inputs, from hidden states to loss and gradients, default allocator",
        1,
        "Gradients: (N + V)·H·b bytes. Predicted: `fastkd.plan(...).peak_bytes`",
        unit="MiB",
    ),
    "demo_perplexity": Question(
        "What `make demo` came to: perplexity on held-out reviews (one seed, 21 windows)",
        0,
        "The same student, data and steps, with the teacher and on the labels alone",
        unit="perplexity",
    ),
    "demo_kl": Question(
        "What `make demo` came to: KL to the teacher on held-out reviews",
        0,
        "The same student, data and steps, with the teacher and on the labels alone",
        unit="nats",
    ),
}
