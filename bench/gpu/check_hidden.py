"""From hidden states: every divergence × dtype, a projection on either side or both, whole rows and tiles.

The truth is float64, from logits of the same operands; the yardstick is eager fp32 on them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import fastkd
from bench.gpu.visit import Visit
from fastkd.divergences import TABLE, Divergence, ForwardKL
from tests import cases, compare

_HEAD = {"softcap": 20.0, "logit_scale": 0.5}
_IGNORED = (0, 7, 30)


@dataclass(frozen=True)
class Sizes:
    rows: int
    vocab: int
    student: int  # hidden sizes
    teacher: int


_VISIT, _DRY = Sizes(512, 50257, 256, 384), Sizes(128, 523, 16, 24)


@dataclass(frozen=True)
class _Case:
    divergence: Divergence
    dtype: torch.dtype
    strategy: str  # a key of `budgets`
    sides: str = "both"  # which of them are projections: "both", "student", "teacher"
    whole_head: bool = False  # bias, softcap and scale too

    def __str__(self) -> str:
        head = " bias, softcap, scale" if self.whole_head else ""
        return f"hidden: {self.divergence} {str(self.dtype)[6:]} {self.strategy} {self.sides}{head}"


@functools.cache
def budgets(sizes: Sizes, dtype: torch.dtype, device: str, divergence: Divergence) -> dict[str, int | None]:
    """A memory budget for every way the loss can go: the default, several chunks, tiles; as the plan says."""
    found: dict[str, int | None] = {"default": None}
    shape = sizes.rows, sizes.vocab, sizes.student, sizes.teacher
    budget = 16 * sizes.rows * sizes.vocab
    while budget:
        try:
            plan = fastkd.plan(*shape, dtype=dtype, device=device, memory_budget=budget, divergence=divergence)
        except ValueError:  # the budget is too small for anything
            break
        if plan.strategy == "tiles":
            found.setdefault("tiles", budget)
        elif plan.chunk < sizes.rows:
            found.setdefault("several chunks", budget)
        budget = budget * 15 // 16
    return found


def _cases() -> list[_Case]:
    """The broad ones first: time may be short."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    every = [row() for row in TABLE.values()]
    ways = ("default", "tiles", "several chunks")
    broad = [_Case(divergence, dtype, way) for dtype in dtypes for divergence in every for way in ways]
    sides = [
        _Case(divergence, dtype, way, side)
        for dtype in dtypes
        for divergence in every
        for side in ("student", "teacher")
        for way in ("default", "tiles")
    ]
    heads = [_Case(ForwardKL(), dtype, way, whole_head=True) for dtype in dtypes for way in ways]
    return [*heads, *broad, *sides]


def _sources(visit: Visit, sizes: Sizes, case: _Case) -> tuple[list[Tensor], list[Tensor]]:
    """Of student and teacher: hidden states, weight and perhaps bias, or logits alone."""
    device, dtype = visit.device, case.dtype

    def side(name: str, width: int) -> list[Tensor]:
        if case.sides not in ("both", name):
            return [device.normal(sizes.rows, sizes.vocab, dtype=dtype, scale=3)]
        hidden = device.normal(sizes.rows, width, dtype=dtype)
        return [hidden, device.normal(sizes.vocab, width, dtype=dtype, scale=3 / width**0.5)]

    student, teacher = side("student", sizes.student), side("teacher", sizes.teacher)
    if case.whole_head:
        student.append(device.normal(sizes.vocab, dtype=dtype, scale=0.1))
    return student, teacher


def _outcome(
    case: _Case, student: list[Tensor], teacher: list[Tensor], labels: Tensor, budget: int | None = None
) -> list[Tensor]:
    """The loss, and the gradients of whatever the student is made of."""
    leaves = [x.detach().requires_grad_() for x in student]

    def source(tensors: list[Tensor], **head: float) -> Tensor | fastkd.Projection:
        return tensors[0] if len(tensors) == 1 else fastkd.Projection(*tensors, **head)

    sources = source(leaves, **(_HEAD if case.whole_head else {})), source(teacher)
    loss = fastkd.kd_loss(*sources, labels, divergence=case.divergence, memory_budget=budget)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _exact(
    case: _Case, dtype: torch.dtype, student: list[Tensor], teacher: list[Tensor], labels: Tensor
) -> list[Tensor]:
    """The same by the reference, which forms all logits, in this dtype."""
    with fastkd.use_backend("reference"):
        return _outcome(case, [x.to(dtype) for x in student], [x.to(dtype) for x in teacher], labels)


def _judge(visit: Visit, case: _Case) -> None:
    sizes = _DRY if visit.small else _VISIT
    student, teacher = _sources(visit, sizes, case)
    labels = cases.labels(sizes.rows, sizes.vocab, ignored=_IGNORED).to(visit.device.kind)
    budget = budgets(sizes, case.dtype, visit.device.kind, case.divergence)[case.strategy]
    ours = _outcome(case, student, teacher, labels, budget)
    truth, eager = (_exact(case, dtype, student, teacher, labels) for dtype in (torch.float64, torch.float32))
    compare.assert_value(ours[0], truth[0], eager[0])
    for place, (a, b, c) in enumerate(zip(ours[1:], eager[1:], truth[1:], strict=True)):
        if a.dtype == torch.float32:
            compare.assert_gradient(a, b, c, f"gradient {place}")
        else:  # rounded for the products, and once more at the end
            off = compare.relative_error(a, c)
            assert off < compare.LOW_PRECISION, f"gradient {place}: relative error {off:.1e}"
    assert not ours[1][list(_IGNORED)].any(), "a masked token has a gradient"


def run(visit: Visit) -> None:
    for case in visit.mine(_cases()):
        with visit.check(str(case)):
            _judge(visit, case)
