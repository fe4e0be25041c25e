"""fastkd and its rivals on hidden states and output heads, each ready to be run, checked and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from bench.harness import check, machine
from bench.harness.check import BOTH, Objective
from bench.harness.contender import FRESH, TEMPERATURE, Contender
from bench.harness.question import Case
from bench.rivals import peers, recipes
from bench.rivals.recipes import CHUNKED, HiddenLoss, Operands
from fastkd import Projection
from fastkd.divergences import ForwardKL

__all__ = [
    "BUDGETS",
    "LARGE",
    "PRODUCTS",
    "SMALL",
    "WIDENED",
    "Hidden",
    "HiddenTruth",
    "hidden_loss",
    "products",
    "projection_contender",
    "projection_contenders",
]

PRODUCTS, WIDENED, SMALL, LARGE = "products", "fastkd fp32", "fastkd 32 MiB", "fastkd 1 GiB"
#: fastkd's contenders → their `memory_budget` in bytes; None is the default one.
BUDGETS: dict[str, int | None] = {FRESH: None, WIDENED: None, SMALL: 32 << 20, LARGE: 1 << 30}
_DIVERGENCE = ForwardKL()
#: Contenders beside fastkd, in this order: those that a case's bars name, but for what cannot run here.
_OTHERS = (WIDENED, "eager", "compile", CHUNKED, *peers.PEERS)
_SLAB = 128  # rows whose logits the reference computes at a time


class HiddenTruth(NamedTuple):
    loss: float
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]


@dataclass
class Hidden:
    """Inputs of one case. The student's hidden states and weight are leaves that take gradients."""

    student: Projection
    teacher: Projection | None
    labels: Tensor

    @classmethod
    def random(cls, rows: int, vocab: int, hidden: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Hidden:
        """Logits of a standard deviation of 6, as those of `check.Batch`, and for the same reason."""
        generator = machine.generator(seed)

        def projection(size: int, trained: bool) -> Projection:
            states = torch.randn(rows, size, generator=generator).to(dtype)
            weight = torch.randn(vocab, size, generator=generator).mul_(6 / size**0.5).to(dtype)
            return Projection(states.requires_grad_(trained), weight.requires_grad_(trained))

        labels = torch.randint(vocab, (rows,), generator=generator)
        student, *teacher = hidden
        return cls(projection(student, True), projection(*teacher, False) if teacher else None, labels)

    def widened(self) -> Hidden:
        """A copy in fp32."""

        def wide(projection: Projection) -> Projection:
            copies = (tensor.detach().to(torch.float32, copy=True) for tensor in (projection.hidden, projection.weight))
            return Projection(*(copy.requires_grad_(projection.hidden.requires_grad) for copy in copies))

        return Hidden(wide(self.student), self.teacher and wide(self.teacher), self.labels)

    def operands(self) -> Operands:
        above, head = (self.teacher.hidden, self.teacher.weight) if self.teacher else (None, None)
        return Operands(self.student.hidden, self.student.weight, above, head, self.labels)

    def truth(self, objective: Objective = BOTH, kept: torch.dtype = torch.float32) -> HiddenTruth:
        """Loss and gradients in float64, the gradients kept in another dtype."""
        hidden, weight, above, head, labels = self.operands()
        weight, head = weight.detach().double(), None if head is None else head.double()
        loss, d_hidden, d_weight = 0.0, torch.empty(hidden.shape, dtype=kept), torch.zeros_like(weight)
        for start in range(0, len(hidden), _SLAB):
            slab = slice(start, start + _SLAB)
            states = hidden.detach()[slab].double()
            taught = None if above is None or head is None else above[slab].double() @ head.T
            given = states @ weight.T, taught, labels[slab]
            part, slope = check.kd_rows(*given, _DIVERGENCE, TEMPERATURE, objective, of=len(hidden), kept=torch.float64)
            loss += part
            d_hidden[slab] = slope @ weight
            d_weight.addmm_(slope.T, states)
        return HiddenTruth(loss, d_hidden, d_weight.to(kept))


def _ours(memory_budget: int | None, objective: Objective) -> HiddenLoss:
    weights = {"soft_weight": objective.soft, "hard_weight": objective.hard}
    kd = fastkd.KDLoss(TEMPERATURE, divergence=_DIVERGENCE, memory_budget=memory_budget, **weights)

    def loss(x: Operands) -> Tensor:
        teacher = None if x.above is None or x.head is None else Projection(x.above, x.head)
        return kd(Projection(x.hidden, x.weight), teacher, x.labels)

    return loss


def hidden_loss(name: str, objective: Objective = BOTH) -> HiddenLoss | None:
    """The loss called `name`, or None where it cannot run here."""
    if name in BUDGETS:
        return _ours(BUDGETS[name], objective)
    if name in peers.PEERS:
        return peers.PEERS[name].loss(objective, TEMPERATURE)
    recipe = recipes.kd_loss(_DIVERGENCE, TEMPERATURE, objective)
    if name == CHUNKED:
        return recipes.chunked(recipe)
    whole = recipes.from_hidden(recipe)
    if name == "compile":
        return recipes.compiled(whole) if recipes.can_compile() else None
    return whole


def projection_contender(
    name: str, batch: Hidden, truth: HiddenTruth | None = None, objective: Objective = BOTH
) -> Contender:
    """The contender called `name`; without a truth it cannot be verified."""
    loss = hidden_loss(name, objective)
    assert loss is not None, f"{name} cannot run here"
    x = (batch.widened() if name == WIDENED else batch).operands()

    def prepare() -> None:
        x.hidden.grad = x.weight.grad = None

    def verify(value: object) -> float:
        assert truth is not None
        low = x.hidden.dtype != torch.float32
        if low and name not in BUDGETS:  # recipes round the logits, what peers do is their own affair
            limit = check.OTHER_OBJECTIVE if name in peers.PEERS else check.ARITHMETIC_BF16
        else:
            limit = recipes.limit(name, low)
        gradients = [(x.hidden.grad, truth.hidden), (x.weight.grad, truth.weight)]
        return check.verified(name, value, truth.loss, gradients, limit)

    compiles = peers.PEERS[name].compiles if name in peers.PEERS else name in recipes.COMPILED
    return Contender(name, lambda: recipes.differentiated(loss, x), prepare, verify, compiles)


def projection_contenders(case: Case, objective: Objective, batch: Hidden | None = None) -> list[Contender]:
    """All of one race, on inputs of its own where none are given: fastkd first, then its rivals, then the floor."""
    assert case.hidden is not None
    batch = batch or Hidden.random(case.rows, case.vocab, case.hidden, case.dtype)
    truth = batch.truth(objective)
    named = {bar.other for bar in case.bars}
    names = (FRESH, *(name for name in _OTHERS if name in named))
    contenders = [projection_contender(name, batch, truth, objective) for name in names if hidden_loss(name, objective)]
    return [*contenders, products(batch)] if PRODUCTS in named else contenders


def products(batch: Hidden) -> Contender:
    """The bare matrix products, into memory touched before, whose rows are aligned: odd strides are slower."""
    student, teacher = batch.student.detach(), batch.teacher
    vocab = len(student.weight)
    rows = torch.zeros(2, len(batch.labels), -(-vocab // 16) * 16, dtype=student.dtype, device=student.device)
    logits, above = rows[:, :, :vocab]
    d_hidden, d_weight = torch.zeros_like(student.hidden), torch.zeros_like(student.weight)

    def run() -> None:
        torch.mm(student.hidden, student.weight.T, out=logits)
        if teacher is not None:
            torch.mm(teacher.hidden, teacher.weight.T, out=above)
        torch.mm(logits, student.weight, out=d_hidden)
        torch.mm(logits.T, student.hidden, out=d_weight)

    return Contender(PRODUCTS, run)
