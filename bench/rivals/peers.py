"""Peers: what other projects offer for these losses from hidden states, where it is installed, and as it comes.

Each is given the same objective and keeps its own defaults, but for one that would take half a minute. What a user
would have to add is part of the contender: T², which none of them multiplies by, and the teacher's probabilities where
a loss asks for those.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.check import BOTH, HARD, SOFT, Objective
from bench.rivals import recipes
from bench.rivals.recipes import HiddenLoss, Operands, can_compile

__all__ = ["PEERS", "RIVALS", "Peer", "raced"]


def _exported(module: str, name: str) -> Any:
    """None where the peer is not installed or of a version without it."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _liger(objective: Objective, temperature: float) -> HiddenLoss | None:
    """`torch.compile` over chunks of 1024 tokens."""
    found = _exported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    if found is None or not can_compile():
        return None
    soft = objective.soft * temperature**2
    loss = found(weight_hard_loss=objective.hard, weight_soft_loss=soft, beta=0.0, temperature=temperature)
    return lambda x: loss(*x)


def _liger_triton(objective: Objective, temperature: float) -> HiddenLoss | None:
    found = _exported("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
    if found is None or not torch.cuda.is_available():
        return None
    mean = found(jsd_beta=0.0, temperature=temperature)
    return lambda x: objective.soft * temperature**2 * mean(x.hidden, x.weight, x.above, x.head, None)


def _trl(objective: Objective, temperature: float) -> HiddenLoss | None:
    found = _exported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    if found is None:
        return None

    def loss(x: Operands) -> Tensor:
        per_token, _entropy = found.apply(x.hidden, x.weight, None, x.above, x.head, None, 0.0, temperature)
        return objective.soft * temperature**2 * per_token.mean()

    return loss


def _linear_ce(objective: Objective, temperature: float) -> HiddenLoss | None:
    found = _exported("torch.nn.functional", "linear_cross_entropy")
    if found is None:
        return None
    return _from_cross_entropy(found, objective, temperature)


def _linear_ce_chunked(objective: Objective, temperature: float) -> HiddenLoss | None:
    """torch 2.13 takes class indices alone: given probabilities, it warns and forms all logits. 2.14 takes both.

    On CPUs its default is chunks of a few rows, each of which adds to the whole gradient of the weight: 15 times slower
    than these at 1024 rows and a vocabulary of 50257.
    """
    found = _exported("torch.nn.functional", "linear_cross_entropy")
    options = _exported("torch.nn", "LinearCrossEntropyOptions")
    if found is None or options is None:
        return None

    def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Probabilities have to be of the operands' dtype."""
        target = target.to(hidden.dtype) if target.is_floating_point() else target
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="linear_cross_entropy")  # its other path must not pass for it
            chunks = options() if hidden.is_cuda else options(batch_chunk_size=256)
            loss: Tensor = found(hidden, weight, target, options=chunks)
            return loss

    if objective.soft and not _takes_probabilities(chunked):
        return None
    return _from_cross_entropy(chunked, objective, temperature)


#: `(hidden [N, H], weight [V, H], labels [N] or probabilities [N, V])` → mean over rows
_CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


def _takes_probabilities(chunked: _CrossEntropy) -> bool:
    """Found out by asking: it warns where it does not, which is an error here."""
    try:
        chunked(torch.zeros(2, 1), torch.zeros(3, 1), torch.full((2, 3), 1 / 3))
    except UserWarning:
        return False
    return True


def _from_cross_entropy(cross_entropy: _CrossEntropy, objective: Objective, temperature: float) -> HiddenLoss:
    """Forward KL is the cross-entropy against the teacher's probabilities minus their entropy."""

    def soft(x: Operands) -> Tensor:
        assert x.above is not None
        assert x.head is not None
        p = torch.softmax(x.above @ x.head.T / temperature, -1, dtype=torch.float32)
        entropy = torch.special.entr(p).sum(-1).mean()
        return objective.soft * temperature**2 * (cross_entropy(x.hidden / temperature, x.weight, p) - entropy)

    return soft if objective.soft else lambda x: objective.hard * cross_entropy(x.hidden, x.weight, x.labels)


def _cut_ce(objective: Objective, temperature: float) -> HiddenLoss | None:
    found = _exported("cut_cross_entropy", "linear_cross_entropy")
    if found is None or not (torch.cuda.is_available() or can_compile()):
        return None

    def loss(x: Operands) -> Tensor:
        mean = found(x.hidden, x.weight, x.labels, impl="cce" if x.hidden.is_cuda else "torch_compile")
        return objective.hard * mean

    return loss


def _quack(objective: Objective, temperature: float) -> HiddenLoss | None:
    """Without its search for the fastest products, which takes longer than the race."""
    found = _exported("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    if found is None or not torch.cuda.is_available():
        return None
    return lambda x: objective.hard * found(x.hidden, x.weight, x.labels, tuned=False)


class Peer(NamedTuple):
    """A row of the table below."""

    loss: Callable[[Objective, float], HiddenLoss | None]  # of a temperature; None where it cannot run here
    objectives: tuple[Objective, ...]  # in whose races it takes part
    compiles: bool = False  # inside


#: What each is called in results. `bench_projections`, `bench_accuracy` and `bench_memory` race whatever is here.
PEERS = {
    "liger": Peer(_liger, (BOTH,), compiles=True),
    "liger triton": Peer(_liger_triton, (SOFT,)),
    "trl": Peer(_trl, (SOFT,)),
    "linear_cross_entropy": Peer(_linear_ce, (SOFT, HARD)),  # torch's own, since 2.13
    "linear_cross_entropy chunked": Peer(_linear_ce_chunked, (SOFT, HARD)),
    "cut-cross-entropy": Peer(_cut_ce, (HARD,), compiles=True),
    "quack": Peer(_quack, (HARD,)),
}
#: What a user would take instead of fastkd; other contenders are fastkd itself, floors and yardsticks.
RIVALS = (*recipes.NAMES, *PEERS)


def raced(objective: Objective) -> tuple[str, ...]:
    """The peers in the race for an objective."""
    return tuple(name for name, peer in PEERS.items() if objective in peer.objectives)
