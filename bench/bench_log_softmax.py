"""Is fastkd.log_softmax ever slower than torch's, forward and backward, with a dense upstream gradient?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from bench.harness import check
from bench.harness.contender import FRESH, TEMPERATURE, Contender
from bench.harness.question import Case, Question, Section, faster, within
from bench.harness.race import Benchmark, race
from bench.rivals import recipes
from bench.rivals.logits import add_floors

LOG_SOFTMAX = Question(
    "log_softmax",
    Section.FUNCTIONS,
    "log_softmax(z / 2), forward and backward",
    "Least traffic: read z, write the result; read z and the upstream gradient, write the gradient: 5·N·V·b bytes.",
    passes=5,
    gated=True,
)
_BARS = (faster(FRESH, "torch", 1.0), faster(FRESH, "compile"), within(FRESH, "add"))
CASES = (
    Case(LOG_SOFTMAX, 1024, 50257, torch.float32, _BARS),
    Case(LOG_SOFTMAX, 256, 50257, torch.float32, _BARS, in_quick=True),
    Case(LOG_SOFTMAX, 1024, 50257, torch.bfloat16, _BARS),
)


def bench_log_softmax(benchmark: Benchmark, case: Case, quick: bool) -> None:
    torch._dynamo.reset()
    batch = check.Batch.random(case.rows, case.vocab, case.dtype)
    logits, upstream = batch.student, batch.teacher
    truth = _truth(logits, upstream)
    functions: dict[str, Callable[[Tensor, float], Tensor]] = {
        FRESH: fastkd.log_softmax,
        "torch": recipes.log_softmax,
    }
    if recipes.can_compile():
        functions["compile"] = recipes.compiled(recipes.log_softmax)
    contenders = [_contender(name, function, logits, upstream, truth) for name, function in functions.items()]
    race(benchmark, [*contenders, *add_floors(logits.detach(), upstream)], case, quick=quick)


def _contender(
    name: str,
    function: Callable[[Tensor, float], Tensor],
    logits: Tensor,
    upstream: Tensor,
    truth: tuple[Tensor, Tensor],
) -> Contender:
    def prepare() -> None:
        logits.grad = None

    def run() -> Tensor:
        out = function(logits, TEMPERATURE)
        out.backward(upstream)
        return out

    def verify(out: object) -> float:
        assert isinstance(out, Tensor)
        assert logits.grad is not None
        limit = check.FP32 if logits.dtype == torch.float32 else check.ROUNDED
        off = max(check.error(out, truth[0]), check.error(logits.grad, truth[1]))
        assert off <= limit, f"{name}: relative error {off:.1e} > {limit:.0e}"
        return off

    return Contender(name, run, prepare, verify, compiles=name in recipes.COMPILED)


def _truth(logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient `[N, V]` in float64, written out rather than taken from torch, and kept in fp32."""
    value, gradient = torch.empty(logits.shape), torch.empty(logits.shape)
    for slab in check.slabs(*logits.shape):
        scaled, above = logits.detach()[slab].double() / TEMPERATURE, upstream[slab].double()
        log_q = scaled - torch.logsumexp(scaled, -1, keepdim=True)
        value[slab] = log_q
        gradient[slab] = (above - log_q.exp() * above.sum(-1, keepdim=True)) / TEMPERATURE
    return value, gradient
