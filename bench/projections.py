"""fastkd and its rivals on hidden states and output heads, each ready to be run, checked and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from bench import check, rivals
from bench.cases import BUDGETS, CHUNKED, FRESH, PRODUCTS, WIDENED, Case
from bench.contenders import TEMPERATURE, Contender
from fastkd import Projection
from fastkd.divergences import ForwardKL

__all__ = ["Hidden", "HiddenTruth", "products", "projection_contender", "projection_contenders"]

_DIVERGENCE = ForwardKL()


class HiddenTruth(NamedTuple):
    loss: float
    hidden: Tensor  # [N, H] fp32
    weight: Tensor  # [V, H] fp32


@dataclass
class Hidden:
    """Random inputs of one case. The student's hidden states and weight are leaves that take gradients."""

    student: Projection
    teacher: Projection
    labels: Tensor

    @classmethod
    def random(cls, rows: int, vocab: int, hidden: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Hidden:
        """Logits of a standard deviation of 6, as those of `check.Batch`, and for the same reason."""
        generator = torch.Generator().manual_seed(seed)

        def projection(size: int, trained: bool) -> Projection:
            states = torch.randn(rows, size, generator=generator).to(dtype)
            weight = torch.randn(vocab, size, generator=generator).mul_(6 / size**0.5).to(dtype)
            return Projection(states.requires_grad_(trained), weight.requires_grad_(trained))

        labels = torch.randint(vocab, (rows,), generator=generator)
        return cls(projection(hidden[0], True), projection(hidden[1], False), labels)

    def widened(self) -> Hidden:
        """A copy in fp32."""

        def wide(projection: Projection) -> Projection:
            copies = (tensor.detach().to(torch.float32, copy=True) for tensor in (projection.hidden, projection.weight))
            return Projection(*(copy.requires_grad_(projection.hidden.requires_grad) for copy in copies))

        return Hidden(wide(self.student), wide(self.teacher), self.labels)

    def truth(self) -> HiddenTruth:
        """Loss and gradients in float64."""
        student, teacher = self.student.detach(), self.teacher
        weight, head = student.weight.double(), teacher.weight.double()
        loss, d_hidden, d_weight = 0.0, torch.empty(student.hidden.shape), torch.zeros_like(weight)
        for slab in check.slabs(len(d_hidden)):
            states = student.hidden[slab].double()
            logits, above = states @ weight.T, teacher.hidden[slab].double() @ head.T
            part, slope = check.kd_slab(logits, above, self.labels[slab], len(d_hidden), _DIVERGENCE, TEMPERATURE)
            loss += part
            d_hidden[slab] = slope @ weight
            d_weight.addmm_(slope.T, states)
        return HiddenTruth(loss, d_hidden, d_weight.float())


def projection_contender(name: str, batch: Hidden, truth: HiddenTruth | None = None) -> Contender:
    """The contender called `name`; without a truth it cannot be verified."""
    if name == WIDENED:
        batch = batch.widened()
    low = batch.student.dtype != torch.float32
    hidden, weight = batch.student.hidden, batch.student.weight
    operands = (hidden, weight, batch.teacher.hidden, batch.teacher.weight, batch.labels)
    recipe = rivals.kd_loss(_DIVERGENCE, TEMPERATURE)

    def prepare() -> None:
        hidden.grad = weight.grad = None

    if name in BUDGETS:
        ours = fastkd.KDLoss(TEMPERATURE, divergence=_DIVERGENCE, memory_budget=BUDGETS[name])

        def run() -> Tensor:
            value = ours(batch.student, batch.teacher, batch.labels)
            value.backward()
            return value

    elif name == CHUNKED:
        loop = rivals.chunked(recipe)

        def run() -> Tensor:
            return loop(*operands)

    else:
        loss = rivals.from_hidden(recipe)
        if name == "compile":
            loss = rivals.compiled(loss)

        def run() -> Tensor:
            value = loss(*operands)
            value.backward()
            return value

    def verify(value: object) -> float:
        assert truth is not None
        return check.verified(name, value, truth.loss, [(hidden.grad, truth.hidden), (weight.grad, truth.weight)], low)

    return Contender(name, run, prepare, verify)


def projection_contenders(case: Case) -> list[Contender]:
    """All of one race: fastkd first, then the recipes, then the floor."""
    assert case.hidden is not None
    batch = Hidden.random(case.rows, case.vocab, case.hidden, case.dtype)
    truth = batch.truth()
    if case.dtype != torch.float32:  # products in bf16 are slow without hardware for them: one recipe is enough
        return [projection_contender(name, batch, truth) for name in (FRESH, WIDENED, "eager")]
    names = [FRESH, "eager", *(["compile"] if rivals.can_compile() else []), CHUNKED]
    return [*(projection_contender(name, batch, truth) for name in names), products(batch)]


def products(batch: Hidden) -> Contender:
    """The bare matrix products, into memory touched before, whose rows are aligned: odd strides are slower."""
    student, teacher = batch.student.detach(), batch.teacher
    vocab = len(student.weight)
    logits, above = (torch.zeros(len(batch.labels), -(-vocab // 16) * 16)[:, :vocab] for _ in range(2))
    d_hidden, d_weight = torch.zeros_like(student.hidden), torch.zeros_like(student.weight)

    def run() -> None:
        torch.mm(student.hidden, student.weight.T, out=logits)
        torch.mm(teacher.hidden, teacher.weight.T, out=above)
        torch.mm(logits, student.weight, out=d_hidden)
        torch.mm(logits.T, student.hidden, out=d_weight)

    return Contender(PRODUCTS, run)
