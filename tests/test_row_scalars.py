"""The scales of rows and their weighted total: each backend against a loop over tokens in Python's float64."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.kernels import cpu
from fastkd.rows import row_count

IGNORED = -100


def _backends() -> list[Any]:
    try:
        from fastkd.kernels import gpu
        from tests.triton_interpreter import interpreted
    except ImportError as error:
        skipped = pytest.mark.skip(reason=str(error))
        return [(cpu, contextlib.nullcontext), (reference, contextlib.nullcontext), pytest.param(None, marks=skipped)]
    return [(cpu, contextlib.nullcontext), (reference, contextlib.nullcontext), (gpu, interpreted)]


@pytest.fixture(params=_backends(), ids=["cpu", "reference", "triton"])
def offered(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function of a backend by its name."""
    module, context = request.param

    def call(name: str, *arguments: Any) -> Any:
        with context():
            return getattr(module, name)(*arguments)

    return call


def truth(
    shape: tuple[int, ...],
    labels: Tensor | None,
    weights: Tensor | None,
    divisor: float | Tensor | None,
    shift: bool,
    mask_soft: bool,
) -> tuple[list[list[float]], list[int]]:
    """The scales and the labels, token by token."""
    length, rows = shape[-1] if shape else 1, math.prod(shape)
    ids = None if labels is None else labels.flatten().tolist()
    given = [1.0] * rows if weights is None else weights.double().flatten().tolist()
    every, moved = [], []
    for row in range(rows):
        last = shift and row % length == length - 1
        source = row + 1 if shift else row
        every.append(0.0 if last else given[source])
        moved.append(IGNORED if last or ids is None else ids[source])
    masked = [0.0 if ids is not None and label == IGNORED else scale for scale, label in zip(every, moved, strict=True)]
    scales = []
    for scale in [masked] if mask_soft or ids is None else [every, masked]:
        by = sum(scale) if divisor is None else float(divisor)
        scales.append([x / by if by else 0.0 for x in scale])
    return scales, moved


DIVISORS = [None, 1.0, 3, 0, torch.tensor(7), torch.tensor([2.5], dtype=torch.float64), torch.tensor(0.0)]
SHAPES: list[tuple[int, ...]] = [(7,), (3, 5), (2, 3, 4), (4, 1), (0, 5), (3, 0), (5000,), (2, 4100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("mask_soft", [False, True])
def test_scales_are_those_of_a_loop_over_tokens(
    shape: tuple[int, ...], shift: bool, mask_soft: bool, offered: Callable[..., Any]
) -> None:
    student = torch.empty(*shape, 6, dtype=torch.bfloat16)
    labels = torch.randint(6, shape)
    labels[torch.rand(shape) < 0.4] = IGNORED
    kinds = [None, torch.rand(shape), torch.randint(3, shape), (torch.rand(shape) < 0.5), torch.rand(shape).double()]
    divisors = DIVISORS
    if row_count(student) > 1000:  # the sum is what can go wrong
        kinds, divisors = kinds[:2], [None]
    for weights, divisor, ids in itertools.product(kinds, divisors, (labels, None)):
        scales, moved = offered("row_scales", student, ids, weights, divisor, IGNORED, shift, mask_soft)
        expected, expected_labels = truth(shape, ids, weights, divisor, shift, mask_soft)
        assert scales.dtype == torch.float32
        assert scales.shape == (len(expected), row_count(student))
        torch.testing.assert_close(
            scales.double(), torch.tensor(expected).double().view(scales.shape), rtol=3e-7, atol=0
        )
        assert (moved is None) == (ids is None or not shift)
        assert moved is None or moved.tolist() == expected_labels
        if divisor == 3 and not isinstance(weights, Tensor):  # rounded as a division is, not as a product
            assert set(scales.flatten().tolist()) <= {0.0, (torch.ones(1) / 3).item()}


def test_strided_labels_and_weights(offered: Callable[..., Any]) -> None:
    labels, weights = torch.arange(24).view(6, 4).T, torch.rand(1, 6).expand(4, 6)
    arguments = (None, -1, True, True)
    found = offered("row_scales", torch.empty(4, 6, 30), labels, weights, *arguments)
    expected = offered("row_scales", torch.empty(4, 6, 30), labels.contiguous(), weights.contiguous(), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[1].view(4, 6)[1].tolist() == [5, 9, 13, 17, 21, -1]


def test_with_everything_masked_all_scales_are_0(offered: Callable[..., Any]) -> None:
    for weights, labels in ((None, torch.full((4,), IGNORED)), (torch.zeros(4), None)):
        scales, _ = offered("row_scales", torch.empty(4, 9), labels, weights, None, IGNORED, False, True)
        assert scales.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("rows", [0, 1, 5, 4096, 9001])
def test_the_total_is_the_sum_of_the_terms_there_are(rows: int, offered: Callable[..., Any]) -> None:
    soft, hard, soft_scale, hard_scale = torch.rand(4, rows).unbind()
    soft_sum, hard_sum = ((x.double() * s.double()).sum() for x, s in ((soft, soft_scale), (hard, hard_scale)))
    spoiled = torch.full_like(soft, math.nan)
    for values, scales, weights, expected in (
        ((soft, hard), (soft_scale, hard_scale), (0.3, 4.0), 0.3 * soft_sum + 4 * hard_sum),
        ((soft, spoiled), (soft_scale, None), (0.3, 4.0), 0.3 * soft_sum),
        ((spoiled, hard), (soft_scale, hard_scale), (0.0, 4.0), 4 * hard_sum),
        ((spoiled, spoiled), (None, None), (0.3, 4.0), torch.zeros((), dtype=torch.float64)),
    ):
        totals = [offered("weighted_total", *values, *scales, *weights) for _ in range(2)]
        assert totals[0].shape == ()
        assert totals[0].dtype == torch.float32
        torch.testing.assert_close(totals[0].double(), expected, rtol=1e-6, atol=0)
        assert totals[0].item() == totals[1].item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_the_reference_scales_in_float64(reduction: Any) -> None:
    """What a divisor of 3 loses in fp32 is not lost."""
    student, teacher = torch.randn(2, 3, 5, 11, dtype=torch.float64).unbind()
    labels = torch.randint(11, (3, 5))
    labels[0, :2] = IGNORED
    loss = fastkd.kd_loss(student, teacher, labels, soft_weight=0.0, hard_weight=1.0, shift=True, reduction=reduction)
    assert isinstance(loss, Tensor)
    rows = torch.nn.functional.cross_entropy(student[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    expected = {"mean": rows.sum() / 11, "sum": rows.sum(), "batchmean": rows.sum() / 3, "none": rows}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
