"""The planner: what it promises is what a loss does."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import fastkd
from fastkd.kernels import cpu
from fastkd.projection import plan as planner
from fastkd.projection.devices import GPUS
from fastkd.projection.estimate import _seconds, product_seconds
from fastkd.projection.plan import HeadSize
from fastkd.rows import STATE_BYTES
from tests.memory import printed

MIB = 1 << 20


def test_the_default_keeps_to_its_budget_and_prints() -> None:
    plan = fastkd.plan(1024, 50257, 256, 768)
    assert plan.strategy == "chunks"
    assert plan.tile == 50257
    assert plan.flops == 1024 * 50257 * (6 * 256 + 2 * 768)
    assert plan.gradient_bytes == 4 * (1024 * 256 + 50257 * 256)
    assert plan.working_bytes <= 260 * MIB
    assert plan.peak_bytes == plan.working_bytes + plan.gradient_bytes
    text = str(plan)
    assert f"{plan.chunk} tokens × 50,257 columns" in text
    assert "158.1 GFLOP" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("student", "teacher"), [(256, 768), (None, 768), (256, None)])
def test_a_larger_budget_is_used_and_never_exceeded(
    student: int | None, teacher: int | None, dtype: torch.dtype
) -> None:
    previous = 0
    for budget in (8 * MIB, 32 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB):
        plan = fastkd.plan(2048, 128256, student, teacher, dtype=dtype, memory_budget=budget)
        assert plan.working_bytes <= budget
        held = plan.chunk * plan.tile
        assert held >= previous
        previous = held
    assert plan.strategy == "chunks"
    assert fastkd.plan(2048, 128256, student, teacher, dtype=dtype, memory_budget=16 * MIB).strategy == "tiles"


def test_recomputation_is_counted() -> None:
    chunks, tiles, jsd = (
        fastkd.plan(1024, 50257, 256, 768, memory_budget=budget, divergence=divergence)
        for budget, divergence in ((None, "forward_kl"), (8 * MIB, "forward_kl"), (8 * MIB, "jsd"))
    )
    unit = 1024 * 50257
    assert chunks.flops == unit * (6 * 256 + 2 * 768)
    assert tiles.flops == unit * (8 * 256 + 4 * 768)
    assert jsd.flops == unit * (10 * 256 + 6 * 768)


def test_bf16_on_a_gpu_keeps_rounded_gradients_of_a_group_and_casts_nothing() -> None:
    plan = fastkd.plan(8192, 128256, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    assert plan.chunk < plan.group
    assert plan.working_bytes == plan.chunk * 128256 * (4 + 4) + plan.group * (128256 * 2 + 4 * 2048)
    assert f"{plan.chunk} tokens × 128,256 columns at a time, their gradients of {plan.group:,}" in str(plan)
    assert plan.gradient_bytes == 8192 * 2048 * 2 + 128256 * 2048 * (4 + 2)


# --- the default on GPUs, and the time --------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [32000, 128256, 262144])
@pytest.mark.parametrize("gib", [1, 4, 6, 10, 24, 80])
def test_a_default_takes_a_quarter_of_what_is_free_beside_the_gradients_and_no_more_than_helps(
    gib: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "free_bytes", lambda device: gib << 30)
    plan = fastkd.plan(32768, vocab, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    share = ((gib << 30) - plan.gradient_bytes) // 4
    assert plan.working_bytes <= max(share, 64 * MIB)
    assert plan.chunk * plan.tile <= max(512 * plan.tile, 1 << 25)
    assert plan.group <= 4096
    if gib == 80:
        assert plan.group == 4096


def test_a_little_less_free_memory_changes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for free in (5 << 30, (5 << 30) - 200 * MIB):
        monkeypatch.setattr(planner, "free_bytes", lambda device, free=free: free)
        plans.append(fastkd.plan(32768, 128256, 2048, 4096, dtype=torch.bfloat16, device="cuda"))
    assert plans[0] == plans[1]
    assert plans[0].group < 4096


def test_fp32_products_and_frozen_heads_need_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "free_bytes", lambda device: 80 << 30)
    plan = fastkd.plan(32768, 128256, 2048, 4096, device="cuda")
    assert plan.chunk == plan.group == 1024


def test_a_small_vocabulary_is_not_cut_into_many_chunks() -> None:
    plan = fastkd.plan(16384, 1000, 2048, 2048, dtype=torch.bfloat16, device="cuda", gpu="H100")
    assert plan.chunk == plan.group == 16384


def test_a_gpu_that_cannot_be_asked_has_a_stated_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "free_bytes", lambda device: None)
    plan = fastkd.plan(32768, 1 << 19, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    assert 0.75 * (2 << 30) < plan.working_bytes <= 2 << 30


def test_the_bar_of_time_from_hidden_states() -> None:
    """Forward and backward at most 1.2 times the four products alone: both by the same rates."""
    tokens, vocab, hidden, gpu = 8192, 128256, 4096, GPUS["H100"]
    plan = fastkd.plan(tokens, vocab, hidden, hidden, dtype=torch.bfloat16, device="cuda", gpu="H100")
    shapes = [(tokens, hidden, vocab), (tokens, hidden, vocab), (tokens, vocab, hidden), (vocab, tokens, hidden)]
    bare = 1e3 * sum(product_seconds(*shape, operand_bytes=2, result_bytes=4, gpu=gpu) for shape in shapes)
    assert plan.milliseconds is not None
    assert bare < plan.milliseconds <= 1.2 * bare
    assert bare == pytest.approx(1e3 * plan.flops / gpu.flops_16)
    assert str(plan).endswith(f"about {plan.milliseconds:,.1f} ms")
    # In one level of chunks of 752 tokens, which 1 GiB held, the head's gradient alone would break it.
    size = HeadSize(hidden, 2, 2, 2, 2, 2)
    assert 1e3 * _seconds(replace(plan, chunk=752, group=752), size, [size], 2, False, gpu) > 1.25 * bare


def test_time_follows_what_is_computed() -> None:
    def milliseconds(*sizes: int | None, dtype: torch.dtype = torch.bfloat16, **options: object) -> float:
        found = fastkd.plan(8192, 50257, *sizes, dtype=dtype, device="cuda", **options).milliseconds  # type: ignore[arg-type,misc]
        assert found is not None
        return found

    base = milliseconds(2048, 2048, gpu="H100")
    assert milliseconds(2048, 2048, gpu="B200") < milliseconds(2048, 2048, gpu="H200") < base
    assert base < milliseconds(2048, 2048, gpu="H100", divergence="jsd") < milliseconds(2048, 4096, gpu="H100")
    assert milliseconds(2048, None, gpu="H100") < base < milliseconds(2048, 2048, gpu="H100", memory_budget=32 * MIB)
    assert milliseconds(2048, 2048, gpu="H100", dtype=torch.float32) > 8 * base
    assert fastkd.plan(8192, 50257, 2048, 2048, device="cuda", gpu="H100", dtype=torch.float64).milliseconds is None
    assert fastkd.plan(8192, 50257, 2048, 2048).milliseconds is None


@pytest.mark.parametrize(("gpu", "device"), [("H1000", "cuda"), ("H100", "cpu")])
def test_a_gpu_of_another_name(gpu: str, device: str) -> None:
    with pytest.raises(ValueError, match=rf"A100, H100, .*got '{gpu}' with '{device}'"):
        fastkd.plan(8192, 50257, 2048, 2048, device=device, gpu=gpu)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 100, 8, 8), "tokens must be >= 1, got 0"),
        ((10, 100.0, 8, 8), "vocab_size must be an int, got 100.0"),
        ((10, 100, -1, 8), "student_hidden must be >= 1, got -1"),
        ((10, 100, None, None), "both None"),
    ],
)
def test_bad_input(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fastkd.plan(*arguments)


def test_the_least_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CPU_PRODUCTS", "fp32")  # that of casts
    with pytest.raises(
        ValueError, match=r"memory_budget=1048576 bytes \(1\.0 MiB\) is too small: 16 tokens × 512"
    ) as e:
        fastkd.plan(1024, 50257, 256, 768, dtype=torch.bfloat16, memory_budget=MIB)
    least = int(str(e.value).split(" need ")[1].split()[0])
    assert fastkd.plan(1024, 50257, 256, 768, dtype=torch.bfloat16, memory_budget=least).strategy == "tiles"


MEMORY = """
import sys, torch, fastkd
from tests.memory import peak
N, V, H, H_TEACHER = 768, 50257, 64, 96
dtype, budget = getattr(torch, sys.argv[1]), int(sys.argv[2])
hidden, weight = torch.randn(N, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()
teacher = fastkd.Projection(torch.randn(N, H_TEACHER).to(dtype), torch.randn(V, H_TEACHER).to(dtype))
labels = torch.randint(V, (N,))
def run(rows, columns):
    student = fastkd.Projection(hidden[:rows], weight[:columns])
    other = fastkd.Projection(teacher.hidden[:rows], teacher.weight[:columns])
    fastkd.kd_loss(student, other, labels[:rows] % columns, memory_budget=budget).backward()
for _ in range(2):
    run(N, 4500)  # threads and autograd are set up, and the buffers the matrix products keep for good:
with torch.no_grad():
    logits = hidden.float() @ weight.float().T
    logits @ weight.float(), logits.T @ hidden.float(), teacher.hidden.float() @ teacher.weight.float().T
del logits
hidden.grad = weight.grad = None
print(peak(lambda: run(N, V)), fastkd.plan(N, V, H, H_TEACHER, dtype=dtype, memory_budget=budget).peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "mib"), [("float32", 200), ("float32", 48), ("float32", 16), ("bfloat16", 100), ("float16", 100)]
)
def test_predicted_memory_is_measured_memory(dtype: str, mib: int) -> None:
    measured, predicted = printed(MEMORY, dtype, str(mib * MIB))
    assert 0.9 * predicted <= measured <= 1.1 * predicted


def test_rows_in_tiles_keep_no_more_than_is_planned() -> None:
    assert cpu.tile_state(1, torch.device("cpu")).numel() <= STATE_BYTES


def test_rows_in_tiles_keep_no_more_than_is_planned_on_gpus() -> None:
    pytest.importorskip("triton")
    from fastkd.kernels.gpu.state import FIELDS

    assert 4 * FIELDS.value <= STATE_BYTES
