"""The interpreter's own checks: each fault that it promises to see, committed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.triton_interpreter import Fault, interpreted


@triton.jit
def _copy(source, target, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, offsets < count))


@triton.jit
def _everyone_writes_the_same(target):
    tl.store(target, tl.program_id(0).to(tl.float32))


@triton.jit
def _doubled(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(source + offsets)
    tl.store(target + offsets, value + value)


def test_the_checker_sees_a_store_out_of_bounds() -> None:
    with interpreted(), pytest.raises(Fault, match="outside every"):
        _copy[(2,)](torch.ones(10), torch.ones(10), 10, BLOCK=8)


def test_the_checker_sees_a_race() -> None:
    with interpreted(), pytest.raises(Fault, match="race"):
        _everyone_writes_the_same[(2,)](torch.zeros(1))


@triton.jit
def _claims_alignment(target):
    tl.store(tl.multiple_of(target, 16), 1.0)


def test_the_checker_sees_an_untrue_alignment() -> None:
    with interpreted(), pytest.raises(Fault, match="not a multiple"):
        _claims_alignment[(1,)](torch.zeros(8)[1:])


def test_the_checker_refuses_bf16_arithmetic() -> None:
    with interpreted(), pytest.raises(Fault, match="bf16"):
        _doubled[(1,)](torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), BLOCK=8)
