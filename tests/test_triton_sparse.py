"""The Triton kernel beside a teacher of which each row keeps K tokens: interpreted on CPU tensors, compiled offline."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.divergences import TABLE, Divergence
from fastkd.kernels import gpu
from fastkd.rows import RowSpec, SparseRows, Tile
from fastkd.sparse import sparse_rows
from tests import cases
from tests.edges import KINDS
from tests.sparse_targets import judge, kept
from tests.triton_interpreter import interpreted
from tools.machine_code import static
from tools.machine_code.offline import TARGETS

VOCAB = 2501


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_contract(divergence: Divergence, family: str) -> None:
    student, teacher = cases.logits(family, 2, VOCAB)
    with interpreted():
        judge(gpu.kd_rows, student, kept(teacher, 12), divergence)


@pytest.mark.parametrize("temperature", [1.0, 1.3, 3.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl", "jsd"])
def test_temperatures(divergence: str, temperature: float) -> None:
    student, teacher = cases.logits("peaked", 2, VOCAB)
    targets = kept(teacher, 5, temperature=temperature)
    with interpreted():
        judge(gpu.kd_rows, student, targets, TABLE[divergence](), temperature)
        judge(gpu.kd_rows, student, targets, TABLE[divergence](), temperature, hard=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_low_precision(divergence: str, dtype: torch.dtype) -> None:
    student, teacher = cases.logits("far", 2, VOCAB, dtype)
    with interpreted():
        judge(gpu.kd_rows, student, kept(teacher, 12), TABLE[divergence]())


@pytest.mark.parametrize(("vocab", "entries"), [(1, 1), (3, 2), (7, 7), (1024, 1), (1027, 64), (50257, 64)])
def test_sizes(vocab: int, entries: int) -> None:
    """Rows without a rest, rows that are all edges, more tokens than fit one step."""
    student, teacher = cases.logits("far", 2, vocab)
    with interpreted():
        judge(gpu.kd_rows, student, kept(teacher, entries, shuffled=True), fastkd.ForwardKL())


def in_tiles(widths: tuple[int, ...]) -> object:
    """`Backend.kd_rows` on vocabulary tiles that are made anew for each stage; what is not yet written is NaN."""

    def kd_rows(
        student: Tensor,
        teacher: SparseRows,
        labels: Tensor | None,
        soft_scale: Tensor,
        hard_scale: Tensor | None,
        spec: RowSpec,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor]:
        state = gpu.tile_state(len(student), student.device).fill_(torch.nan)
        teacher.picked.fill_(torch.nan)
        for stage in ("statistics", "gradient"):
            for first, width in zip(accumulate(widths, initial=0), widths, strict=False):
                columns = slice(first, first + width)
                tile, out = student[:, columns].contiguous(), grad[:, columns] if stage == "gradient" else None
                computed = gpu.kd_rows(
                    tile, teacher, labels, soft_scale, hard_scale, spec, out, Tile(stage, first, state)
                )
                if stage == "statistics":
                    values = computed
        return values

    return kd_rows


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_tiles(divergence: str, family: str) -> None:
    student, teacher = cases.logits(family, 2, VOCAB)
    with interpreted():
        for hard in (True, False):
            judge(in_tiles((1024, 1000, VOCAB - 2024)), student, kept(teacher, 12), TABLE[divergence](), hard=hard)  # type: ignore[arg-type]


def test_what_is_read_and_written() -> None:
    """The student twice, the gradient once and again where tokens are kept; in place too."""
    student, teacher = cases.logits("far", 2, VOCAB)
    targets, scale = kept(teacher, 12), torch.ones(2)
    rows = sparse_rows(targets, None, VOCAB, torch.float32)
    spec = cases.spec(fastkd.ForwardKL(), VOCAB)
    grad = torch.empty_like(student)
    with interpreted() as trace:
        gpu.kd_rows(student, rows, None, scale, None, spec, grad)
    extra = torch.zeros(2, VOCAB, dtype=torch.int32).scatter_(1, targets.ids, 1)
    assert torch.equal(trace.loads(student), 2 + extra)
    assert torch.equal(trace.stores(grad), 1 + extra)
    with interpreted():
        gpu.kd_rows(student, rows, None, scale, None, spec, student)
    assert torch.equal(student, grad)


def test_skipped_rows() -> None:
    """Without a soft term plain cross-entropy; without either nothing is read and the gradient is 0."""
    student, teacher = cases.logits("far", 3, VOCAB)
    labels, scale = cases.labels(3, VOCAB), torch.tensor([1.0, 0.0, 0.0])
    hard_scale = torch.tensor([1.0, 1.0, 0.0])
    rows = sparse_rows(kept(teacher, 12), scale, VOCAB, torch.float32)
    grad, expected = torch.empty_like(student), torch.empty_like(student)
    spec = cases.spec(fastkd.ForwardKL(), VOCAB)
    with interpreted() as trace:
        soft, hard = gpu.kd_rows(student, rows, labels, scale, hard_scale, spec, grad)
        _, alone = gpu.kd_rows(student[1:2], None, labels[1:2], None, hard_scale[1:2], spec, expected[1:2])
    assert soft[1] == soft[2] == hard[2] == 0
    assert torch.allclose(hard[1], alone[0])
    assert torch.allclose(grad[1], expected[1], atol=1e-8)
    assert (grad[2] == 0).all()
    assert (trace.loads(student)[2] == 0).all()


#: Compiling takes seconds: every two of target, vocabulary (with a dtype) and divergence meet.
BUILDS = [
    (target, vocab, dtype, ("forward_kl", "jsd")[(i + j) % 2])
    for i, target in enumerate(TARGETS)
    for j, (vocab, dtype) in enumerate([(50257, torch.bfloat16), (128256, torch.float32)])
]


@pytest.mark.parametrize(("target", "vocab", "dtype", "divergence"), BUILDS, ids=str)
def test_compiled(target: str, vocab: int, dtype: torch.dtype, divergence: str) -> None:
    """As the table in `static.md` asks, in other dtypes and for a divergence that needs the normalisers too."""
    case = static.sparse(divergence, "ghost", 64, dtype)
    reading = static.read(case, target, vocab)
    assert not case.broken(reading)
    assert [set(sweep.store_bytes) for sweep in reading.sweeps] == [set(), {16}]
