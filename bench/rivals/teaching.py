"""Training steps of the demo's student with terms of layers, and with teachers that learn or follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.harness import machine
from bench.harness.contender import TEMPERATURE, Contender
from bench.rivals.steps import LENGTH, optimizer_of, small_student
from fastkd.teachers import EMA, Frozen, Mutual, Online, TeacherMode
from fastkd.terms import AttentionTerm, Batch, HiddenStateTerm, KDTerm, Term, Terms, outputs_of

__all__ = ["EAGER", "FEATURES", "LOGITS", "UPDATE", "WITH_UPDATES", "features", "moving_average", "pairs"]

LOGITS, FEATURES = "fastkd, logits alone", "fastkd, logits, hidden states and attention"
WITH_UPDATES, UPDATE = "fastkd step", "fastkd, the average's update"
EAGER = "eager"
_TOLERANCE = 1e-4  # of the losses, relative: both in fp32


@dataclass
class _Loop:
    """One batch, learnt from over and over."""

    ids: Tensor
    student: Any
    optimizer: torch.optim.Optimizer
    mode: TeacherMode
    terms: Terms

    @classmethod
    def of(cls, rows: int, vocab: int, mode: TeacherMode, *terms: Term) -> _Loop:
        ids = torch.randint(vocab, (rows // LENGTH, LENGTH), generator=machine.generator())
        student = small_student(vocab)
        all_terms = Terms([KDTerm(fastkd.KDLoss(TEMPERATURE)), *terms], student)
        mode.check(student, all_terms.needs)
        all_terms.check(student, mode.model)
        optimizer = optimizer_of([*student.parameters(), *all_terms.trained, *mode.trained])
        return cls(ids, student, optimizer, mode, all_terms)

    def step(self) -> Tensor:
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        batch = Batch(self.ids, inputs)
        teacher = self.mode.outputs(self.student, inputs, needs=self.terms.teachers_needs)
        student = outputs_of(self.student, inputs, self.terms.students_needs)
        loss = self.terms(student, teacher, batch) + sum(self.mode.loss(student, batch).values())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def features(rows: int, vocab: int) -> list[Contender]:
    """The logits alone, and with the outputs of blocks and their attention, beside one teacher."""
    teacher = _large_teacher(vocab)
    alone = _Loop.of(rows, vocab, Frozen(teacher))
    both = _Loop.of(rows, vocab, Frozen(teacher), HiddenStateTerm("uniform"), AttentionTerm("uniform", "qk"))
    return [Contender(LOGITS, alone.step), Contender(FEATURES, both.step)]


def moving_average(rows: int, vocab: int) -> list[Contender]:
    """A whole step with a moving average as the teacher, and the average's update by itself."""
    loop = _Loop.of(rows, vocab, EMA())

    def run() -> Tensor:
        loss = loop.step()
        loop.mode.stepped(loop.student, 1)
        return loss

    run()
    return [Contender(WITH_UPDATES, run), Contender(UPDATE, lambda: loop.mode.stepped(loop.student, 1))]


def pairs(rows: int, vocab: int, kind: str) -> list[Contender]:
    """Two models that learn in one step, by fastkd and by the eager recipe: `online` or `mutual`."""
    torch.manual_seed(1)
    other = (
        small_student(vocab, width=512, layers=6, heads=8, seed=1) if kind == "online" else small_student(vocab, seed=1)
    )
    kd = fastkd.KDLoss(TEMPERATURE)
    twin = copy.deepcopy(other)
    loop = _Loop.of(rows, vocab, Online(other) if kind == "online" else Mutual(other, kd))
    losses: list[float] = []

    def verify(value: object) -> float:
        assert isinstance(value, Tensor)
        losses.append(value.item())
        off = abs(losses[-1] - losses[0]) / losses[0]
        assert off < _TOLERANCE, f"the eager recipe and fastkd disagree on the loss: {losses}"
        return off

    eager = _eager(small_student(vocab), twin, loop.ids, both=kind == "mutual")
    return [Contender(f"fastkd, {kind}", loop.step, verify=verify), Contender(EAGER, eager, verify=verify)]


def _eager(student: Any, other: Any, ids: Tensor, *, both: bool) -> Callable[[], Tensor]:
    """One forward of each, and the losses on logits in full."""
    optimizer = optimizer_of([*student.parameters(), *other.parameters()])
    labels = ids[:, 1:].flatten()

    def half(logits: Tensor, teacher: Tensor) -> Tensor:
        log_p = F.log_softmax(teacher.detach() / TEMPERATURE, -1)
        log_q = F.log_softmax(logits / TEMPERATURE, -1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return 0.5 * F.cross_entropy(logits, labels) + 0.5 * TEMPERATURE**2 * soft

    def run() -> Tensor:
        ours, theirs = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1].flatten(0, 1)
            for model in (student, other)
        )
        loss = half(ours, theirs) + (half(theirs, ours) if both else F.cross_entropy(theirs, labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _large_teacher(vocab: int) -> Any:
    """Of the size of SmolLM2-135M, but with 12 heads: of 9 no student has groups that is 256 wide."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(machine.DEVICE).eval().requires_grad_(False)
