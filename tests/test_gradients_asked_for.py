"""A gradient that is asked for and not given is never silent: of a teacher, of weights, in forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastkd
from fastkd.backend import warn_once
from fastkd.sources import Teacher
from tests import cases

N, V, H = 4, 11, 3
LABELS = cases.labels(N, V)


def leaf(*shape: int) -> Tensor:
    return torch.rand(*shape, requires_grad=True)


def sparse(**which: bool) -> Teacher:
    logprobs = torch.full((N, 2), -2.0).requires_grad_(which.get("logprobs", False))
    rest = torch.full((N,), -0.3157).requires_grad_(which.get("rest", False))
    return fastkd.SparseTargets(torch.arange(2).expand(N, 2), logprobs, "ghost", 2.0, rest=rest)


@pytest.fixture
def warned() -> None:
    warn_once.cache_clear()


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: leaf(N, V),
        lambda: leaf(N, V) * 1,
        lambda: fastkd.Projection(leaf(N, H), torch.randn(V, H)),
        lambda: sparse(logprobs=True),
        lambda: sparse(rest=True),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_that_requires_a_gradient_is_warned_of_once(
    teacher: Callable[[], Teacher], reduction: Any, warned: None
) -> None:
    kd = fastkd.KDLoss(2.0, reduction=reduction)
    with pytest.warns(RuntimeWarning, match=r"teacher requires a gradient.*torch\.no_grad\(\)"):
        kd(leaf(N, V), teacher(), LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd(leaf(N, V), teacher(), LABELS)


def test_nothing_is_warned_of_where_nothing_is_asked(warned: None) -> None:
    head = nn.Linear(H, V)  # not frozen, as a model that was only run under no_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in (torch.randn(N, V), fastkd.Projection(torch.randn(N, H), head.weight, head.bias), sparse()):
            fastkd.kd_loss(fastkd.Projection(leaf(N, H), head.weight, head.bias), teacher, LABELS)
        with torch.no_grad():
            fastkd.kd_loss(leaf(N, V), leaf(N, V), LABELS, weights=leaf(N))


@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"inplace": True}], ids=str)
def test_weights_that_require_a_gradient_are_refused(settings: dict[str, Any]) -> None:
    student = leaf(N, V) * 1
    kd = fastkd.KDLoss(2.0, **settings)
    with pytest.raises(ValueError, match=r"weights requires a gradient.*weights\.detach\(\)"):
        kd(student, torch.randn(N, V), LABELS, weights=leaf(N))
    if not settings:
        with pytest.raises(ValueError, match=r"num_items requires a gradient.*num_items\.detach\(\)"):
            kd(student, torch.randn(N, V), LABELS, num_items=leaf(1))


TEACHER = torch.randn(N, V, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(2))

#: What may carry a tangent, its shape, and where it goes.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "scalar": (lambda x: fastkd.kd_loss(x, TEACHER, LABELS), (N, V)),
    "none": (lambda x: fastkd.kd_loss(x, TEACHER, LABELS, reduction="none"), (N, V)),
    "in place": (lambda x: fastkd.kd_loss(x, TEACHER, LABELS, inplace=True), (N, V)),
    "hidden": (lambda x: fastkd.kd_loss(fastkd.Projection(x, WEIGHT), TEACHER, LABELS), (N, H)),
    "weight": (lambda x: fastkd.kd_loss(fastkd.Projection(WEIGHT[:N], x), TEACHER, LABELS), (V, H)),
    "hidden, none": (
        lambda x: fastkd.kd_loss(fastkd.Projection(x, WEIGHT), TEACHER, LABELS, reduction="none"),
        (N, H),
    ),
    "teacher": (lambda x: fastkd.kd_loss(TEACHER, x, LABELS), (N, V)),
    "weights": (lambda x: fastkd.kd_loss(TEACHER, TEACHER + 1, LABELS, weights=x), (N,)),
    "log-softmax": (lambda x: fastkd.log_softmax(x), (N, V)),
    "statistics": (lambda x: fastkd.row_statistics(x).log_sum_exp, (N, V)),
    "statistics of hidden states": (lambda x: fastkd.row_statistics(fastkd.Projection(x, WEIGHT)).entropy, (N, H)),
}


def of_dual_numbers(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, torch.ones_like(x)))


WAYS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda call, x: torch.func.jacfwd(call)(x),
    "dual numbers": of_dual_numbers,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_is_refused(function: str, way: str, backend: str) -> None:
    call, shape = FUNCTIONS[function]
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivatives.*use reverse mode"):
        WAYS[way](call, torch.rand(shape))


def test_other_tensors_of_a_forward_mode_go_on(backend: str) -> None:
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(2), torch.ones(2))
        student = leaf(N, V)
        fastkd.kd_loss(student, TEACHER, LABELS).backward()  # type: ignore[union-attr]
    assert student.grad is not None
    assert student.grad.abs().max() > 0
