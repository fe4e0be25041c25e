"""What a user writes without fastkd, in torch operations: the recipes fastkd is compared with, and floors.

The recipes are the quick ones among those in use: a mixture is formed in probability space (stacking and
logsumexp, as some trainers do, is slower), and `F.kl_div(..., log_target=True)` is used where it fits.
Ordinary autograd code.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import check, machine
from bench.harness.check import BOTH, Batch, Objective
from fastkd.divergences import Divergence

__all__ = [
    "CHUNKED",
    "COMPILED",
    "EAGER_STEP",
    "NAMES",
    "RECIPES",
    "HiddenLoss",
    "Loss",
    "Operands",
    "can_compile",
    "chunked",
    "compiled",
    "differentiated",
    "from_hidden",
    "ghost_kd_loss",
    "kd_loss",
    "kd_loss_fp32",
    "limit",
    "log_softmax",
    "recipe_is_right",
    "row_statistics",
]

CHUNKED, EAGER_STEP = "chunked", "eager step"
#: What the recipes are called in results. "compile" is torch.compile of the eager one.
NAMES = ("eager", "eager fp32", "compile", "compile fp32", "torch", CHUNKED, EAGER_STEP)
COMPILED = ("compile", "compile fp32")

#: `(student [N, V], teacher [N, V] or None, labels [N])` → mean over rows
Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
HiddenLoss = Callable[["Operands"], Tensor]  # → mean over rows
#: `(student [N, V], the teacher's ids and log-probabilities [N, K], log mass of the others [N], labels [N])` → mean
SparseLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)  # _kl(log q, log p) = KL(p ‖ q)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_q, log_p)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_p, log_q)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * _kl(log_m, log_p) + (1 - beta) * _kl(log_m, log_q)


def _skew_kl(log_p: Tensor, log_q: Tensor, lam: float) -> Tensor:
    return _kl((lam * log_p.exp() + (1 - lam) * log_q.exp()).log(), log_p)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, lam: float) -> Tensor:
    return _kl(((1 - lam) * log_p.exp() + lam * log_q.exp()).log(), log_q)


def _symmetric_kl(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    return weight * _kl(log_q, log_p) + (1 - weight) * _kl(log_p, log_q)


def _tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()


def _squared_hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 1 - (0.5 * (log_p + log_q)).exp().sum(-1).mean()


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    total = alpha + beta
    terms = (
        (alpha * log_p + beta * log_q).exp()
        - alpha / total * (total * log_p).exp()
        - beta / total * (total * log_q).exp()
    )
    return -terms.sum(-1).mean() / (alpha * beta)


#: `(log p, log q, *parameters)` → mean over rows, for every divergence of the table that has a softmax.
RECIPES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "symmetric_kl": _symmetric_kl,
    "tvd": _tvd,
    "squared_hellinger": _squared_hellinger,
    "alpha_beta": _alpha_beta,
}


def kd_loss(divergence: Divergence, temperature: float, objective: Objective = BOTH) -> Loss:
    """The objective in the logits' dtype; a term without weight, and then the teacher, is left out."""

    def loss(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        total = student.new_zeros(())
        if objective.hard:
            total = total + objective.hard * F.cross_entropy(student, labels)
        if objective.soft and teacher is not None:
            total = total + objective.soft * soft(student, teacher)
        return total

    def soft(student: Tensor, teacher: Tensor) -> Tensor:
        if not divergence.tempered:  # mse: raw logits
            return F.mse_loss(student, teacher)
        log_q = F.log_softmax(student / temperature, -1)
        log_p = F.log_softmax(teacher / temperature, -1)
        if divergence.name in RECIPES:
            return temperature**2 * RECIPES[divergence.name](log_p, log_q, *divergence.parameters)
        rows = [weight * RECIPES[part.name](log_p, log_q, *part.parameters) for part, weight in divergence.parts]
        return temperature**2 * torch.stack(rows).sum()

    return loss


def kd_loss_fp32(divergence: Divergence, temperature: float, objective: Objective = BOTH) -> Loss:
    """The same with low-precision logits widened first: slower, and right."""
    loss = kd_loss(divergence, temperature, objective)
    return lambda student, teacher, labels: loss(student.float(), None if teacher is None else teacher.float(), labels)


def ghost_kd_loss(temperature: float) -> SparseLoss:
    """½·T²·KL on the teacher's K tokens and one for all others, + ½·cross-entropy: gathers and a log-sum-exp.

    The student's mass of the other tokens is 1 minus that of the K, as is usual, and at least 1e-7.
    """

    def loss(student: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor, labels: Tensor) -> Tensor:
        scaled = student.float() / temperature
        log_q = scaled.gather(-1, ids) - torch.logsumexp(scaled, -1, keepdim=True)
        rest_q = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-7))
        soft = (logprobs.exp() * (logprobs - log_q)).sum(-1) + rest.exp() * (rest - rest_q)
        return 0.5 * temperature**2 * soft.mean() + 0.5 * F.cross_entropy(student.float(), labels)

    return loss


class Operands(NamedTuple):
    """Hidden states and output heads; `above` and `head` are the teacher's, where there is one."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    above: Tensor | None  # [N, H of the teacher]
    head: Tensor | None  # [V, H of the teacher]
    labels: Tensor  # [N]


def differentiated(loss: HiddenLoss, x: Operands) -> Tensor:
    """The loss; its gradients are those of `x` then. Some losses leave them there themselves."""
    value = loss(x)
    if value.requires_grad:
        value.backward()
    return value


def from_hidden(loss: Loss) -> HiddenLoss:
    """Both logits as a whole, then the loss."""

    def projected(x: Operands) -> Tensor:
        teacher = None if x.above is None or x.head is None else x.above @ x.head.T
        return loss(x.hidden @ x.weight.T, teacher, x.labels)

    return projected


def chunked(loss: Loss, tokens: int = 128) -> HiddenLoss:
    """A loop over tokens that keeps the logits of one chunk at a time; sets the gradients itself, needs no backward."""
    projected = from_hidden(loss)

    def loop(x: Operands) -> Tensor:
        total = torch.zeros(())
        d_hidden, d_weight = torch.empty_like(x.hidden), torch.zeros_like(x.weight)
        for start in range(0, len(x.hidden), tokens):
            rows = slice(start, start + tokens)
            chunk = x.hidden[rows].detach().requires_grad_()
            above = None if x.above is None else x.above[rows]
            mean = projected(Operands(chunk, x.weight, above, x.head, x.labels[rows]))
            share = mean * (len(chunk) / len(x.hidden))
            d_hidden[rows], part = torch.autograd.grad(share, (chunk, x.weight))
            d_weight += part
            total += share.detach()
        x.hidden.grad, x.weight.grad = d_hidden, d_weight
        return total

    return loop


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def row_statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-sum-exp, entropy, arg-max and label log-probability of each row, in fp32."""
    scaled = logits.float() / temperature
    log_sum_exp = torch.logsumexp(scaled, -1)
    log_q = scaled - log_sum_exp[:, None]
    entropy = -(log_q.exp() * log_q).sum(-1)
    return log_sum_exp, entropy, logits.argmax(-1), log_q.gather(-1, labels[:, None])[:, 0]


def can_compile() -> bool:
    """Whether torch.compile finds the C++ compiler it needs on CPUs; on GPUs it needs none."""
    return machine.DEVICE.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly the shapes it meets: no rival should pay for dynamic ones."""
    return torch.compile(function, dynamic=False)


@functools.cache
def recipe_is_right(divergence: Divergence, temperature: float) -> None:
    """AssertionError unless the recipe of a divergence and its gradient equal the reference, both in float64."""
    small = Batch.random(32, 997, torch.float64)
    truth = check.kd_truth(small, divergence, temperature)
    loss = kd_loss(divergence, temperature)(small.student, small.teacher, small.labels)
    loss.backward()
    assert small.student.grad is not None
    off = check.error(small.student.grad, truth.gradient)
    assert off < 1e-6, f"the eager recipe of {divergence} has a wrong gradient: relative error {off:.1e}"
    assert abs(loss.item() - truth.loss) < 1e-9 * abs(truth.loss), f"the eager recipe of {divergence} has a wrong value"


def limit(name: str, low: bool) -> float:
    """Of a contender's relative error; `low`: its inputs are of low precision, in which eager computes."""
    if not low:
        return check.FP32
    return check.ARITHMETIC_BF16 if name == "eager" else check.ROUNDED
