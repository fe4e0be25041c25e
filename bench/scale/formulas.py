"""Bytes that a rank exchanges and holds in one optimizer step.

*Exchanged* is what a rank sends, which is also what it receives, by ring algorithms: an all-gather or a reduce-scatter
of S bytes, of all ranks together, moves S·(n − 1)/n over each of n ranks, and an all-reduce twice that. *Held* is what
stands in a rank's memory at the peak of the loss, beside activations of the body, which no loss has a say in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import fastkd
from fastkd import ranks
from fastkd.agreement import QUESTION_BYTES
from fastkd.backend import Backend
from fastkd.cache.records import Dense, PackedSampled, PackedTopK
from fastkd.divergences import resolve
from fastkd.projection.plan import fixed_budget
from fastkd.rows import STATE_BYTES, RowSpec

__all__ = [
    "FP32",
    "MIXED",
    "Bytes",
    "Held",
    "Loss",
    "Model",
    "Moved",
    "ddp",
    "ddp_held",
    "fsdp",
    "fsdp_held",
    "gathered_logits",
    "hidden_gradient",
    "of_loss",
    "spread_held",
    "teacher_bytes",
]


class Model(NamedTuple):
    """A language model of any vocabulary. `layers`: parameters beside embedding and head."""

    layers: int
    hidden: int
    tied: bool  # one matrix is embedding and head

    def head(self, vocab: int) -> int:
        return vocab * self.hidden

    def parameters(self, vocab: int) -> int:
        return self.layers + (1 if self.tied else 2) * self.head(vocab)


class Bytes(NamedTuple):
    """Of one parameter."""

    kept: int  # as the optimizer has it
    computed: int  # as it is gathered, and as products take it
    reduced: int  # its gradient, as ranks add it up and the optimizer takes it
    moments: int = 8  # AdamW's, in fp32

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands of products."""
        return torch.bfloat16 if self.computed == 2 else torch.float32


FP32, MIXED = Bytes(4, 4, 4), Bytes(4, 2, 4)


@dataclass(frozen=True)
class Moved:
    """Sizes of what collectives work on: of all ranks together where they gather or scatter, of one where they add."""

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.all_gather + other.all_gather,
            self.reduce_scatter + other.reduce_scatter,
            self.all_reduce + other.all_reduce,
        )

    def ring(self, ranks: int) -> float:
        """Bytes that one rank sends."""
        return (self.all_gather + self.reduce_scatter + 2 * self.all_reduce) * (ranks - 1) / ranks


# --- the loss's own exchange ------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """What decides how many numbers of a row ranks exchange."""

    divergence: str = "forward_kl"
    teacher: Literal["dense", "sparse"] = "dense"
    entries: int = 64  # of a sparse teacher
    labels: bool = True

    def row_bytes(self, backend: Backend) -> int:
        """What a rank tells of one row: after its statistics and, where a divergence asks for them, its terms."""
        found = resolve(self.divergence)
        spec = RowSpec(found.name, found.parameters, 2.0, 2.0, 1.0, 1.0, 1)
        state = backend.tile_state(1, torch.device("cpu"))
        told = 0
        for stage in ranks.stages(spec, torch.empty(0) if self.teacher == "dense" else None):
            fields, _ = backend.state_fields(state, spec, self.teacher, self.labels, stage)
            count = len(fields) + (self.entries if self.teacher == "sparse" and stage == "statistics" else 0)
            told += count * max(field.dtype.itemsize for field in fields.values())
        return told


def of_loss(rows: int, group: int, loss: Loss, backend: Backend, checked: bool) -> Moved:
    """What ranks of a group exchange of `rows` rows: all rows of logits, those that count of hidden states.

    `checked`: where values are looked at, on CPUs, ranks also compare the cut of each side that is spread, and what
    they were called with.
    """
    moved = rows * loss.row_bytes(backend)
    if checked:
        sides = 2 if loss.teacher == "dense" else 1
        moved += QUESTION_BYTES * (sides + 1)
    return Moved(all_gather=group * moved)


def gathered_logits(rows: int, vocab: int, size: int) -> Moved:
    """What a loss that knows whole rows only would gather instead: the student's logits."""
    return Moved(all_gather=rows * vocab * size)


# --- the step ---------------------------------------------------------------------------------------------------


def ddp(parameters: int, size: Bytes) -> Moved:
    """Every gradient is added up."""
    return Moved(all_reduce=parameters * size.reduced)


def fsdp(body: int, head: int, size: Bytes, calls: int = 1) -> Moved:
    """Fully sharded. The body is gathered in forward and backward; the head once for each of `calls` of the loss."""
    return Moved(
        all_gather=calls * (2 * body + head) * size.computed, reduce_scatter=calls * (body + head) * size.reduced
    )


def hidden_gradient(tokens: int, hidden: int) -> Moved:
    """Of hidden states that all ranks of a group read: each has a part of the sum. 16-bit ones are added in fp32."""
    return Moved(all_reduce=4 * tokens * hidden)


class Held(NamedTuple):
    """Bytes of one rank."""

    weights: float
    gradients: float
    moments: float
    #: While the loss runs: logits and what belongs to them, gradients of hidden states and head, a gathered head.
    loss: float
    #: What ranks know of rows, and exchange of them.
    rows: float = 0

    @property
    def all(self) -> float:
        return sum(self)


def _parameters(count: float, size: Bytes) -> tuple[float, float, float]:
    return count * size.kept, count * size.reduced, count * size.moments


def _planned(tokens: int, columns: int, student: int, teacher: int | None, size: Bytes, device: str) -> fastkd.Plan:
    """What the loss of some columns does, with the budget of a device that is not asked, as losses over ranks have."""
    budget = fixed_budget(torch.device(device))
    return fastkd.plan(tokens, columns, student, teacher, dtype=size.dtype, device=device, memory_budget=budget)


def ddp_held(tokens: int, vocab: int, student: Model, teacher: int | None, size: Bytes, device: str) -> Held:
    """Everything; `teacher`: the hidden size of one whose logits are computed."""
    plan = _planned(tokens, vocab, student.hidden, teacher, size, device)
    return Held(*_parameters(student.parameters(vocab), size), plan.peak_bytes)


def fsdp_held(
    tokens: int, vocab: int, student: Model, teacher: int | None, size: Bytes, device: str, *, n: int
) -> Held:
    """On n ranks: a share of the parameters; while the loss runs the whole head and its whole gradient."""
    plan = _planned(tokens, vocab, student.hidden, teacher, size, device)
    gathered = student.head(vocab) * size.computed if n > 1 else 0
    return Held(*_parameters(student.parameters(vocab) / n, size), plan.peak_bytes + gathered)


def spread_held(
    tokens: int,
    vocab: int,
    student: Model,
    teacher: int | None,
    size: Bytes,
    device: str,
    entries: int = 0,
    *,
    of: int,
    n: int,
) -> Held:
    """On n ranks: the body fully sharded; the head spread over groups `of` ranks, and each part sharded over groups.

    `entries`: of a sparse teacher.
    """
    plan = _planned(tokens, -(-vocab // of), student.hidden, teacher, size, device)
    gathered = student.head(vocab) // of * size.computed if n > of else 0
    rows = STATE_BYTES * tokens + ranks.exchanged_bytes(of, entries) * plan.chunk
    return Held(*_parameters(student.parameters(vocab) / n, size), plan.peak_bytes + gathered, rows)


# --- teachers that are elsewhere --------------------------------------------------------------------------------


def teacher_bytes(vocab: int, hidden: int, k: int = 64, sampled: int = 12) -> dict[str, int]:
    """Bytes per token of what may come of a teacher; sparse ones as a cache stores them."""
    return {
        "logits, fp32": 4 * vocab,
        "log-probabilities, fp16 (dense cache)": Dense(vocab, torch.float16).size,
        "hidden states, bf16": 2 * hidden,
        f"top {k}, ids int32 and fp32": 8 * k,
        f"top {k} (cache)": PackedTopK(vocab, k).size,
        f"sample of {sampled} (cache)": PackedSampled(vocab, sampled).size,
    }
