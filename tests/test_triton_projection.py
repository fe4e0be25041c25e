"""The loop from hidden states as it runs on a GPU, with its Triton kernel interpreted on CPU tensors, end to end.

16-bit operands whose products leave fp32 are emulated; no row is left out; the rest is the code a GPU runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.kernels import gpu
from fastkd.projection import loop
from tests import cases, compare
from tests.as_on_gpus import Silent, sixteen_bit_products
from tests.projections import FEW, TILES, H, from_projections, judge, operands, truth_and_eager
from tests.triton_interpreter import interpreted

N, V = 23, 1100


@pytest.fixture
def like_a_gpu(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, few_tokens_stand_for_many: None
) -> Iterator[torch.dtype]:
    """Products with operands of the parameter's dtype and fp32 results; the Triton backend, interpreted."""
    operand: torch.dtype = request.param

    sixteen_bit_products(monkeypatch, operand, gpu)
    with interpreted():
        yield operand


#: Every two of divergence, dtype and budget meet.
NUMERICS = [
    (divergence, dtype, (FEW, TILES)[(i + j) % 2])
    for i, divergence in enumerate(["forward_kl", "jsd", "mse"])
    for j, dtype in enumerate(cases.DTYPES)
]


@pytest.mark.parametrize(("divergence", "like_a_gpu", "budget"), NUMERICS, indirect=["like_a_gpu"], ids=str)
def test_numerics(like_a_gpu: torch.dtype, divergence: str, budget: int) -> None:
    dtype = like_a_gpu
    student, teacher = operands("far", dtype=dtype)
    labels = cases.labels(N, V, ignored=(0, 9, 22))
    ours = from_projections(student, teacher, labels, divergence=divergence, memory_budget=budget)
    truth, eager = truth_and_eager(student, teacher, labels, divergence=divergence)
    compare.assert_value(ours.loss, truth.loss, eager.loss)
    for a, b, c in zip(ours.gradients, eager.gradients, truth.gradients, strict=True):
        assert a.dtype == dtype
        if dtype == torch.float32:
            compare.assert_gradient(a, b, c)
        else:  # the logits' gradient is rounded for the products, then the result
            assert compare.relative_error(a, c) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert (ours.gradients[0][[0, 9, 22]] == 0).all()


@pytest.mark.parametrize("like_a_gpu", [torch.bfloat16, torch.float16], indirect=True, ids=str)
def test_near_a_match_and_with_a_softcap(like_a_gpu: torch.dtype) -> None:
    """Rounding the gradient costs its rounding; rounding the logits, which we do not, would cost far more."""
    student, teacher = operands("near_equal", dtype=like_a_gpu)
    labels, upstream = cases.labels(N, V), torch.tensor(2.0**14)
    for head in ({}, {"softcap": 6.0, "logit_scale": 0.7}):
        options = {"student_head": head, "teacher_head": head, "soft_weight": 1.0, "hard_weight": 0.0}
        ours = from_projections(student, teacher, labels, upstream=upstream, **options)
        truth, _ = truth_and_eager(student, teacher, labels, upstream=upstream, **options)
        for a, c in zip(ours.gradients, truth.gradients, strict=True):
            assert compare.relative_error(a, c) < 1e-2


@pytest.mark.parametrize("like_a_gpu", [torch.float16], indirect=True, ids=str)
def test_fp16_gradients_do_not_underflow_under_a_mean_over_many_tokens(like_a_gpu: torch.dtype) -> None:
    student, teacher = operands("far", dtype=torch.float16)
    options = {"call": {"num_items": 3e7}, "upstream": torch.tensor(2.0**20)}
    ours = from_projections(student, teacher, cases.labels(N, V), **options)
    truth, _ = truth_and_eager(student, teacher, cases.labels(N, V), **options)
    for a, c in zip(ours.gradients, truth.gradients, strict=True):
        assert compare.relative_error(a, c) < 2e-3


@pytest.mark.parametrize("like_a_gpu", [torch.float32], indirect=True, ids=str)
def test_mixed_sources_and_reductions(like_a_gpu: torch.dtype) -> None:
    student, teacher = operands("near_equal")
    labels = cases.labels(N, V, ignored=(4,))
    upstream = torch.linspace(-1, 2, N)
    for forms in (("projection", "logits"), ("logits", "projection")):
        judge(student, teacher, labels, student_as=forms[0], teacher_as=forms[1])
    judge(student, teacher, labels, reduction="none", upstream=upstream)


@pytest.mark.parametrize("like_a_gpu", [torch.bfloat16], indirect=True, ids=str)
def test_nothing_waits_for_the_device(like_a_gpu: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor is asked for between the first product and the last: what a CUDA graph needs."""
    (hidden, weight, _), (hidden_t, weight_t, _) = operands("far", dtype=like_a_gpu)
    student = fastkd.Projection(hidden.requires_grad_(), weight.requires_grad_())
    teacher = fastkd.Projection(hidden_t, weight_t)

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read from a tensor")

    run = loop._Loop.run

    def guarded(self: loop._Loop, rows: slice) -> None:
        with monkeypatch.context() as patch:
            # The kernel's interpreter reads tensors; the loop around it must not.
            patch.setattr(self, "backend", Silent())
            for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu"):
                patch.setattr(Tensor, name, refuse)
            run(self, rows)

    monkeypatch.setattr(loop._Loop, "run", guarded)
    fastkd.kd_loss(student, teacher, cases.labels(N, V), memory_budget=FEW)
    assert hidden.shape[-1] == H
