"""Teachers that keep K tokens of each row: every kind × divergence it serves × dtype, beside logits and projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fastkd
from bench.gpu.check_hidden import Sizes, budgets
from bench.gpu.visit import Visit
from fastkd.divergences import TABLE
from fastkd.served import SERVES
from tests import cases, compare
from tests.sparse_targets import kept

_KINDS = ("ghost", "renormalize", "sampled")
_ROWS = 8
_SIZES, _DRY = Sizes(512, 50257, 256, 256), Sizes(128, 523, 16, 16)


@dataclass(frozen=True)
class _Case:
    kind: str
    divergence: str
    dtype: torch.dtype
    family: str = "far"
    strategy: str | None = None  # of a loss from hidden states: see `check_hidden.budgets`; None from logits

    def __str__(self) -> str:
        source = self.family if self.strategy is None else f"hidden {self.strategy}"
        return f"sparse: {self.kind} {self.divergence} {str(self.dtype)[6:]} {source}"


def _cases() -> list[_Case]:
    served = [(kind, name) for kind in _KINDS for name in SERVES[kind].divergences if name in TABLE]
    pairs = [(*pair, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16) for pair in served]
    return [
        *(_Case(*pair) for pair in pairs),
        *(_Case(*pair, strategy=strategy) for pair in pairs for strategy in ("default", "tiles")),
        *(_Case(*pair, family=family) for pair in pairs for family in ("near_equal", "flat")),
    ]


def _outcome(
    case: _Case, student: list[Tensor], targets: fastkd.SparseTargets, labels: Tensor, budget: int | None = None
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in student]
    source = leaves[0] if len(leaves) == 1 else fastkd.Projection(*leaves)
    loss = fastkd.kd_loss(source, targets, labels, divergence=case.divergence, memory_budget=budget, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _judge(visit: Visit, case: _Case) -> None:
    sizes, entries = (_DRY, 16) if visit.small else (_SIZES, 64)
    kind, rows = visit.device.kind, _ROWS if case.strategy is None else sizes.rows
    logits, teacher = (x.to(kind) for x in cases.logits(case.family, rows, sizes.vocab, case.dtype))
    targets = kept(teacher, entries, case.kind, shuffled=True)
    labels = cases.labels(rows, sizes.vocab, ignored=(2,)).to(kind)
    student, budget = [logits], None
    if case.strategy is not None:
        width = sizes.student
        student = [
            visit.device.normal(rows, width, dtype=case.dtype),
            visit.device.normal(sizes.vocab, width, dtype=case.dtype, scale=3 / width**0.5),
        ]
        budget = budgets(sizes, case.dtype, kind, TABLE[case.divergence]())[case.strategy]
    ours = _outcome(case, student, targets, labels, budget)
    with fastkd.use_backend("reference"):
        truth, eager = (
            _outcome(case, [x.to(dtype) for x in student], targets, labels) for dtype in (torch.float64, torch.float32)
        )
    compare.assert_value(ours[0], truth[0], eager[0])
    for a, b, c in zip(ours[1:], eager[1:], truth[1:], strict=True):
        if a.dtype == torch.float32 or case.strategy is None:
            compare.assert_gradient(a, b.to(a.dtype), c)
        else:
            assert (off := compare.relative_error(a, c)) < compare.LOW_PRECISION, f"relative error {off:.1e}"


def run(visit: Visit) -> None:
    for case in visit.mine(_cases()):
        with visit.check(str(case)):
            _judge(visit, case)
