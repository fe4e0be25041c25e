"""From logits: every divergence × dtype × distribution, the settings of a call, and the edges, against float64.

Inputs, tolerances and what is skipped are those of the tests: `tests.cases`, `tests.compare`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from bench.gpu.visit import Visit
from fastkd.divergences import Divergence, ForwardKL
from tests import cases, compare

_ROWS = 8
_MASKED = slice(5, 900)  # the columns of −inf
_WIDE, _DRY = (50257, 128256), (1003,)


@dataclass(frozen=True)
class _Case:
    vocab: int
    divergence: Divergence = field(default_factory=ForwardKL)
    dtype: torch.dtype = torch.bfloat16
    family: str = "far"
    settings: dict[str, Any] = field(default_factory=lambda: {"reduction": "sum"})
    edge: str = ""  # one of `_EDGES`

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        parts = (str(self.divergence), str(self.dtype)[6:], self.family, f"V={self.vocab}", settings, self.edge)
        return "logits: " + " ".join(part for part in parts if part)


def _nothing(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student, teacher, labels


def _masked_columns(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    student[:, _MASKED] = teacher[:, _MASKED] = -math.inf
    return student, teacher, labels.clamp(max=4)


def _masked_rows(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student, teacher, torch.where(torch.arange(len(labels), device=labels.device) % 3 == 1, -100, labels)


def _misaligned(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that begin one element after another's, with what must not be read on either side."""
    wide = torch.full((len(student), student.shape[1] + 9), math.nan, dtype=student.dtype, device=student.device)
    wide[:, 1 : student.shape[1] + 1] = student
    return wide[:, 1 : student.shape[1] + 1], teacher, labels


def _other_dtype(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student, teacher.float() + 1e-3, labels


_EDGES = {
    "": _nothing,
    "columns of −inf": _masked_columns,
    "masked rows": _masked_rows,
    "misaligned rows": _misaligned,
    "a teacher of another dtype": _other_dtype,
}
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"reduction": "mean"},
    {"reduction": "none"},
    {"reduction": "batchmean", "temperature": 1.0},
    {"temperature": 1.3},
    {"temperature": 3.0, "teacher_temperature": 1.5},
    {"inplace": True},
    {"soft_weight": 0.0, "hard_weight": 1.0},
    {"soft_weight": 1.0, "hard_weight": 0.0},
    {"vocab_size": 1000},
    {"mask_soft": False},
    {"shift": True},
    {"shift": True, "reduction": "none"},
)


def _meaningful(case: _Case) -> bool:
    """As in the tests of a GPU: an offset of 1e4 leaves nothing of 16 bits, nor can fp16 hold every power of p/q."""
    low = case.dtype != torch.float32
    if case.family == "offset":
        return not low
    powers = case.dtype == torch.float16 and case.divergence == fastkd.AlphaBeta(0.5, -0.5)
    return not (case.family == "peaked" and powers)


def _cases(small: bool) -> list[_Case]:
    vocabularies = _DRY if small else _WIDE
    first = vocabularies[0]
    product = (
        _Case(vocab, divergence, dtype, family)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for divergence in cases.DIVERGENCES
        for vocab in vocabularies
        for family in (("far",) if small else cases.FAMILIES)
    )
    # mse compares raw logits, and −inf with −inf is no number.
    edges = [
        _Case(first, divergence, edge=edge)
        for divergence in cases.DIVERGENCES
        for edge in _EDGES
        if edge and (divergence.tempered or edge != "columns of −inf")
    ]
    settings = [
        _Case(vocab, dtype=dtype, settings=each, edge="masked rows")
        for each in _SETTINGS
        for dtype in cases.DTYPES
        for vocab in vocabularies
    ]
    narrow = [_Case(vocab, dtype=dtype) for vocab in (1, 7, 1001, 4100, 5003) for dtype in cases.DTYPES]
    return [case for case in (*settings, *edges, *narrow, *product) if _meaningful(case)]


def _outcome(case: _Case, student: Tensor, teacher: Tensor, labels: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    """The loss and the gradient. Logits that are to be overwritten are."""
    leaf = student.detach().requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, labels, divergence=case.divergence, **{**case.settings, **changes})
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def _judge(case: _Case, device: str) -> None:
    student, teacher = (x.to(device) for x in cases.logits(case.family, _ROWS, case.vocab, case.dtype))
    student, teacher, labels = _EDGES[case.edge](student, teacher, cases.labels(_ROWS, case.vocab).to(device))
    with fastkd.use_backend("reference"):
        truth, eager = (
            _outcome(case, student.to(dtype), teacher.to(dtype), labels, inplace=False)
            for dtype in (torch.float64, torch.float32)
        )
    undecided = cases.undecided(student, teacher, cases.spec(case.divergence, case.vocab))
    loss, gradient = _outcome(case, student, teacher, labels)  # last: it may overwrite the student
    compare.assert_value(loss, truth[0], eager[0])
    compare.assert_gradient(gradient, eager[1].to(gradient.dtype), truth[1], undecided=undecided)


def _textbook(device: str, vocab: int) -> None:
    """By a formula that shares nothing with fastkd."""
    student, teacher = (x.to(device) for x in cases.logits("far", _ROWS, vocab))
    labels = cases.labels(_ROWS, vocab).to(device)
    outcomes = []
    for ours in (True, False):
        z = (student if ours else student.double()).requires_grad_()
        if ours:
            loss = fastkd.kd_loss(z, teacher, labels, temperature=2.0)
        else:
            log_q, log_p = F.log_softmax(z / 2, -1), F.log_softmax(teacher.double() / 2, -1)
            soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            loss = 0.5 * 2**2 * soft + 0.5 * F.cross_entropy(z, labels)
        outcomes.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    (loss, gradient), (value, truth) = outcomes
    compare.assert_value(loss, value)
    assert compare.relative_error(gradient, truth) < 2 * compare.FLOOR


def run(visit: Visit) -> None:
    work = [(str(case), functools.partial(_judge, case)) for case in _cases(visit.small)]
    work.insert(0, ("logits: the textbook's formula", functools.partial(_textbook, vocab=_DRY[0])))
    for name, judge in visit.mine(work):
        with visit.check(name):
            judge(device=visit.device.kind)
