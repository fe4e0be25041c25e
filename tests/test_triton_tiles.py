"""The Triton loss kernels on tiles of the vocabulary, interpreted on CPU tensors."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence, resolve
from fastkd.kernels import gpu
from fastkd.rows import Tile
from tests import cases, compare
from tests.triton_interpreter import interpreted
from tests.triton_judge import judge, kd_rows_in_tiles

WIDTHS = (256, 256, 256, 132)
SOME = (fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.JSD(), fastkd.AlphaBeta(), fastkd.MSE())


@pytest.mark.parametrize("divergence", cases.KINDS, ids=str)
def test_tiles(divergence: Divergence) -> None:
    """A label in every tile, the first and the last column among them; of one row a tile without any probability."""
    student, teacher = cases.logits("far", 4, 900)
    student[2, :256] = teacher[2, :256] = -torch.inf
    judge(student, teacher, divergence, labels=torch.tensor([0, 511, 512, 899]), widths=WIDTHS)


@pytest.mark.parametrize("family", ["near_equal", "peaked", "flat", "offset"])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_tiles_of_any_width_and_family(divergence: Divergence, family: str) -> None:
    judge(*cases.logits(family, 2, 900), divergence, hard=False, widths=(1, 7, 500, 256, 136))


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.3, 1.3), (1.0, 1.0), (1.5, 3.0)])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_temperatures_of_tiles(divergence: Divergence, temperature: float, teacher_temperature: float) -> None:
    pair = cases.logits("far", 2, 900)
    judge(*pair, divergence, temperature=temperature, teacher_temperature=teacher_temperature, widths=WIDTHS)


@pytest.mark.parametrize("divergence", [*SOME, fastkd.TVD()], ids=str)
def test_low_precision_gradient_of_tiles(divergence: Divergence) -> None:
    judge(*cases.logits("far", 2, 900), divergence, grad=torch.empty(2, 900, dtype=torch.bfloat16), widths=WIDTHS)


def test_hard_term_alone_in_tiles() -> None:
    student, _ = cases.logits("far", 3, 900)
    labels, scale, spec = torch.tensor([255, 256, 899]), torch.tensor([0.5, 1.0, 2.0]), cases.spec(fastkd.JSD(), 900)
    grads = [torch.empty(3, 900, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
    _, truth = reference.kd_rows(student.double(), None, labels, None, scale, spec, grads[2])
    reference.kd_rows(student, None, labels, None, scale, spec, grads[1])
    with interpreted():
        _, hard = kd_rows_in_tiles(student, None, labels, None, scale, spec, grads[0], WIDTHS)
    compare.assert_value(hard, truth)
    compare.assert_gradient(*grads)


@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_skipped_rows_and_wrong_labels_in_tiles(divergence: Divergence) -> None:
    student, teacher = cases.logits("far", 6, 900)
    student[3], teacher[3], teacher[2] = torch.nan, torch.inf, torch.nan
    labels = torch.tensor([0, -100, 700, -100, 900, -1])
    soft_scale, hard_scale = torch.tensor([1.0, 0.5, 0, 0, 1, 0]), torch.tensor([2.0, 0, 0.7, 0, 1, 1])
    spec = cases.spec(divergence, 900)
    grads = [torch.full_like(student, 9.0) for _ in range(2)]
    truth = reference.kd_rows(student, teacher, labels, soft_scale, hard_scale, spec, grads[1])
    with interpreted():
        ours = kd_rows_in_tiles(student, teacher, labels, soft_scale, hard_scale, spec, grads[0], WIDTHS)
    for a, b in zip(ours, truth, strict=True):
        compare.assert_value(a, b)
    for i in range(3):
        assert compare.relative_error(grads[0][i], grads[1][i]) < 1e-6
    assert (grads[0][3] == 0).all()
    assert grads[0][4:].isnan().all()


@pytest.mark.parametrize("divergence", cases.NAMES)
def test_one_sided_infinities_in_tiles(divergence: str) -> None:
    """Also where one side's whole tile is without probability, so that only the other has a maximum yet."""
    student, teacher = cases.logits("far", 4, 300)
    student[0, 7] = teacher[1, 209] = -torch.inf
    student[2, :100] = teacher[3, :100] = -torch.inf
    spec, scale = cases.spec(resolve(divergence), 300), torch.ones(4)
    truth, _ = reference.kd_rows(student.double(), teacher.double(), None, scale, None, spec, None)
    with interpreted():
        grad = torch.empty_like(student)
        ours, _ = kd_rows_in_tiles(student, teacher, None, scale, None, spec, grad, (100, 100, 100))
    compare.assert_value(ours, truth)


@pytest.mark.parametrize("divergence", cases.KINDS, ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_nan_is_never_hidden_in_tiles(divergence: Divergence, side: int) -> None:
    """The tiles before and after the one with the NaN have a gradient of NaN somewhere too, and no other row has."""
    pair = cases.logits("far", 2, 300)
    pair[side][1, 150] = torch.nan
    grad, scale = torch.empty_like(pair[0]), torch.ones(2)
    with interpreted():
        spec = cases.spec(divergence, 300)
        soft, _ = kd_rows_in_tiles(*pair, None, scale, None, spec, grad, (100, 100, 100))
    assert soft.isnan().tolist() == [False, True]
    assert grad.view(2, 3, 100).isnan().any(-1).tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("column", [100, 850])
@pytest.mark.parametrize("divergence", [fastkd.JSD(), fastkd.AlphaBeta()], ids=str)
def test_a_confident_row_in_tiles(divergence: Divergence, column: int) -> None:
    """Slopes are centered at the likeliest token, be it in the first tile or in the last."""
    student, teacher = cases.logits("far", 2, 900)
    student[:, column] += 30
    teacher[:, column] += 27
    judge(student, teacher, divergence, temperature=1.0, hard=False, widths=WIDTHS)


@pytest.mark.parametrize("rising", [False, True])
def test_many_tiles_lose_no_more_than_a_whole_row(rising: bool) -> None:
    """The student within 1e-4 of the teacher. The sums' difference would be lost if only the sums were carried on."""
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(2, 4096, generator=generator)
    if rising:
        teacher = teacher.sort(-1).values  # every tile has a new maximum
    student = teacher + 1e-4 * torch.randn(2, 4096, generator=generator)
    spec, scale = cases.spec(fastkd.ForwardKL(), 4096, 1.3), torch.ones(2)
    grads = [torch.empty(2, 4096, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
    truth, _ = reference.kd_rows(student.double(), teacher.double(), None, scale.double(), None, spec, grads[2])
    with interpreted():
        whole, _ = gpu.kd_rows(student, teacher, None, scale, None, spec, grads[1])
        tiled, _ = kd_rows_in_tiles(student, teacher, None, scale, None, spec, grads[0], (128,) * 32)
    compare.assert_value(tiled, truth, whole)
    compare.assert_gradient(*grads)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_every_stage_reads_a_tile_once(divergence: str) -> None:
    student, teacher = cases.logits("far", 2, 300)
    state, grad, scale = gpu.tile_state(2, student.device), torch.empty_like(student), torch.ones(2)
    spec = cases.spec(resolve(divergence), 300)
    for stage in ("statistics", "terms", "gradient") if divergence == "jsd" else ("statistics", "gradient"):
        with interpreted() as trace:
            out = grad if stage == "gradient" else None
            gpu.kd_rows(student, teacher, None, scale, None, spec, out, Tile(stage, 0, state))
        assert trace.loads(student).unique().tolist() == trace.loads(teacher).unique().tolist() == [1]
        assert trace.stores(state).any() == (stage != "gradient")
        if out is not None:
            assert trace.stores(grad).unique().tolist() == [1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("divergence", SOME, ids=str)
def test_chunks_of_fp32_logits_and_a_low_precision_gradient(divergence: Divergence, padded: bool) -> None:
    """Logits computed for a chunk of tokens, at an odd vocabulary; rows padded to whole vectors or not at all."""
    sides = []
    for side in cases.logits("far", 3, 1003):
        buffer = torch.full((3, 1004), torch.nan)
        sides.append(buffer[:, :1003].copy_(side) if padded else side)
    judge(*sides, divergence, grad=torch.empty(3, 1003, dtype=torch.bfloat16))
    judge(*sides, divergence, grad=torch.empty(3, 1004, dtype=torch.bfloat16)[:, :1003])
