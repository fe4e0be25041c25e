"""How fast does this machine multiply matrices? The peak that losses from hidden states are drawn against.

The shapes are those of a loss: logits, d hidden and d weight of some tokens and a vocabulary. All results are fp32, and
lie in memory touched before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import machine
from bench.harness.contender import Contender
from bench.harness.question import Case, Question, Section
from bench.harness.race import Benchmark, measure, timed
from fastkd.kernels.cpu import products as cpu
from fastkd.projection.products import operand_of, product

#: What the names of contenders begin with.
PEAKS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PRODUCTS = Question(
    "products",
    Section.HIDDEN,
    "Matrix products of N tokens, H channels and V columns, each alone",
    "Rates: 2·N·V·H FLOPs ÷ the time of one product. `fp32` is torch.mm; `bf16` is a product of bf16 operands that "
    "keeps its result in fp32, where there are units for it, whether or not fastkd chose it. More is faster.",
    measure="flops",
    unit="GFLOP/s",
)
CASES = tuple(
    Case(PRODUCTS, rows, 50257, torch.float32, (), hidden=(hidden,))
    for rows, hidden in ((256, 768), (1024, 256), (1024, 768))
)
_ROUNDS = 5
_ALIGNED = 16  # columns: rows that begin at odd places are slower, and no loss has such buffers


def rates(case: Case) -> dict[str, float]:
    """GFLOP/s of each product, in each dtype that this machine has units for. They take turns."""
    assert case.hidden is not None
    contenders = [contender for dtype in _dtypes() for contender in _contenders(case, dtype)]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        timed(contender)
    for _ in range(_ROUNDS):
        for contender in contenders:
            seconds[contender.name].append(timed(contender))
    flops = 2 * case.rows * case.vocab * case.hidden[0]
    return {name: flops / statistics.median(taken) / 1e9 for name, taken in seconds.items()}


def _dtypes() -> tuple[torch.dtype, ...]:
    """In which there is something to measure; on a CPU without units bf16 would take minutes."""
    if machine.DEVICE.type == "cpu":
        units = cpu.missing() is None
    else:
        units = operand_of(torch.bfloat16, machine.DEVICE) == torch.bfloat16
    return (torch.float32, torch.bfloat16) if units else (torch.float32,)


def _contenders(case: Case, dtype: torch.dtype) -> Iterator[Contender]:
    assert case.hidden is not None
    (hidden,), generator = case.hidden, machine.generator()
    width = -(-case.vocab // _ALIGNED) * _ALIGNED

    def made(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    states, weight, gradient = made(case.rows, hidden), made(case.vocab, hidden), made(case.rows, width)
    gradient = gradient[:, : case.vocab]
    for name, a, b in (
        ("logits", states, weight.T),
        ("d hidden", gradient, weight),
        ("d weight", gradient.T, states),
    ):
        out = torch.zeros(len(a), -(-b.shape[1] // _ALIGNED) * _ALIGNED)[:, : b.shape[1]]
        yield Contender(f"{PEAKS[dtype]} {name}", _running(a, b, out))


def _running(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        product(a, b, out)
        return out

    return run


def bench_products(benchmark: Benchmark, case: Case) -> None:
    measure(benchmark, case, lambda: rates(case))
