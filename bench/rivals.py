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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.divergences import Divergence

__all__ = [
    "RECIPES",
    "can_compile",
    "chunked",
    "compiled",
    "from_hidden",
    "ghost_kd_loss",
    "kd_loss",
    "kd_loss_fp32",
    "log_softmax",
    "row_statistics",
]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
#: `(student hidden [N, H], student weight [V, H], teacher's two, labels [N])` → mean over rows
HiddenLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
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
    "alpha_beta": _alpha_beta,
}


def kd_loss(divergence: Divergence, temperature: float) -> Loss:
    """`(student [N, V], teacher [N, V], labels [N])` → ½·T²·divergence + ½·cross-entropy, in their dtype."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        hard = F.cross_entropy(student, labels)
        if not divergence.tempered:  # mse: raw logits
            return 0.5 * F.mse_loss(student, teacher) + 0.5 * hard
        log_q = F.log_softmax(student / temperature, -1)
        log_p = F.log_softmax(teacher / temperature, -1)
        soft = RECIPES[divergence.name](log_p, log_q, *divergence.parameters)
        return 0.5 * temperature**2 * soft + 0.5 * hard

    return loss


def kd_loss_fp32(divergence: Divergence, temperature: float) -> Loss:
    """The same with low-precision logits widened first: slower, and right."""
    loss = kd_loss(divergence, temperature)
    return lambda student, teacher, labels: loss(student.float(), teacher.float(), labels)


def ghost_kd_loss(temperature: float) -> SparseLoss:
    """½·T²·KL on the teacher's K tokens and one for all others, + ½·cross-entropy: gathers and a log-sum-exp.

    The student's mass beside the K tokens is 1 less theirs, as is usual; where a row has none left, `log1p` of −1.
    """

    def loss(student: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor, labels: Tensor) -> Tensor:
        scaled = student.float() / temperature
        log_q = scaled.gather(-1, ids) - torch.logsumexp(scaled, -1, keepdim=True)
        rest_q = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-7))
        soft = (logprobs.exp() * (logprobs - log_q)).sum(-1) + rest.exp() * (rest - rest_q)
        return 0.5 * temperature**2 * soft.mean() + 0.5 * F.cross_entropy(student.float(), labels)

    return loss


def from_hidden(loss: Loss) -> HiddenLoss:
    """Both logits as a whole, then the loss."""

    def projected(hidden: Tensor, weight: Tensor, above: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return loss(hidden @ weight.T, above @ head.T, labels)

    return projected


def chunked(loss: Loss, tokens: int = 128) -> HiddenLoss:
    """A loop over tokens that keeps the logits of one chunk at a time; sets the gradients itself, needs no backward."""
    projected = from_hidden(loss)

    def loop(hidden: Tensor, weight: Tensor, above: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros(())
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), tokens):
            rows = slice(start, start + tokens)
            chunk = hidden[rows].detach().requires_grad_()
            share = projected(chunk, weight, above[rows], head, labels[rows]) * (len(chunk) / len(hidden))
            d_hidden[rows], part = torch.autograd.grad(share, (chunk, weight))
            d_weight += part
            total += share.detach()
        hidden.grad, weight.grad = d_hidden, d_weight
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
    """Whether torch.compile finds the C++ compiler it needs on CPUs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly the shapes it meets: no rival should pay for dynamic ones."""
    return torch.compile(function, dynamic=False)
