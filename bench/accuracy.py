"""Inputs on which a distillation gradient is hard or easy to compute, and how far contenders are off on them.

The gradient is a difference of two probability vectors: the nearer the student is to the teacher, the less is left
of it beside the rounding of either.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import fastkd
from bench import check, machine, rivals
from bench.cases import Case
from bench.check import Batch
from bench.contenders import TEMPERATURE
from bench.names import CHUNKED, FRESH, LIGER, LINEAR_CE, ROUNDED_TRUTH, SOFT, TRL
from bench.projections import Hidden, hidden_loss
from bench.rivals import HiddenLoss, Loss
from fastkd import Projection
from fastkd.divergences import resolve

__all__ = ["hidden_errors", "logit_errors"]

#: Family → the standard deviation of the logits, and how far the student's are from the teacher's, relatively; None:
#: they are unrelated.
_FAMILIES: dict[str | None, tuple[float, float | None]] = {
    "near-equal 1e-3": (3.0, 1e-3),
    "near-equal 1e-2": (3.0, 1e-2),
    "far": (3.0, None),
    "peaked": (15.0, None),
    "flat": (0.01, None),
}
#: What one token of each row gets on top, on both sides, where rows are peaked: it holds nearly all the mass.
_PEAK = 40.0


def _logits(case: Case) -> Batch:
    (deviation, distance), rows, vocab = _FAMILIES[case.family], case.rows, case.vocab
    generator = machine.generator()
    noise = functools.partial(torch.randn, rows, vocab, generator=generator)
    teacher = deviation * noise()
    student = deviation * noise() if distance is None else teacher * (1 + distance * noise())
    labels = torch.randint(vocab, (rows,), generator=generator)
    if case.family == "peaked":
        peak = torch.full((rows, 1), _PEAK)
        student, teacher = (logits.scatter_add(1, labels[:, None], peak) for logits in (student, teacher))
    return Batch(student.to(case.dtype).requires_grad_(), teacher.to(case.dtype), labels)


def _hidden(case: Case) -> Hidden:
    """As `_logits`. A near student shares the teacher's hidden states and weights, which have fewer columns than its
    own: in the others it differs, by an amount that no rounding of the inputs changes.
    """
    assert case.hidden is not None
    (deviation, distance), rows, vocab = _FAMILIES[case.family], case.rows, case.vocab
    generator = machine.generator()
    labels = torch.randint(vocab, (rows,), generator=generator)

    def projection(size: int, deviation: float) -> tuple[Tensor, Tensor]:
        states = torch.randn(rows, size, generator=generator)
        weight = torch.randn(vocab, size, generator=generator).mul_(deviation / size**0.5)
        if case.family == "peaked":
            states += _PEAK * weight[labels] / weight[labels].square().sum(-1, keepdim=True)
        return states, weight

    student_size, teacher_size = case.hidden
    teacher = projection(teacher_size, deviation)
    if distance is None:
        student = projection(student_size, deviation)
    else:
        own = projection(student_size - teacher_size, deviation)
        own[0].mul_(distance)
        student = tuple(torch.cat(parts, -1) for parts in zip(teacher, own, strict=True))
    states, weight = (tensor.to(case.dtype).requires_grad_() for tensor in student)
    return Hidden(Projection(states, weight), Projection(*(tensor.to(case.dtype) for tensor in teacher)), labels)


def logit_errors(case: Case) -> dict[str, float]:
    """Contender → relative error of the gradient w.r.t. the student's logits."""
    batch = _logits(case)
    given = batch.student.detach(), batch.teacher, batch.labels
    _, truth = check.kd_rows(*given, resolve(case.divergence), TEMPERATURE, SOFT, kept=torch.float64)
    found = {}
    for name, loss in _logit_losses(case.divergence, case.dtype).items():
        batch.student.grad = None
        loss(batch.student, batch.teacher, batch.labels).backward()
        assert batch.student.grad is not None
        found[name] = check.error(batch.student.grad, truth)
    return found | {ROUNDED_TRUTH: check.error(truth.to(case.dtype), truth)}


def hidden_errors(case: Case) -> dict[str, float]:
    """Contender → relative error of d hidden or d weight, whichever is worse."""
    batch = _hidden(case)
    truth = batch.truth(SOFT, kept=torch.float64)
    x = batch.operands()

    def worse(d_hidden: Tensor, d_weight: Tensor) -> float:
        return max(check.error(d_hidden, truth.hidden), check.error(d_weight, truth.weight))

    found = {}
    for name, loss in _hidden_losses(case.dtype).items():
        x.hidden.grad = x.weight.grad = None
        rivals.differentiated(loss, x)
        assert x.hidden.grad is not None
        assert x.weight.grad is not None
        found[name] = worse(x.hidden.grad, x.weight.grad)
    return found | {ROUNDED_TRUTH: worse(truth.hidden.to(case.dtype), truth.weight.to(case.dtype))}


# One set of losses serves all families: compiling takes most of the time. Before the next set what is compiled is
# forgotten, or torch.compile would give up recompiling the same code and run it as it is.


@functools.lru_cache(maxsize=1)
def _logit_losses(divergence: str, dtype: torch.dtype) -> dict[str, Loss]:
    torch._dynamo.reset()
    row = resolve(divergence)
    ours = fastkd.KDLoss(TEMPERATURE, divergence=row, soft_weight=SOFT.soft, hard_weight=SOFT.hard)
    losses: dict[str, Loss] = {FRESH: ours, "eager": rivals.kd_loss(row, TEMPERATURE, SOFT)}
    if dtype != torch.float32:
        losses["eager fp32"] = rivals.kd_loss_fp32(row, TEMPERATURE, SOFT)
    if rivals.can_compile():
        recipes = {name.replace("eager", "compile"): loss for name, loss in losses.items() if name != FRESH}
        losses |= {name: rivals.compiled(loss) for name, loss in recipes.items()}
    return losses


@functools.lru_cache(maxsize=1)
def _hidden_losses(dtype: torch.dtype) -> dict[str, HiddenLoss]:
    torch._dynamo.reset()
    names = (FRESH, "eager", CHUNKED, "compile", LIGER, TRL, LINEAR_CE)
    losses = ((name, hidden_loss(name, SOFT)) for name in names)
    return {name: loss for name, loss in losses if loss is not None}
