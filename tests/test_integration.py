"""With the rest of PyTorch: torch.compile, autocast, opcheck, memory."""

from __future__ import annotations

import sys

import pytest
import torch

import fastkd
from fastkd.call import call_for
from tests import cases
from tests.memory import printed

V = 1030


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher = cases.logits("far", 6, V, dtype)
    return student.requires_grad_(), teacher, cases.labels(6, V, ignored=(1,))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "jsd", "reduction": "sum"},
        {"divergence": cases.MIXES[1]},
        {"reduction": "none"},
        {"shift": True, "return_parts": True},
        {"soft_weight": 0.0, "return_parts": True},
        {"inplace": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("style", ["module", "function"])
def test_compile_full_graph(backend: str, settings: dict[str, object], style: str) -> None:
    torch._dynamo.reset()
    student, teacher, labels = inputs()
    kd = fastkd.KDLoss(2.0, **settings)  # type: ignore[arg-type]

    def step(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = kd(s * 1.0, t, y) if style == "module" else fastkd.kd_loss(s * 1.0, t, y, **settings)
        return result.loss if isinstance(result, fastkd.KDParts) else result

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (6, 5):  # the second shape recompiles with a symbolic size
        leaves = [student.detach()[:count].clone().requires_grad_() for _ in range(2)]
        expected, actual = (
            f(x, teacher[:count], labels[:count]) for f, x in zip((step, compiled), leaves, strict=True)
        )
        expected.sum().backward()
        actual.sum().backward()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
        assert leaves[0].grad.abs().max() > 0


def test_compile_with_inductor() -> None:
    student, teacher, labels = inputs()
    weight = torch.randn(V, V) / V**0.5

    def step(s: torch.Tensor) -> torch.Tensor:
        return fastkd.kd_loss(torch.tanh(s @ weight), teacher, labels) * 2.0

    leaves = [student.detach().clone().requires_grad_() for _ in range(2)]
    expected, actual = (f(x) for f, x in zip((step, torch.compile(step, fullgraph=True)), leaves, strict=True))
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-7)


def test_autocast(backend: str) -> None:
    _, teacher, labels = inputs()
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(V, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight.T
        assert logits.dtype == torch.bfloat16
        loss = fastkd.KDLoss(2.0)(logits, teacher, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.abs().max() > 0
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("divergence", [fastkd.ForwardKL(), cases.MIXES[0]], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(backend: str, requires_grad: bool, divergence: fastkd.divergences.Divergence) -> None:
    student, teacher, labels = inputs()
    student = student.detach().requires_grad_(requires_grad)
    scale = torch.rand(6)
    spec = cases.spec(divergence, V)
    arguments = call_for(student, teacher, labels.clamp(min=0), scale, scale, spec)
    ops = torch.ops.fastkd
    torch.library.opcheck(ops.kd_loss.default, (*arguments, [requires_grad, False, False]))
    torch.library.opcheck(ops.kd_loss_per_row.default, arguments)
    torch.library.opcheck(ops.log_softmax.default, (student, 2.0))
    torch.library.opcheck(ops.row_statistics.default, (student.detach(), labels.clamp(min=0), 2.0))
    _, normaliser = ops.log_softmax(student.detach(), 2.0)
    torch.library.opcheck(ops.log_softmax_backward.default, (teacher, student.detach(), normaliser, 2.0))
    weights = torch.rand(6)
    for given, mask_soft in ((labels, True), (labels, False), (None, True)):
        for shift in (False, True):
            numbers = (None, 3.0, "mean", -100, shift, mask_soft)
            torch.library.opcheck(ops.row_scales.default, (student, given, weights, *numbers))
    if not requires_grad:
        torch.library.opcheck(ops.kd_loss_.default, arguments)
        torch.library.opcheck(ops.kd_loss.default, (*arguments, [True, False, False]))


MEMORY = """
import sys, torch, fastkd
from tests.memory import peak
N, V = 512, 50257
inplace, dtype = sys.argv[1] == "inplace", getattr(torch, sys.argv[2])
student, teacher = torch.rand(N, V).to(dtype), torch.rand(N, V).to(dtype)
labels = torch.randint(V, (N,))
kd = fastkd.KDLoss(2.0, inplace=inplace)
small = torch.rand(64, 3000, requires_grad=True)
kd(small * 1, torch.rand(64, 3000), labels[:64] % 3000).backward()  # threads and autograd are set up
print(peak(lambda: kd(student.requires_grad_(), teacher, labels).backward()), N * V * student.element_size())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inplace", ["fresh", "inplace"])
def test_peak_memory(inplace: str, dtype: str) -> None:
    """One gradient and nothing else; in place, row scalars and one row per thread. The allocator rounds to pages."""
    extra, gradient = printed(MEMORY, inplace, dtype, huge_pages=True)  # which a fresh gradient asks for
    limit = 1.02 * gradient if inplace == "fresh" else 1 << 20
    assert extra <= limit + (1 << 20), f"{extra / 2**20:.2f} MiB beside a gradient of {gradient / 2**20:.2f} MiB"
    if inplace == "fresh":
        assert extra > 0.9 * gradient  # the measurement sees the gradient
