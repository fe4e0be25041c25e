"""The native kernels at their edges: sizes, strides, alignment, threads, determinism, memory beyond the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.divergences import TABLE, of_spec
from fastkd.kernels import cpu
from fastkd.rows import Tile, row_layout
from tests import cases, compare

BLOCK = 1024  # kernels/cpu/blocks.h
SIZES = (1, 2, 3, 15, 16, 17, 31, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5)


def judge(student: Tensor, teacher: Tensor, grad: Tensor, divergence: str, temperature: float = 2.0) -> None:
    """Run the native kernel into `grad` and hold it against the reference."""
    vocab, rows = student.shape[-1], student.numel() // student.shape[-1]
    labels, scale = cases.labels(rows, vocab), torch.rand(rows) + 0.5
    spec = cases.spec(TABLE[divergence](), vocab, temperature)
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        s, t = student.to(dtype), teacher.to(dtype)
        out = torch.empty(s.shape, dtype=dtype)
        outcomes.append((*reference.kd_rows(s, t, labels, scale, scale, spec, out), out))
    eager, truth = outcomes
    undecided = cases.undecided(student, teacher, spec)
    soft, hard = cpu.kd_rows(student, teacher, labels, scale, scale, spec, grad)
    compare.assert_value(soft, truth[0], eager[0])
    compare.assert_value(hard, truth[1], eager[1])
    compare.assert_gradient(grad, eager[2].to(grad.dtype), truth[2], undecided=undecided)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl", "jsd", "mse"])
def test_sizes_and_the_memory_around_them(divergence: str, dtype: torch.dtype) -> None:
    """Every tail, at every misalignment of the row; sentinels before and after the gradient stay as they were."""
    for vocab in SIZES:
        for misaligned in (0, 1, 3):
            student, teacher = cases.logits("far", 3, vocab, dtype)
            memory = torch.full((misaligned + 3 * vocab + 40,), -7.0, dtype=dtype)
            grad = memory[misaligned : misaligned + 3 * vocab].view(3, vocab)
            judge(student, teacher, grad, divergence)
            assert (memory[:misaligned] == -7).all()
            assert (memory[misaligned + 3 * vocab :] == -7).all()


@pytest.mark.parametrize("divergence", TABLE)
def test_a_real_vocabulary(divergence: str) -> None:
    student, teacher = cases.logits("far", 3, 50257)
    judge(student, teacher, torch.empty_like(student), divergence)


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0, 3.0, 4.0, 7.0])
def test_rows_of_every_kind_in_one_call(temperature: float) -> None:
    """Rows with both terms, one, the other and none; garbage in the skipped ones is never read into a result."""
    student, teacher = cases.logits("far", 4, 3001)
    student[3], teacher[3], teacher[2] = torch.nan, torch.inf, torch.nan
    labels = cases.labels(4, 3001)
    labels[1] = labels[3] = -100
    soft_scale, hard_scale = torch.tensor([1.0, 0.5, 0, 0]), torch.tensor([2.0, 0, 0.7, 0])
    spec = cases.spec(TABLE["forward_kl"](), 3001, temperature)
    grads = [torch.full_like(student, 9.0), torch.full_like(student, 9.0)]
    ours = cpu.kd_rows(student, teacher, labels, soft_scale, hard_scale, spec, grads[0])
    truth = reference.kd_rows(student, teacher, labels, soft_scale, hard_scale, spec, grads[1])
    for a, b in zip(ours, truth, strict=True):
        compare.assert_value(a, b)
    for i in range(3):
        assert compare.relative_error(grads[0][i], grads[1][i]) < 1e-6
    assert (grads[0][3] == 0).all()
    assert ours[0][2:].tolist() == [0, 0]
    assert ours[1][[1, 3]].tolist() == [0, 0]


def in_tiles(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: fastkd.backend.RowSpec,
    grad: Tensor,
    widths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """`kd_rows` on tiles of columns; the logits are copied for each, as their producer would."""
    state = cpu.tile_state(len(student), student.device)
    state.fill_(0xAA)  # whatever was there before does not matter
    terms = ["terms"] if of_spec(spec.divergence, spec.parameters).normalised and teacher is not None else []
    stages = ["statistics", *terms, "gradient"]
    for stage in stages:
        first = 0
        for width in widths:
            columns = slice(first, first + width)
            tile = student[:, columns].clone()
            given = None if teacher is None else teacher[:, columns].clone()
            out = None if stage != "gradient" else tile if grad.dtype == tile.dtype else grad[:, columns]
            values = cpu.kd_rows(
                tile,
                given,
                labels,
                soft_scale,
                hard_scale,
                spec,
                out,
                Tile(stage, first, state),  # type: ignore[arg-type]
            )
            if out is tile:
                grad[:, columns] = tile
            first += width
        if stage == stages[-2]:
            final = values
    assert first == student.shape[1]
    return final


@pytest.mark.parametrize(
    ("divergence", "family"),
    [
        *((divergence, family) for divergence in cases.DIVERGENCES for family in ("far", "near_equal")),
        *((row(), "peaked") for row in TABLE.values()),
    ],
    ids=str,
)
def test_tiles_of_columns(divergence: fastkd.divergences.Divergence, family: str) -> None:
    """As accurate as whole rows, whichever tile holds the label, the maxima or nothing but −inf."""
    vocab, rows = 2600, 5
    student, teacher = cases.logits(family, rows, vocab)
    student[0, :1500] = teacher[0, :1500] = -torch.inf
    labels = torch.tensor([2599, 0, 1499, 1500, 700])
    for temperature, other in ((2.0, 2.0), (1.3, 1.3), (1.5, 3.0)):
        spec = cases.spec(divergence, vocab, temperature, teacher_temperature=other)
        scales = torch.tensor([1.0, 0.5, 0.7, 0.0, 2.0]), torch.tensor([0.3, 1.0, 0.0, 0.0, 1.0])
        grads = [torch.empty(rows, vocab, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
        ours = in_tiles(student, teacher, labels, *scales, spec, grads[0], (1500, 100, 1, 999))
        eager = reference.kd_rows(student, teacher, labels, *scales, spec, grads[1])
        truth = reference.kd_rows(student.double(), teacher.double(), labels, *scales, spec, grads[2])
        for ours_, eager_, truth_ in zip(ours, eager, truth, strict=True):
            compare.assert_value(ours_, truth_, eager_)
        compare.assert_gradient(*grads, undecided=cases.undecided(student, teacher, spec))
        assert (grads[0][3] == 0).all()


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_tiles_hard_or_soft_term_alone_and_low_precision_gradients(dtype: torch.dtype) -> None:
    vocab, rows, widths = 2600, 3, (1024, 1024, 552)
    student, teacher = cases.logits("far", rows, vocab)
    labels, scale = cases.labels(rows, vocab), torch.ones(rows)
    for name in ("forward_kl", "jsd", "mse"):
        spec = cases.spec(TABLE[name](), vocab)
        for arguments in ((None, labels, None, scale), (teacher, None, scale, None)):
            truth, ours = torch.empty(rows, vocab), torch.empty(rows, vocab, dtype=dtype)
            values = reference.kd_rows(student, *arguments, spec, truth)
            for a, b in zip(in_tiles(student, *arguments, spec, ours, widths), values, strict=True):
                compare.assert_value(a, b)
            assert compare.relative_error(ours, truth) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_a_label_outside_the_vocabulary_is_nan_in_tiles_too() -> None:
    student, teacher = cases.logits("far", 2, 300)
    labels, scale = torch.tensor([300, 5]), torch.ones(2)
    grad = torch.empty(2, 300)
    spec = cases.spec(TABLE["forward_kl"](), 300)
    _, hard = in_tiles(student, teacher, labels, scale, scale, spec, grad, (200, 100))
    assert hard[0].isnan()
    assert grad[0].isnan().all()
    assert hard[1].isfinite()
    assert grad[1].isfinite().all()


def layouts(rows: Tensor) -> dict[str, Tensor]:
    """`[6, V]` rows as `[2, 3, V]` views of many layouts."""
    vocab, rows = rows.shape[-1], rows.clone()
    wide = torch.full((2, 5, vocab + 7), torch.nan)
    wide[:, :3, :vocab] = rows.view(2, 3, vocab)
    transposed = rows.view(2, 3, vocab).transpose(0, 1).contiguous().transpose(0, 1)
    strided_last = torch.full((2, 3, 2 * vocab), torch.nan)
    strided_last[..., ::2] = rows.view(2, 3, vocab)
    return {
        "contiguous": rows.view(2, 3, vocab),
        "slice": wide[:, :3, :vocab],
        "transposed": transposed,
        "last dimension strided": strided_last[..., ::2],
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts_give_the_same_bits(reduction: str, inplace: bool) -> None:
    if inplace and reduction == "none":
        pytest.skip("refused by KDLoss")
    student, teacher = cases.logits("far", 6, 1531)
    labels = cases.labels(6, 1531).view(2, 3)
    results = []
    for name, view in layouts(student).items():
        if inplace and name == "last dimension strided":
            continue
        for other in layouts(teacher).values():
            leaf = view.detach().requires_grad_() if not inplace else layouts(student)[name].requires_grad_()
            loss = fastkd.KDLoss(2.0, reduction=reduction, inplace=inplace)(leaf, other, labels)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad.contiguous()))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(g, results[0][1]) for loss, g in results)
    assert results[0][1].abs().max() > 0


def test_expanded_inputs() -> None:
    student, teacher = cases.logits("far", 1, 1531)
    labels = cases.labels(1, 1531).expand(4)
    leaf = student.requires_grad_()
    loss = fastkd.KDLoss(2.0)(leaf.expand(4, -1), teacher.expand(4, -1), labels)
    loss.backward()
    single = student.detach().clone().requires_grad_()
    expected = fastkd.KDLoss(2.0)(single, teacher, labels[:1])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(leaf.grad, single.grad)


def test_layout_of_rows() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert row_layout(x) == (24, 24, 0, 5)
    assert row_layout(x[:, :2]) == (16, 8, 60, 5)
    assert row_layout(x[:, :2, :3]) is None
    assert row_layout(x[..., ::2]) is None
    assert row_layout(torch.empty(5)) == (1, 1, 0, 5)
    assert row_layout(torch.empty(1, 5).expand(7, 5)) == (7, 7, 0, 0)


@pytest.mark.parametrize("divergence", TABLE)
def test_threads_give_the_same_bits(divergence: str) -> None:
    student, teacher = cases.logits("far", 37, 3001)
    labels, scale = cases.labels(37, 3001), torch.rand(37)
    spec = cases.spec(TABLE[divergence](), 3001, 1.5)
    outcomes = []
    for threads in (1, 2, 4, 1, 2, 4):
        torch.set_num_threads(threads)
        grad = torch.empty_like(student)
        outcomes.append((*cpu.kd_rows(student, teacher, labels, scale, scale, spec, grad), grad))
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


def test_labels_outside_the_vocabulary_are_never_read() -> None:
    """The kernel's own guard, below the check that raises: NaN, not a number from somewhere in memory."""
    student, teacher = cases.logits("far", 3, 100)
    scale, grad = torch.ones(3), torch.empty_like(student)
    labels = torch.tensor([10**12, -5, 99])
    spec = cases.spec(TABLE["forward_kl"](), 100)
    soft, hard = cpu.kd_rows(student, teacher, labels, scale, scale, spec, grad)
    assert hard.isnan().tolist() == [True, True, False]
    assert soft.isfinite().all()
    assert grad.isnan().all(-1).tolist() == [True, True, False]


@pytest.mark.large
def test_rows_beyond_two_to_the_31() -> None:
    """The last row of a tensor of more than 2³¹ elements: offsets are 64-bit from end to end."""
    vocab = 1 << 16
    rows = (1 << 15) + 2
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    assert student.numel() > 1 << 31
    last_student, last_teacher = cases.logits("far", 1, vocab, torch.bfloat16)
    student[-1] = last_student[0]
    weights = torch.zeros(rows)
    weights[-1] = 1
    leaf = student.requires_grad_()
    labels = torch.full((rows,), 5)
    kd = fastkd.KDLoss(2.0, inplace=True)
    loss = kd(leaf, last_teacher.expand(rows, vocab), labels, weights=weights)
    loss.backward()
    small = last_student.clone().requires_grad_()
    expected = fastkd.KDLoss(2.0)(small, last_teacher, labels[:1])
    expected.backward()
    assert loss.item() == expected.item()
    assert torch.equal(leaf.grad[-1], small.grad[0])
    assert leaf.grad[0].abs().max() == 0
