"""Races show as bits that differ: the same call many times, alone and beside other work, must give the same bits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.gpu.check_hidden import Sizes, budgets
from bench.gpu.device import Device
from bench.gpu.visit import Visit
from fastkd.divergences import TABLE
from tests import cases
from tests.sparse_targets import kept

_TIMES, _TIMES_DRY = 100, 3
_ROWS = 300  # more than multiprocessors, and no multiple of their number
_SIZES, _SIZES_DRY = Sizes(512, 50257, 256, 256), Sizes(128, 523, 16, 16)

Step = Callable[[], tuple[Tensor, ...]]


def _from_logits(device: Device, rows: int, vocab: int, dtype: torch.dtype, **settings: Any) -> Step:
    """Loss and gradient, of a fresh copy each time, since some settings overwrite it."""
    student, teacher = (device.normal(rows, vocab, dtype=dtype, scale=3) for _ in range(2))
    labels, kd = device.labels(rows, vocab), fastkd.KDLoss(2.0, **settings)
    labels[::7] = -100

    def step() -> tuple[Tensor, ...]:
        leaf = student.clone().requires_grad_()
        loss = kd(leaf, teacher, labels)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaf)

    return step


def _from_hidden(device: Device, sizes: Sizes, way: str) -> Step:
    dtype = torch.bfloat16
    student, teacher = (
        [device.normal(sizes.rows, width, dtype=dtype), device.normal(sizes.vocab, width, dtype=dtype, scale=0.2)]
        for width in (sizes.student, sizes.teacher)
    )
    leaves, labels = [x.requires_grad_() for x in student], device.labels(sizes.rows, sizes.vocab)
    budget = budgets(sizes, dtype, device.kind, TABLE["jsd"]())[way]

    def step() -> tuple[Tensor, ...]:
        sources = fastkd.Projection(*leaves), fastkd.Projection(*teacher)
        loss = fastkd.kd_loss(*sources, labels, divergence="jsd", memory_budget=budget)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def _sparse(device: Device, vocab: int) -> Step:
    student, teacher = cases.logits("far", 16, vocab, torch.bfloat16)
    leaf, targets = student.to(device.kind).requires_grad_(), kept(teacher, 16).to(device.kind)

    def step() -> tuple[Tensor, ...]:
        loss = fastkd.kd_loss(leaf, targets, hard_weight=0.0)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return step


def _statistics(device: Device, rows: int, vocab: int) -> Step:
    logits, labels = device.normal(rows, vocab, dtype=torch.bfloat16, scale=3), device.labels(rows, vocab)
    return lambda: (*fastkd.row_statistics(logits, labels), fastkd.log_softmax(logits, 2.0))


def _makers(device: Device) -> dict[str, Callable[[], Step]]:
    """Name → what makes a step, when its turn comes."""
    rows, vocabularies = (5, (1003,)) if device.dry else (_ROWS, (50257, 128256, 4100))
    sizes = _SIZES_DRY if device.dry else _SIZES
    changes: tuple[dict[str, Any], ...] = (
        *({"divergence": name} for name in TABLE),
        {"inplace": True},
        {"reduction": "none"},
    )
    found: dict[str, Callable[[], Step]] = {
        f"hidden, {way}": partial(_from_hidden, device, sizes, way) for way in ("default", "several chunks", "tiles")
    }
    for vocab in vocabularies:
        for dtype, settings in itertools.product((torch.bfloat16, torch.float32), changes):
            name = f"{settings} {rows}x{vocab} {str(dtype)[6:]}"
            found[name] = partial(_from_logits, device, rows, vocab, dtype, **settings)
        found[f"few rows, {vocab}"] = partial(_from_logits, device, 3, vocab, torch.bfloat16)
        found[f"sparse, {vocab}"] = partial(_sparse, device, vocab)
        found[f"statistics, {vocab}"] = partial(_statistics, device, rows, vocab)
    return found


def judge(device: Device, step: Step, times: int) -> None:
    """Bits are compared on the device, so that nothing is waited for between the calls."""
    expected = step()
    assert expected[-1].abs().max() > 0, "there is nothing to compare"
    for place in (contextlib.nullcontext(), device.disturbed()):
        differing = torch.zeros((), dtype=torch.int64, device=device.kind)
        with place:
            for _ in range(times):
                for before, now in zip(expected, step(), strict=True):
                    differing += (before != now).sum()
        assert not differing, f"{differing.item()} of {times} × {sum(x.numel() for x in expected)} numbers differ"


def run(visit: Visit) -> None:
    makers = _makers(visit.device)
    for name in visit.mine(list(makers)):
        with visit.check(f"same bits: {name}"):
            judge(visit.device, makers[name](), _TIMES_DRY if visit.small else _TIMES)
