"""The Triton kernels compiled for GPUs that are not there: what the machine code must not and must do."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

import fastkd
from fastkd.backend import Tile
from fastkd.divergences import TABLE
from fastkd.kernels import gpu
from tests import cases
from tests.triton_offline import DEVICES, TARGETS, bound, compiled, loops, resources

#: Every divergence for one NVIDIA and one AMD target at the harder, odd vocabulary; elsewhere two stand for the rest.
BUILDS = [
    *((target, name, 50257) for target in ("sm_90", "gfx942") for name in TABLE),
    *((target, name, 50257) for target in ("sm_80", "sm_100") for name in ("forward_kl", "jsd")),
    *(("sm_90", name, 128256) for name in TABLE),
    *((target, name, 128256) for target in ("sm_80", "sm_100", "gfx942") for name in ("forward_kl", "jsd")),
]


def build(target: str, divergence: str, vocab: int, dtype: torch.dtype) -> Any:
    student = torch.empty(2, vocab, dtype=dtype)
    scale, spec = torch.ones(2), cases.spec(TABLE[divergence](), vocab)
    with compiled(TARGETS[target]) as kernels:
        gpu.kd_rows(
            student, torch.empty_like(student), cases.labels(2, vocab), scale, scale, spec, torch.empty_like(student)
        )
    (kernel,) = kernels
    return kernel


@pytest.mark.parametrize(("target", "divergence", "vocab"), BUILDS)
def test_bf16_spills_nothing_and_loads_16_bytes(target: str, divergence: str, vocab: int) -> None:
    """An odd vocabulary too: rows that start anywhere are read as aligned vectors between their edges."""
    kernel = build(target, divergence, vocab, torch.bfloat16)
    assert resources(kernel).spills == 0
    streaming = [loop for loop in loops(kernel) if loop.load_bytes]
    assert len(streaming) >= 2  # statistics and gradient at least
    assert {width for loop in streaming for width in loop.load_bytes} == {16}
    assert {width for loop in streaming for width in loop.store_bytes} <= {16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_dtypes(target: str, dtype: torch.dtype) -> None:
    kernel = build(target, "forward_kl", 50257, dtype)
    assert resources(kernel).spills == 0
    assert {width for loop in loops(kernel) for width in loop.load_bytes} == {16}


@pytest.mark.parametrize("vocab", [1, 1003])
def test_every_kind_of_launch_compiles(vocab: int) -> None:
    """One term or both, loss alone, one row of one column: arguments that are 1 or None become constants."""
    logits, scale, spec = torch.empty(1, vocab), torch.ones(1), cases.spec(fastkd.ForwardKL(), vocab, 3.0)
    labels = cases.labels(1, vocab)
    with compiled(TARGETS["sm_90"]) as kernels:
        for grad in (None, logits):
            gpu.kd_rows(logits, logits.clone(), None, scale, None, spec, grad)
            gpu.kd_rows(logits, None, labels, None, scale, spec, grad)
            gpu.kd_rows(logits, logits.clone(), labels, scale, scale, spec, grad)
    assert len(kernels) == 6


def test_rows_of_a_view_at_an_odd_element() -> None:
    """No tensor is aligned, all alike: vectors again start where the addresses allow."""
    student, teacher, grad = (torch.empty(2 * 50257 + 3, dtype=torch.bfloat16)[3:].view(2, -1) for _ in range(3))
    with compiled(TARGETS["sm_90"]) as kernels:
        spec, scale = cases.spec(fastkd.ForwardKL(), 50257), torch.ones(2)
        gpu.kd_rows(student, teacher, None, scale, None, spec, grad)
    assert {width for loop in loops(kernels[0]) for width in loop.load_bytes} == {16}


def test_dtypes_that_differ() -> None:
    """The wider one is read 16 bytes at a time, the narrower one as many columns."""
    student, teacher = torch.empty(2, 50257, dtype=torch.bfloat16), torch.empty(2, 50257)
    with compiled(TARGETS["sm_90"]) as kernels:
        spec, scale = cases.spec(fastkd.ForwardKL(), 50257), torch.ones(2)
        gpu.kd_rows(student, teacher, None, scale, None, spec, torch.empty_like(student))
    assert resources(kernels[0]).spills == 0
    assert {width for loop in loops(kernels[0]) for width in loop.load_bytes} == {8, 16}


STAGES = [
    *((target, "forward_kl", stage) for target in ("sm_90", "gfx942") for stage in ("statistics", "gradient")),
    *((target, "jsd", stage) for target in ("sm_90", "gfx942") for stage in ("terms", "gradient")),
    *((target, "jsd", "gradient") for target in ("sm_80", "sm_100")),
    ("sm_90", "jsd", "statistics"),
]


@pytest.mark.parametrize(("target", "divergence", "stage"), STAGES)
def test_stages_of_a_vocabulary_tile(
    target: str, divergence: str, stage: Literal["statistics", "terms", "gradient"]
) -> None:
    """The last tile of a vocabulary, fp32 logits of an odd width; one sweep and nothing spilt."""
    width, scale, spec = 50257 % 4096, torch.ones(2), cases.spec(TABLE[divergence](), 50257)
    student, teacher = torch.empty(2, width), torch.empty(2, width)
    grad = torch.empty(2, width, dtype=torch.bfloat16) if stage == "gradient" else None
    with compiled(TARGETS[target]) as kernels:
        tile = Tile(stage, 50257 - width, gpu.tile_state(2, student.device))
        gpu.kd_rows(student, teacher, cases.labels(2, 50257), scale, scale, spec, grad, tile)
    assert resources(kernels[0]).spills == 0
    (sweep,) = (loop for loop in loops(kernels[0]) if sum(loop.load_bytes) >= 16)
    assert set(sweep.load_bytes) == {16}
    assert set(sweep.store_bytes) == ({8} if stage == "gradient" else set())


def test_a_tile_of_one_column_compiles() -> None:
    """Its `first` and its width may be 1, and so constants."""
    column, scale, spec = torch.empty(1, 1), torch.ones(1), cases.spec(fastkd.ForwardKL(), 3)
    state = gpu.tile_state(1, column.device)
    with compiled(TARGETS["sm_90"]) as kernels:
        gpu.kd_rows(column, column, None, scale, None, spec, None, Tile("statistics", 1, state))
        gpu.kd_rows(column, column, cases.labels(1, 3), scale, scale, spec, column, Tile("gradient", 1, state))
    assert len(kernels) == 2


@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_of_fp32_logits_and_a_bf16_gradient(padding: int) -> None:
    """Rows of an odd vocabulary one after the other, and rows padded to whole vectors."""
    student, teacher, grad = (
        torch.empty(2, 50257 + padding, dtype=dtype)[:, :50257]
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    scale, spec = torch.ones(2), cases.spec(fastkd.ForwardKL(), 50257)
    with compiled(TARGETS["sm_90"]) as kernels:
        gpu.kd_rows(student, teacher, cases.labels(2, 50257), scale, scale, spec, grad)
    assert resources(kernels[0]).spills == 0
    streaming = [loop for loop in loops(kernels[0]) if loop.load_bytes]
    assert {width for loop in streaming for width in loop.load_bytes} == {16}
    assert {width for loop in streaming for width in loop.store_bytes} == {8}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_statistics_and_log_softmax(target: str) -> None:
    logits = torch.empty(2, 50257, dtype=torch.bfloat16)
    with compiled(TARGETS[target]) as kernels:
        gpu.row_statistics(logits, cases.labels(2, 50257), 1.0)
        normaliser = gpu.log_softmax(logits, 1.0, torch.empty_like(logits))
        gpu.log_softmax_backward(logits, logits, normaliser, 1.0, torch.empty_like(logits))
        gpu.scale_(logits, torch.ones(()))
    assert len(kernels) == 4
    for kernel in kernels:
        assert resources(kernel).spills == 0
        # AMD's compiler moves the step of the edges behind the code and back: a loop of one narrow load to the reader.
        streaming = [loop for loop in loops(kernel) if sum(loop.load_bytes) >= 16]
        assert {width for loop in streaming for width in loop.load_bytes} <= {16}


@pytest.mark.parametrize("vocab", [50257, 128256])
def test_forward_kl_moves_ten_bytes_a_logit(vocab: int) -> None:
    """bf16: student and teacher twice, the gradient once; and on an H100 memory is the limit, not arithmetic."""
    kernel = build("sm_90", "forward_kl", vocab, torch.bfloat16)
    limits = bound(kernel, DEVICES["sm_90"], 2)
    assert limits.bytes_per_logit == 10
    assert limits.special < 1
    assert limits.issue < 1


def test_a_spilling_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a starvation diet of registers the same kernel spills, and the reader says so."""
    from fastkd.kernels.gpu import blocks, rows

    def starved(block: blocks.Block) -> dict[str, Any]:
        return {**blocks.launch_options(block), "maxnreg": 32}

    monkeypatch.setattr(rows, "launch_options", starved)
    assert resources(build("sm_90", "jsd", 50257, torch.bfloat16)).spills > 0


def test_narrow_loads_are_seen() -> None:
    """Rows of student and teacher that are not aligned alike cannot both be read as vectors."""
    student = torch.empty(2, 50257, dtype=torch.bfloat16)
    teacher = torch.empty(2, 50258, dtype=torch.bfloat16)
    with compiled(TARGETS["sm_90"]) as kernels:
        spec, scale = cases.spec(fastkd.ForwardKL(), 50257), torch.ones(2)
        gpu.kd_rows(student, teacher, None, scale, None, spec, torch.empty_like(student))
    assert min(width for loop in loops(kernels[0]) for width in loop.load_bytes) < 16
