"""What is raced on a GPU: cases of the questions that `bench_*.py` ask everywhere, at the sizes of a GPU, with bars.

Bars are ratios, which hold on any GPU: a loss on logits moves what `torch.add` moves, so the copy speed that it reaches
is add's time ÷ its own. A bar of a contender that did not run is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.bench_logits import DIVERGENCES, LOGITS
from bench.bench_memory import MEMORY, ONE_GRADIENT, PROJECTION_MEMORY, predicted
from bench.bench_projections import PROJECTIONS, PROJECTIONS_HARD, PROJECTIONS_SOFT
from bench.gpu import walks
from bench.harness.check import BOTH, HARD, SOFT, Objective
from bench.harness.contender import FRESH, IN_PLACE
from bench.harness.question import Bar, Case, Question, faster, within
from bench.rivals import peers, recipes
from bench.rivals.hidden import PRODUCTS
from fastkd.divergences import TABLE

__all__ = ["ADD", "FORWARD_KL", "HIDDEN", "HIDDEN_MEMORY", "LOGITS_MEMORY", "OBJECTIVES", "Turn", "logits", "turns"]

ADD, FORWARD_KL = "add out=", "fastkd forward_kl"
_COPY_SPEED = 0.87  # the share of it that a loss on logits is to reach
_WALKS = tuple(name for name in walks.available() if name != walks.DEFAULT)

_BF16, _FP32 = torch.bfloat16, torch.float32


def _near_copy(*names: str) -> tuple[Bar, ...]:
    return tuple(within(name, ADD, 1 / _COPY_SPEED) for name in names)


def _every_walk(bars: tuple[Bar, ...]) -> tuple[Bar, ...]:
    """The same bar of fastkd for every walk."""
    other = (replace(bar, ours=f"{bar.ours} {walk}") for walk in _WALKS for bar in bars)
    return (*bars, *other)


_CASES = (
    Case(
        LOGITS,
        8192,
        128256,
        _BF16,
        (
            *_every_walk(_near_copy(FRESH)),
            within(IN_PLACE, ADD),
            faster(FRESH, "eager"),
            faster(FRESH, "eager fp32"),
            faster(FRESH, "compile fp32"),
        ),
    ),
    Case(LOGITS, 8192, 50257, _BF16, (*_every_walk(_near_copy(FRESH)), faster(FRESH, "eager fp32"))),
    # Rows that are fewer than multiprocessors: today's kernel takes one of them for each row.
    Case(LOGITS, 64, 128256, _BF16, (within(FRESH, ADD), *(faster(f"{FRESH} {walk}", FRESH, 2.5) for walk in _WALKS))),
    Case(LOGITS, 4096, 128256, _FP32, (*_every_walk(_near_copy(FRESH)), faster(FRESH, "eager"))),
    Case(LOGITS, 4096, 151936, _BF16, _every_walk(_near_copy(FRESH))),
    Case(LOGITS, 8192, 32000, _BF16, _every_walk(_near_copy(FRESH))),
)
#: How many times forward KL's time; those without a limit are only reported.
_OVER_FORWARD_KL = {"jsd": 1.4}
_DIVERGENCES = tuple(
    Case(
        DIVERGENCES,
        8192,
        128256,
        _BF16,
        (
            within(FRESH, FORWARD_KL, _OVER_FORWARD_KL.get(name)),
            *(within(f"{FRESH} {walk}", f"{FORWARD_KL} {walk}", _OVER_FORWARD_KL.get(name)) for walk in _WALKS),
            within(FRESH, ADD),
        ),
        name,
    )
    for name in TABLE
    if name != "forward_kl"
)
_DECISIVE = 3  # of the cases of forward KL


def logits() -> tuple[Case, ...]:
    """Losses on logits. With another walk than the default one, those alone that decide which walk stays."""
    limited = [case for case in _DIVERGENCES if case.divergence in _OVER_FORWARD_KL]
    others = [case for case in _DIVERGENCES if case not in limited]
    decisive, rest = (*_CASES[:_DECISIVE], *limited), (*_CASES[_DECISIVE:], *others)
    if walks.here() == walks.DEFAULT:
        return *decisive, LOGITS_MEMORY, *rest
    return tuple(
        replace(case, bars=tuple(bar for bar in case.bars if bar.other not in peers.RIVALS)) for case in decisive
    )


OBJECTIVES: dict[Question, Objective] = {PROJECTIONS: BOTH, PROJECTIONS_SOFT: SOFT, PROJECTIONS_HARD: HARD}
_LARGE = (8192, 128256, _BF16)


def _against_peers(question: Question) -> tuple[Bar, ...]:
    """Liger's and TRL's losses are to be beaten by half; of others it is only told."""
    return tuple(
        faster(FRESH, name, 1.5 if name.startswith(("liger", "trl")) else None)
        for name in peers.raced(OBJECTIVES[question])
    )


_OVER_PRODUCTS = within(FRESH, PRODUCTS, 1.2)
HIDDEN = (
    Case(
        PROJECTIONS,
        *_LARGE,
        (_OVER_PRODUCTS, faster(FRESH, "eager"), faster(FRESH, "compile"), *_against_peers(PROJECTIONS)),
        hidden=(4096, 4096),
    ),
    Case(PROJECTIONS_SOFT, *_LARGE, (_OVER_PRODUCTS, *_against_peers(PROJECTIONS_SOFT)), hidden=(4096, 4096)),
    Case(PROJECTIONS_HARD, *_LARGE, (within(FRESH, PRODUCTS), *_against_peers(PROJECTIONS_HARD)), hidden=(4096,)),
    Case(PROJECTIONS, 8192, 50257, _BF16, (_OVER_PRODUCTS, faster(FRESH, "eager")), hidden=(768, 1024)),
    Case(PROJECTIONS, 2048, 128256, _FP32, (within(FRESH, PRODUCTS), faster(FRESH, "eager")), hidden=(2048, 4096)),
)
LOGITS_MEMORY = Case(
    MEMORY, *_LARGE, (within(FRESH, ONE_GRADIENT, 1.02), within(IN_PLACE, None), within("eager fp32", ONE_GRADIENT))
)
HIDDEN_MEMORY = Case(
    PROJECTION_MEMORY,
    *_LARGE,
    (
        Bar(FRESH, predicted(FRESH), at_least=0.95, at_most=1.05),
        within("eager", "gradients"),
        *(within(name, "gradients") for name in peers.raced(BOTH)),
    ),
    hidden=(4096, 4096),
)


# --- turns ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A race of a case, without those that compile themselves or with them.

    Compiling may take all the time there is. So it comes when all cases have been raced without.
    """

    case: Case
    compiling: bool

    def __str__(self) -> str:
        return f"{self.case.question.name}, {self.case}" + (", with what compiles" if self.compiling else "")


def turns(cases: Sequence[Case]) -> list[Turn]:
    compile = [case for case in cases if any(_compiles(bar.other) for bar in case.bars)]
    return [*(Turn(case, False) for case in cases), *(Turn(case, True) for case in compile)]


def _compiles(contender: str | None) -> bool:
    if contender in peers.PEERS:
        return peers.PEERS[contender].compiles
    return contender in recipes.COMPILED
