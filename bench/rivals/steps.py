"""Training steps of the demo's student: eager, and fastkd's with a teacher given, live or cached."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.harness import machine
from bench.harness.contender import TEMPERATURE, Contender
from bench.rivals import recipes
from bench.rivals.recipes import EAGER_STEP
from fastkd import Projection
from fastkd.divergences import ForwardKL

__all__ = ["CACHED_STEP", "LENGTH", "LIVE_STEP", "STEP", "optimizer_of", "small_student", "step", "steps"]

STEP, LIVE_STEP, CACHED_STEP = "fastkd step", "fastkd step, live teacher", "fastkd step, cached teacher"
LENGTH, _TEACHER_HIDDEN = 128, 576
_TOLERANCE = 1e-4  # of the losses, relative: both in fp32


@dataclass
class _Lesson:
    """A batch, the student that learns from it, and the teacher's hidden states."""

    ids: Tensor  # [windows, 128]
    student: Any
    optimizer: torch.optim.Optimizer
    teacher: Projection

    @classmethod
    def of(cls, rows: int, vocab: int) -> _Lesson:
        generator = machine.generator()
        ids = torch.randint(vocab, (rows // LENGTH, LENGTH), generator=generator)
        hidden = torch.randn(*ids.shape, _TEACHER_HIDDEN, generator=generator)
        head = torch.randn(vocab, _TEACHER_HIDDEN, generator=generator).mul_(3 / _TEACHER_HIDDEN**0.5)
        student = small_student(vocab)
        return cls(ids, student, optimizer_of(list(student.parameters())), Projection(hidden, head))

    def step(self, loss: Tensor) -> Tensor:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}


def small_student(vocab: int, *, width: int = 256, layers: int = 4, heads: int = 4, seed: int = 0) -> Any:
    """The demo's, or a GPT-2 of another size."""
    import transformers

    torch.manual_seed(seed)
    size = {"n_positions": LENGTH, "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    fixed = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return (
        transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**size, **fixed))
        .to(machine.DEVICE)
        .train()
    )


def optimizer_of(weights: list[Any]) -> torch.optim.Optimizer:
    """AdamW that changes nothing, so that every step is the same, with its state there already."""
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def step(name: str, rows: int, vocab: int) -> Contender:
    """The contender called `name`, of those that are given the teacher's hidden states."""
    lesson = _Lesson.of(rows, vocab)
    return Contender(name, {STEP: _ours, EAGER_STEP: _eager}[name](lesson))


def steps(rows: int, vocab: int) -> list[Contender]:
    """All of one race."""
    lesson = _Lesson.of(rows, vocab)
    losses: list[float] = []

    def verify(value: object) -> float:
        """Of fastkd's step and of the eager one, whichever comes second."""
        assert isinstance(value, Tensor)
        losses.append(value.item())
        off = abs(losses[-1] - losses[0]) / losses[0]
        assert off < _TOLERANCE, f"the eager recipe and fastkd disagree on the loss: {losses}"
        return off

    return [
        Contender(STEP, _ours(lesson), verify=verify),
        Contender(EAGER_STEP, _eager(lesson), verify=verify),
        Contender(LIVE_STEP, _live(lesson)),
        Contender(CACHED_STEP, _cached(lesson)),
    ]


def _ours(lesson: _Lesson) -> Callable[[], Tensor]:
    kd = fastkd.KDLoss(TEMPERATURE, shift=True)
    return lambda: lesson.step(kd(fastkd.project(lesson.student, **lesson.inputs), lesson.teacher, lesson.ids))


def _eager(lesson: _Lesson) -> Callable[[], Tensor]:
    recipe = recipes.kd_loss(ForwardKL(), TEMPERATURE)

    def run() -> Tensor:
        student = lesson.student(**lesson.inputs, use_cache=False).logits
        teacher = lesson.teacher.hidden @ lesson.teacher.weight.T
        flat = (logits[:, :-1].flatten(0, 1) for logits in (student, teacher))
        return lesson.step(recipe(*flat, lesson.ids[:, 1:].flatten()))

    return run


def _live(lesson: _Lesson) -> Callable[[], Tensor]:
    """With a teacher of the size of SmolLM2-135M, whose weights do not matter here."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=lesson.teacher.shape[-1],
        hidden_size=_TEACHER_HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    teacher = transformers.LlamaForCausalLM(config).to(machine.DEVICE).eval().requires_grad_(False)
    kd = fastkd.KDLoss(TEMPERATURE, shift=True)

    def run() -> Tensor:
        with torch.no_grad():
            targets = fastkd.project(teacher, **lesson.inputs)
        return lesson.step(kd(fastkd.project(lesson.student, **lesson.inputs), targets, lesson.ids))

    return run


def _cached(lesson: _Lesson) -> Callable[[], Tensor]:
    """From a sampled cache on disk, whose reading is part of the step."""
    folder = tempfile.TemporaryDirectory(prefix="fastkd-bench-")
    directory = pathlib.Path(folder.name) / "cache"
    cache = fastkd.cache.write(lambda _: lesson.teacher, [lesson.inputs], directory, temperature=TEMPERATURE)
    examples, collator = [{"input_ids": row} for row in lesson.ids], fastkd.cache.Collator(cache)
    kd = fastkd.KDLoss(TEMPERATURE, shift=True)

    def run(_folder: Any = folder) -> Tensor:  # which is there for as long as this function
        batch = collator(examples)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return lesson.step(kd(fastkd.project(lesson.student, **inputs), batch["teacher"], batch["labels"]))

    return run
