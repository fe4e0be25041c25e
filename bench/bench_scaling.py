"""How does fastkd scale, beside the floor: with tokens, with the vocabulary, with the hidden size, with threads?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.harness import check
from bench.harness.contender import FRESH, TEMPERATURE, Contender
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals.hidden import PRODUCTS, Hidden, products, projection_contender
from bench.rivals.logits import add_floors, kd_contender
from fastkd.divergences import ForwardKL

SCALING_LOGITS = Question(
    "scaling_logits",
    Section.SCALING,
    "Forward KL (T = 2) and cross-entropy on logits, by tokens, vocabulary and threads",
    "Least traffic: read student and teacher, write the gradient: 3·N·V·b bytes.",
    passes=3,
    floor="add",
)
SCALING_HIDDEN = Question(
    "scaling_hidden",
    Section.SCALING,
    "Forward KL (T = 2) and cross-entropy from hidden states, by tokens, vocabulary and hidden size",
    "Matrix products: 2·N·V·(3·H of the student + H of the teacher) FLOPs.",
    measure="flops",
    floor=PRODUCTS,
)
_LOGITS_BARS = (faster(FRESH, "eager"), within(FRESH, "add"))
_HIDDEN_BARS = (faster(FRESH, "eager"), within(FRESH, PRODUCTS))
CASES = (
    *(
        Case(SCALING_LOGITS, rows, vocab, torch.float32, _LOGITS_BARS, threads=threads)
        for rows, vocab, threads in (
            *((rows, 50257, None) for rows in (16, 128, 1024)),
            *((256, vocab, None) for vocab in (1024, 8192, 50257, 152064)),
            (256, 50257, 1),
        )
    ),
    *(
        Case(SCALING_HIDDEN, rows, vocab, torch.float32, _HIDDEN_BARS, hidden=(size, size))
        for rows, vocab, size in (
            *((rows, 50257, 256) for rows in (64, 256)),
            *((256, vocab, 256) for vocab in (8192, 128256)),
            *((256, 50257, size) for size in (64, 512)),
        )
    ),
)
_NAMES = (FRESH, "eager")


def bench_scaling(benchmark: Benchmark, case: Case, quick: bool) -> None:
    contenders = _from_logits(case) if case.hidden is None else _from_hidden(case)
    with _threads(case.threads):
        race(benchmark, contenders, case, quick=quick)


def _from_logits(case: Case) -> list[Contender]:
    batch = check.Batch.random(case.rows, case.vocab, case.dtype)
    truth = check.kd_truth(batch, ForwardKL(), TEMPERATURE)
    contenders = [kd_contender(name, batch, ForwardKL(), truth) for name in _NAMES]
    return [*contenders, *add_floors(batch.student.detach(), batch.teacher)]


def _from_hidden(case: Case) -> list[Contender]:
    assert case.hidden is not None
    batch = Hidden.random(case.rows, case.vocab, case.hidden, case.dtype)
    truth = batch.truth()
    return [*(projection_contender(name, batch, truth) for name in _NAMES), products(batch)]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
