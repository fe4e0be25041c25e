"""The Triton kernels compiled for GPUs that are not there: what the machine code must not and must do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

import fastkd
from fastkd.kernels import gpu
from fastkd.rows import Tile
from fastkd.sparse import sparse_rows
from tests import cases
from tools.machine_code import static
from tools.machine_code.offline import TARGETS, compiled, loads, resources, sweeps
from tools.machine_code.static import CASES, Case

#: Every kernel for one NVIDIA and one AMD target at the harder, odd vocabulary; elsewhere a few stand for the rest.
#: Sparse teachers are in `test_triton_sparse`.
BUILDS = [
    *((target, 50257, case) for target in ("sm_90", "gfx942") for case in CASES if not case.entries),
    *(("sm_90", 128256, static.kd(name)) for name in ("forward_kl", "jsd", "mse")),
    *((target, 50257, static.kd(name)) for target, name in (("sm_80", "jsd"), ("sm_100", "forward_kl"))),
    *((target, 50257, static.stage("jsd", "gradient")) for target in ("sm_80", "sm_100")),
    *(
        (target, 128256, static.kd(name))
        for target, name in (("sm_80", "forward_kl"), ("sm_100", "jsd"), ("gfx942", "jsd"))
    ),
]


@pytest.mark.parametrize(
    ("target", "vocab", "case"), [pytest.param(*build, id=f"{build[0]}-{build[1]}-{build[2]}") for build in BUILDS]
)
def test_budgets(target: str, vocab: int, case: Case) -> None:
    """An odd vocabulary too: rows that start anywhere are read as aligned vectors between their edges."""
    reading = static.read(case, target, vocab)
    assert not case.broken(reading)
    stored = {width for sweep in reading.sweeps for width in sweep.store_bytes}
    assert stored == ({16 * case.grad.itemsize // case.logits.itemsize} if case.writes else set())


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
    assert loaded(kernels[0]) == {16}


def test_dtypes_that_differ() -> None:
    """The wider one is read 16 bytes at a time, the narrower one as many columns."""
    student, teacher = torch.empty(2, 50257, dtype=torch.bfloat16), torch.empty(2, 50257)
    with compiled(TARGETS["sm_90"]) as kernels:
        spec, scale = cases.spec(fastkd.ForwardKL(), 50257), torch.ones(2)
        gpu.kd_rows(student, teacher, None, scale, None, spec, torch.empty_like(student))
    assert resources(kernels[0]).spills == 0
    assert loaded(kernels[0]) == {8, 16}


def test_a_tile_of_one_column_compiles() -> None:
    """Its `first` and its width may be 1, and so constants."""
    column, scale, spec = torch.empty(1, 1), torch.ones(1), cases.spec(fastkd.ForwardKL(), 3)
    state = gpu.tile_state(1, column.device)
    with compiled(TARGETS["sm_90"]) as kernels:
        gpu.kd_rows(column, column, None, scale, None, spec, None, Tile("statistics", 1, state))
        gpu.kd_rows(column, column, cases.labels(1, 3), scale, scale, spec, column, Tile("gradient", 1, state))
    assert len(kernels) == 2


def test_chunks_of_padded_rows() -> None:
    """fp32 logits and a bf16 gradient, as products leave them: rows of an odd vocabulary padded to whole vectors."""
    student, teacher, grad = (
        torch.empty(2, 50260, dtype=dtype)[:, :50257] for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    scale, spec = torch.ones(2), cases.spec(fastkd.ForwardKL(), 50257)
    with compiled(TARGETS["sm_90"]) as kernels:
        gpu.kd_rows(student, teacher, cases.labels(2, 50257), scale, scale, spec, grad)
    assert resources(kernels[0]).spills == 0
    assert loaded(kernels[0]) == {16}
    assert {width for sweep in sweeps(kernels[0]) for width in sweep.store_bytes} == {8}


@pytest.mark.parametrize("vocab", static.VOCABULARIES)
def test_memory_is_the_limit_on_an_h100(vocab: int) -> None:
    """Forward KL in bf16 moves 10 bytes per logit, student and teacher twice and the gradient once."""
    case = static.kd("forward_kl")
    found = static.read(case, "sm_90", vocab).estimate
    assert found.bytes_per_logit == case.bytes_per_logit == 10
    assert found.bound == "DRAM"


def test_jsd_takes_at_most_1_4_of_forward_kl_on_an_h100() -> None:
    """Estimates for whole rows of 128256 columns: what reaches DRAM, or JSD's instructions, whichever takes longer."""
    jsd, forward = (static.read(static.kd(name), "sm_90", 128256).estimate for name in ("jsd", "forward_kl"))
    assert jsd.nanoseconds <= 1.4 * forward.nanoseconds


def test_a_spilling_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a starvation diet of registers the same kernel spills, and the reader says so."""
    from fastkd.kernels.gpu import dense, launch

    def starved(block: launch.Block) -> dict[str, Any]:
        return {**launch.launch_options(block), "maxnreg": 32}

    monkeypatch.setattr(dense, "launch_options", starved)
    case = static.kd("jsd")
    assert any("spills" in budget for budget in case.broken(static.read(case, "sm_90", 50257)))


def test_narrow_loads_are_seen() -> None:
    """Rows of student and teacher that are not aligned alike cannot both be read as vectors."""

    def launch(vocab: int) -> None:
        student = torch.empty(2, vocab, dtype=torch.bfloat16)
        teacher = torch.empty(2, vocab + 1, dtype=torch.bfloat16)
        spec, scale = cases.spec(fastkd.ForwardKL(), vocab), torch.ones(2)
        gpu.kd_rows(student, teacher, None, scale, None, spec, torch.empty_like(student))

    case = replace(static.kd("forward_kl"), launch=launch)
    assert case.broken(static.read(case, "sm_90", 50257)) == ["loads of 2 bytes"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_sweep_too_many_is_seen(target: str) -> None:
    """JSD needs the normalisers before its terms: a third sweep, 14 bytes per logit."""
    case = replace(static.kd("forward_kl"), launch=static.kd("jsd").launch)
    assert case.broken(static.read(case, target, 50257)) == ["14 bytes per logit instead of 10"]


def test_unrolled_steps_are_counted() -> None:
    """AMD's compiler may make two steps of the backward's first sweep one: as many bytes per logit as ever."""
    (case,) = (case for case in CASES if case.name == "log_softmax_backward")
    reading = static.read(case, "gfx942", 128256)
    assert [sweep.columns for sweep in reading.sweeps] in ([32, 16], [16, 16])  # Triton from 3.8, and before
    assert reading.estimate.bytes_per_logit == case.bytes_per_logit == 8


@pytest.mark.parametrize("target", TARGETS)
def test_a_gradient_of_an_odd_number_of_elements_is_scaled_in_vectors(target: str) -> None:
    """But for the tail."""
    with compiled(TARGETS[target]) as kernels:
        gpu.scale_(torch.empty(3, 50257, dtype=torch.bfloat16), torch.ones(()))
    assert 16 in loads(kernels[0])


@pytest.mark.parametrize("stage", ["whole", "gradient"])
@pytest.mark.parametrize("teacher", ["dense", "raw", "none", "sparse"])
def test_in_place_no_logit_is_overwritten_before_all_have_read_it(
    teacher: str, stage: Literal["whole", "gradient"]
) -> None:
    """Logits of single columns are read by threads that do not write them: a barrier comes before the first store."""
    vocab, width, scale = 50257, 1024, torch.ones(4)
    if stage == "whole":
        width = vocab
    student = torch.empty(4, width)
    other: Any = None if teacher == "none" else torch.empty(4, width)
    if teacher == "sparse":
        ids = torch.arange(12).expand(4, 12)
        other = sparse_rows(
            fastkd.SparseTargets(ids, torch.full((4, 12), -9.0), "ghost", 2.0), None, vocab, scale.dtype
        )
    divergence = fastkd.MSE() if teacher == "raw" else fastkd.ForwardKL()
    spec = cases.spec(divergence, vocab)
    tile = () if stage == "whole" else (Tile(stage, width, gpu.tile_state(4, student.device)),)
    soft_scale = None if teacher == "none" else scale
    with compiled(TARGETS["sm_90"]) as kernels:
        gpu.kd_rows(student, other, cases.labels(4, vocab), soft_scale, scale, spec, student, *tile)
    ptx = kernels[0].asm["ptx"]
    reading = ptx[ptx.index("ld.global.b64") :]  # of ids and labels: rows that are skipped have left before
    before, barrier, after = reading.partition("bar.sync")
    assert barrier
    assert "st.global" in after
    stores = re.findall(r"st\.global\S*", before)
    assert set(stores) <= {"st.global.b32"}  # the values of the row's two terms, and no vector of the gradient
    assert len(stores) <= 2


def loaded(kernel: Any) -> set[int]:
    """The widths of a kernel's loads of columns."""
    return {width for sweep in sweeps(kernel) for width in sweep.load_bytes}
