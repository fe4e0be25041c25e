"""What do two teachers cost, mixed in probability space, from hidden states to gradients?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from bench.harness import check
from bench.harness.check import BOTH
from bench.harness.contender import FRESH, TEMPERATURE, Contender
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals import recipes
from bench.rivals.hidden import Hidden
from fastkd.divergences import ForwardKL

_ONE = "one teacher"
MIXTURE = Question(
    "mixture",
    Section.HIDDEN,
    "From hidden states to forward KL (T = 2) to two teachers, mixed in probability space, and cross-entropy",
    "Matrix products: 2·N·V·(3·H of the student + H of both teachers) FLOPs. `one teacher` is the same loss beside the "
    "wider one.",
    measure="flops",
    gated=True,
)
_WEIGHTS = (0.3, 0.7)
CASES = (
    Case(
        MIXTURE,
        1024,
        49152,
        torch.float32,
        (faster(FRESH, "eager", 1.5), within(FRESH, _ONE, 1.8)),
        hidden=(256, 256, 576),
        in_quick=True,
    ),
)


def bench_mixture(benchmark: Benchmark, case: Case, quick: bool) -> None:
    race(benchmark, _contenders(case), case, quick=quick)


def _contenders(case: Case) -> list[Contender]:
    assert case.hidden is not None
    own, *widths = case.hidden
    batches = [
        Hidden.random(case.rows, case.vocab, (own, width), case.dtype, seed=seed) for seed, width in enumerate(widths)
    ]
    batch, teachers = batches[0], [batch.teacher for batch in batches if batch.teacher is not None]
    hidden, weight = batch.student.hidden, batch.student.weight
    kd = fastkd.KDLoss(TEMPERATURE)

    def mixed(logits: list[Tensor]) -> Tensor:
        """Logits of the mixture at the temperature."""
        p = sum(w * torch.softmax(z / TEMPERATURE, -1) for w, z in zip(_WEIGHTS, logits, strict=True))
        assert isinstance(p, Tensor)
        return TEMPERATURE * p.log()

    def eager() -> Tensor:
        with torch.no_grad():
            teacher = mixed([teacher.logits() for teacher in teachers])
        return recipe(hidden @ weight.T, teacher, batch.labels)

    def truth() -> tuple[float, Tensor, Tensor]:
        loss, d_hidden, d_weight = 0.0, torch.empty(hidden.shape), torch.zeros_like(weight, dtype=torch.float64)
        wide = [(teacher.hidden.double(), teacher.weight.double()) for teacher in teachers]
        states, head = hidden.detach().double(), weight.detach().double()
        for slab in check.slabs(case.rows, case.vocab):
            logits = states[slab] @ head.T
            given = logits, mixed([rows[slab] @ columns.T for rows, columns in wide]), batch.labels[slab]
            part, slope = check.kd_rows(*given, ForwardKL(), TEMPERATURE, BOTH, of=case.rows, kept=torch.float64)
            loss += part
            d_hidden[slab] = (slope @ head).float()
            d_weight.addmm_(slope.T, states[slab])
        return loss, d_hidden, d_weight.float()

    def contender(name: str, loss: Callable[[], Tensor], judged: bool = True) -> Contender:
        def prepare() -> None:
            hidden.grad = weight.grad = None

        def run() -> Tensor:
            value = loss()
            value.backward()
            return value

        def verify(value: object) -> float | None:
            gradients = [(hidden.grad, d_hidden), (weight.grad, d_weight)]
            return check.verified(name, value, expected, gradients, recipes.limit(name, False)) if judged else None

        return Contender(name, run, prepare, verify)

    recipe = recipes.kd_loss(ForwardKL(), TEMPERATURE, BOTH)
    expected, d_hidden, d_weight = truth()
    return [
        contender(FRESH, lambda: kd(batch.student, fastkd.Mixture(teachers, _WEIGHTS), batch.labels)),
        contender("eager", eager),
        contender(_ONE, lambda: kd(batch.student, teachers[-1], batch.labels), judged=False),
    ]
