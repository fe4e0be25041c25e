"""Random calls of `log_softmax` and `row_statistics`, judged by their definitions in float64."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

import fastkd
from tests import cases, compare
from tests.fuzz_calls import Operands, laid_out
from tests.fuzz_formulas import log_softmax, logits_of
from tests.fuzz_random import NARROW, random_projection, vocabulary


@dataclass
class StatisticsCall:
    """`log_softmax(logits)`, where there is an upstream gradient, or `row_statistics(source, labels)`."""

    side: Operands
    labels: Tensor | None
    temperature: float
    backend: str | None
    upstream: Tensor | None

    def describe(self) -> str:
        tensors = [f"{x.dtype}{tuple(x.shape)}/{x.stride()}" for x in self.side.tensors]
        name = "row_statistics" if self.upstream is None else "log_softmax"
        labels = None if self.labels is None else self.labels.dtype
        return f"{name}({tensors}, {self.side.head}, {labels=}, {self.temperature=}, {self.backend=})"


def random_call(draw: random.Random) -> StatisticsCall:
    generator = torch.Generator().manual_seed(draw.getrandbits(60))
    leading = draw.choice(((), (1,), (5,), (2, 3), (3, 0), (2, 2, 2)))
    width, rows = vocabulary(draw), math.prod(leading)
    dtype = draw.choice((*NARROW, torch.float32, torch.float64))
    family = draw.choice(("far", "peaked", "flat", "offset" if dtype.itemsize > 2 else "far", "masked"))
    backend = draw.choice((None, "reference") if dtype == torch.float64 else (None, "cpu", "reference"))
    temperature = draw.choice((1, 2.0, 0.5, round(draw.uniform(0.3, 6), 2)))
    statistics = draw.random() < 0.5
    if statistics and draw.random() < 0.4:
        side = random_projection(draw, generator, family, (*leading, 0), width, dtype)
    else:
        values = cases.FAMILIES.get(family, cases.far)(generator, rows, width)[0]
        if family == "masked":
            values[:, torch.randperm(width, generator=generator)[: draw.randrange(width)]] = -math.inf
        side = Operands([laid_out(draw, values.to(dtype).view(*leading, width), 0.6)], {}, [not statistics])
    labels = None
    if draw.random() < 0.7:
        labels = torch.randint(-1, width + 1, leading, generator=generator)  # some outside, which read NaN
        labels = laid_out(draw, labels.to(draw.choice((torch.int64, torch.int32))), 0.3)
    upstream = None if statistics else torch.randn(side.shape, generator=generator).to(dtype)
    return StatisticsCall(side, labels, temperature, backend, upstream)


def check(call: StatisticsCall) -> None:
    """Raise AssertionError where a result is not what its definition gives."""
    leaves = [x.detach().double().contiguous().requires_grad_() for x in call.side.tensors]
    rows, width = call.side.shape[:-1].numel(), call.side.shape[-1]
    eager = call.backend == "reference" or call.side.tensors[0].dtype == torch.float64
    logits = logits_of(call.side, leaves, torch.ones(rows, dtype=torch.bool), width, eager)
    z = logits.z / call.temperature
    exact = log_softmax(z) if rows else z
    own = logits.size / call.temperature + exact.detach().abs()
    own = torch.where(own.isinf(), 0.0, own)
    unit = 4 + own + (exact.detach().exp() * own).sum(-1, keepdim=True)
    arithmetic = torch.float64 if call.side.tensors[0].dtype == torch.float64 else torch.float32
    source = [x.detach() for x in call.side.tensors]
    with fastkd.use_backend(call.backend) if call.backend else contextlib.nullcontext():
        if call.upstream is None:
            found = fastkd.row_statistics(call.side.source(source), call.labels, call.temperature)
            _check_statistics(call, found, logits.z.detach(), exact.detach(), unit, arithmetic)
            return
        leaf = source[0].requires_grad_()
        ours = fastkd.log_softmax(leaf, call.temperature)
        (gradient,) = torch.autograd.grad(ours, leaf, call.upstream)
    flat = call.upstream.double().reshape(exact.shape)
    assert ours.dtype == gradient.dtype == leaf.dtype
    compare.assert_elements(ours.reshape(exact.shape), exact.detach(), unit, arithmetic, "log_softmax")
    total, totals = flat.sum(-1, keepdim=True), flat.abs().sum(-1, keepdim=True)
    slope = (flat - exact.exp() * total) / call.temperature
    size = (flat.abs() + exact.exp() * (total.abs() * unit + totals)) / call.temperature
    compare.assert_elements(gradient.reshape(exact.shape), slope.detach(), size.detach(), arithmetic)


def _check_statistics(
    call: StatisticsCall,
    found: fastkd.RowStatistics,
    logits: Tensor,
    exact: Tensor,
    unit: Tensor,
    arithmetic: torch.dtype,
) -> None:
    leading = call.side.shape[:-1]
    assert all(x.shape == leading and not x.requires_grad for x in found)
    log_sum_exp, entropy, argmax, picked = (x.reshape(-1) for x in found)
    p = exact.exp()
    spread = torch.where(p > 0, unit, 0.0)
    average = (p * spread).sum(-1)
    total = torch.logsumexp(logits / call.temperature, -1)
    compare.assert_elements(log_sum_exp, total, average + total.abs(), arithmetic, "log_sum_exp")
    logs = torch.where(p > 0, exact, 0.0)
    size = (p * spread * (1 + logs.abs())).sum(-1)
    compare.assert_elements(entropy, -(p * logs).sum(-1), size, arithmetic, "entropy")
    assert argmax.dtype == torch.int64
    largest = logits.amax(-1)
    there = logits.gather(-1, argmax[:, None])[:, 0]
    if call.side.is_projection:
        size = largest.abs() + unit.amax(-1) * call.temperature
        compare.assert_elements(there, largest, size, torch.float32, "argmax")
    else:
        assert torch.equal(argmax, (logits == largest[:, None]).int().argmax(-1)), "argmax: the first of equal maxima"
    if call.labels is None:
        assert picked.isnan().all(), "label_logprob without labels"
        return
    labels = call.labels.reshape(-1).long()
    inside = (labels >= 0) & (labels < logits.shape[-1])
    truth = torch.where(inside, exact.gather(-1, torch.where(inside, labels, 0)[:, None])[:, 0], math.nan)
    size = unit.gather(-1, torch.where(inside, labels, 0)[:, None])[:, 0]
    compare.assert_elements(picked, truth, size, arithmetic, "label_logprob")
