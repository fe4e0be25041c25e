"""The operators beside what hooks into autograd: checkpoints, saved-tensor hooks, transforms, modes, exporting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkd
from tests import cases

N, V, H = 6, 30, 4
STUDENT, TEACHER = cases.logits("far", N, V)
LABELS = cases.labels(N, V, ignored=(1,))
WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(0))
MIXTURE = fastkd.Mixture([TEACHER, fastkd.Projection(TEACHER[:, :H], WEIGHT)], [0.3, 0.7])

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: fastkd.kd_loss(x * 1, TEACHER, LABELS),
    "none": lambda x: fastkd.kd_loss(x * 1, TEACHER, LABELS, reduction="none").sum(),  # type: ignore[union-attr]
    "in place": lambda x: fastkd.kd_loss(x * 1, TEACHER, LABELS, inplace=True),
    "hidden": lambda x: fastkd.kd_loss(fastkd.Projection(x[:, :H] * 1, WEIGHT), TEACHER, LABELS),
    "mixture": lambda x: fastkd.kd_loss(x * 1, MIXTURE, LABELS, reduction="none").sum(),  # type: ignore[union-attr]
    "log-softmax": lambda x: (fastkd.log_softmax(x * 1, 2.0) * TEACHER).sum(),
}  # type: ignore[dict-item]


def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = STUDENT.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return LOSSES[request.param]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(loss: Callable[[Tensor], Tensor], reentrant: bool) -> None:
    found = gradient(lambda x: checkpoint(loss, x, use_reentrant=reentrant))
    assert torch.equal(found, gradient(loss))
    assert found.abs().max() > 0


def test_hooks_of_saved_tensors(loss: Callable[[Tensor], Tensor]) -> None:
    """They see what is kept, and what they give back is used."""
    packed: list[Tensor] = []

    def keep(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    def hooked(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(keep, packed.__getitem__):
            return loss(x)

    assert torch.equal(gradient(hooked), gradient(loss))
    assert sum(tensor.numel() >= N * H for tensor in packed) >= 1


def test_a_graph_that_is_kept_and_one_that_is_not(loss: Callable[[Tensor], Tensor]) -> None:
    leaf = STUDENT.clone().requires_grad_()
    value = loss(leaf)
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(3 * value, leaf)
    torch.testing.assert_close(second, 3 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaf)


def test_no_gradient_is_made_where_none_is_wanted(loss: Callable[[Tensor], Tensor]) -> None:
    expected = loss(STUDENT.clone().requires_grad_())
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = loss(STUDENT.clone().requires_grad_())
        assert not value.requires_grad
        torch.testing.assert_close(value, expected.detach())
    assert not loss(STUDENT.clone()).requires_grad


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight = torch.randn(N, H), WEIGHT.clone().requires_grad_()
    for reduction in ("mean", "none"):
        weight.grad = None
        fastkd.kd_loss(fastkd.Projection(hidden, weight), TEACHER, LABELS, reduction=reduction).sum().backward()  # type: ignore[union-attr]
        assert hidden.grad is None
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0


def test_the_operators_refuse_transforms_of_gradients(loss: Callable[[Tensor], Tensor]) -> None:
    """As every `autograd.Function` that keeps what it computes: never a gradient of 0."""
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises((RuntimeError, NotImplementedError)):
            transform(loss)(STUDENT.clone())


@pytest.mark.parametrize("name", ["mean", "none", "mixture"])
def test_vmap_of_a_value(name: str) -> None:
    found = torch.func.vmap(LOSSES[name])(torch.stack([STUDENT, STUDENT / 2]))
    torch.testing.assert_close(found, torch.stack([LOSSES[name](STUDENT), LOSSES[name](STUDENT / 2)]))


def test_modes_see_each_operator_once() -> None:
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        fastkd.kd_loss(STUDENT.clone().requires_grad_(), TEACHER, LABELS, shift=True).backward()  # type: ignore[union-attr]
    assert [name for name in seen if "fastkd" in name] == ["fastkd.row_scales.default", "fastkd.kd_loss.default"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors(reduction: Any) -> None:
    with FakeTensorMode() as mode:
        student, teacher, labels = (mode.from_tensor(x) for x in (STUDENT, TEACHER, LABELS))
        student.requires_grad_()
        value = fastkd.kd_loss(student, teacher, labels, reduction=reduction, shift=True)
        assert isinstance(value, Tensor)
        value.sum().backward()
    assert value.shape == (() if reduction == "mean" else (N - 1,))
    assert student.grad is not None
    assert student.grad.shape == STUDENT.shape


def test_exporting() -> None:
    class Model(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            loss = fastkd.kd_loss(student, teacher, labels, shift=True)
            assert isinstance(loss, Tensor)
            return loss

    exported = torch.export.export(Model(), (STUDENT, TEACHER, LABELS))
    names = [str(node.target) for node in exported.graph.nodes if "fastkd" in str(node.target)]
    assert names == ["fastkd.row_scales.default", "fastkd.kd_loss.default"]
    torch.testing.assert_close(
        exported.module()(STUDENT, TEACHER, LABELS), fastkd.kd_loss(STUDENT, TEACHER, LABELS, shift=True)
    )
