"""The Triton kernels interpreted on CPU tensors: values against float64, and every access to memory.

What a GPU would add, speed and the hardware's own exp2 and log2, `test_gpu.py` tests where there is one.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.backend import RowSpec, Tile
from fastkd.divergences import TABLE, Divergence
from fastkd.kernels import gpu
from fastkd.kernels.gpu.blocks import Rows, row_offset
from tests import cases, compare
from tests.triton_interpreter import Fault, Trace, interpreted


def judge(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    *,
    temperature: float = 2.0,
    hard: bool = True,
    labels: Tensor | None = None,
    grad: Tensor | None = None,
    widths: tuple[int, ...] = (),
    **changes: float,
) -> Trace:
    """Interpret the kernel and hold value and gradient to the numerics contract. `widths` are those of tiles."""
    vocab, rows = student.shape[-1], student.numel() // student.shape[-1]
    if hard and labels is None:
        labels = cases.labels(rows, vocab)
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(0)) + 0.5
    spec = cases.spec(divergence, vocab, temperature, **changes)
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        s, t = student.to(dtype).reshape(rows, vocab), teacher.to(dtype).reshape(rows, vocab)
        out = torch.empty(s.shape, dtype=dtype)
        values = reference.kd_rows(s, t, labels, scale, scale if hard else None, spec, out)
        outcomes.append((*values, out))
    eager, truth = outcomes
    grad = torch.empty_like(student) if grad is None else grad
    arguments = (student, teacher, labels, scale, scale if hard else None, spec, grad)
    with interpreted() as trace:
        soft, cross_entropy = kd_rows_in_tiles(*arguments, widths) if widths else gpu.kd_rows(*arguments)
    compare.assert_value(soft, truth[0], eager[0], "soft loss")
    compare.assert_value(cross_entropy, truth[1], eager[1], "hard loss")
    compare.assert_gradient(grad.reshape(rows, vocab), eager[2].to(grad.dtype), truth[2])
    return trace


def kd_rows_in_tiles(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
    widths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """`gpu.kd_rows` on vocabulary tiles that are made anew for every stage, the gradient in place if its dtype allows.

    The tiles lie in buffers as wide as the widest, and all that is not yet written is NaN.
    """
    terms = soft_scale is not None and TABLE[spec.divergence].normalised
    state = gpu.tile_state(len(student), student.device).fill_(torch.nan)
    values = torch.empty(0), torch.empty(0)
    for stage in ("statistics", "terms", "gradient"):
        if (stage == "terms" and not terms) or (stage == "gradient" and grad is None):
            continue
        for first, width in zip(accumulate(widths, initial=0), widths, strict=False):
            columns, sides = slice(first, first + width), []
            for side in (student, teacher):
                buffer = torch.full((len(student), max(widths)), torch.nan)
                sides.append(None if side is None else buffer[:, :width].copy_(side[:, columns]))
            out = None
            if stage == "gradient" and grad is not None:
                out = sides[0] if grad.dtype == student.dtype else torch.full_like(grad[:, columns], torch.nan)
            computed = gpu.kd_rows(
                sides[0], sides[1], labels, soft_scale, hard_scale, spec, out, Tile(stage, first, state)
            )
            if out is not None and grad is not None:
                grad[:, columns] = out
            else:
                values = computed
    return values


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_contract(divergence: Divergence, family: str) -> None:
    judge(*cases.logits(family, 1, 2500), divergence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", cases.DIVERGENCES[:9], ids=str)
def test_low_precision(divergence: Divergence, dtype: torch.dtype) -> None:
    for family in ("near_equal", "far", "flat"):
        judge(*cases.logits(family, 1, 2500, dtype), divergence)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_a_real_vocabulary(divergence: str, dtype: torch.dtype) -> None:
    judge(*cases.logits("far", 2, 50257, dtype), TABLE[divergence]())


@pytest.mark.parametrize("temperature", [1.0, 1.3, 3.0])
@pytest.mark.parametrize("divergence", cases.DIVERGENCES[:9], ids=str)
def test_temperatures(divergence: Divergence, temperature: float) -> None:
    judge(*cases.logits("far", 2, 900), divergence, temperature=temperature)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES[:9], ids=str)
def test_soft_term_alone(divergence: Divergence) -> None:
    judge(*cases.logits("far", 2, 900), divergence, hard=False)


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [*(("forward_kl", dtype) for dtype in cases.DTYPES), ("jsd", torch.bfloat16), ("mse", torch.float32)],
    ids=str,
)
def test_edges_and_the_memory_around_them(divergence: str, dtype: torch.dtype) -> None:
    """Every tail at several misalignments. The interpreter faults on any access outside the views it was given."""
    step = 128 * 2 * 16 // dtype.itemsize  # columns: 128 threads, 2 vectors of 16 bytes (kernels/gpu/blocks.py)
    for vocab in (1, 2, 7, 8, 9, step - 1, step, step + 1, step + 13):
        for shift in (0, 3):
            sides = []
            for side in cases.logits("far", 3, vocab, dtype):
                memory = torch.full((shift + 3 * vocab + 40,), torch.nan, dtype=dtype)
                view = memory[shift : shift + 3 * vocab].view(3, vocab)
                view.copy_(side)
                sides.append(view)
            memory = torch.full((shift + 3 * vocab + 40,), -7.0, dtype=dtype)
            judge(*sides, TABLE[divergence](), grad=memory[shift : shift + 3 * vocab].view(3, vocab))
            assert (memory[:shift] == -7).all()
            assert (memory[shift + 3 * vocab :] == -7).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_rows_that_are_not_aligned_alike(divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Student and teacher of different dtype, width and stride: the slower loads, the same numbers."""
    student, teacher = cases.logits("far", 6, 1003)
    wide = torch.full((2, 4, 1011), torch.nan, dtype=dtypes[1])
    wide[:, :3, :1003] = teacher.view(2, 3, 1003)
    judge(student.view(2, 3, 1003).to(dtypes[0]), wide[:, :3, :1003], TABLE[divergence]())


@pytest.mark.parametrize("vocab", [1000, 1001, 1004])
def test_two_levels_of_strides(vocab: int) -> None:
    """Rows of `[2, 3, V]` against rows of `[3, 2, V]`, each a slice: equal strides do not mean equal alignment."""
    student, teacher = cases.logits("far", 6, vocab, torch.bfloat16)
    views = []
    for side, shape in ((student, (2, 3)), (teacher, (3, 2)), (student, (2, 3))):
        memory = torch.full((shape[0], 5, vocab), torch.nan, dtype=side.dtype)
        memory[:, : shape[1]] = side.view(*shape, vocab)
        views.append(memory[:, : shape[1]])
    judge(views[0], views[1], fastkd.ForwardKL(), grad=views[2])


def test_expanded_inputs() -> None:
    """One row read by three programs, each writing its own gradient."""
    student, teacher = (side.expand(3, -1) for side in cases.logits("far", 1, 777))
    trace = judge(student, teacher, fastkd.ForwardKL(), grad=torch.empty(3, 777))
    assert trace.loads(teacher[0]).sum() == 3 * (2 * 777 + 1)


def test_different_temperatures() -> None:
    student, teacher = cases.logits("far", 2, 900)
    labels, scale = cases.labels(2, 900), torch.ones(2)
    for divergence in cases.DIVERGENCES:
        spec = cases.spec(divergence, 900, 1.5, teacher_temperature=3.0)
        grads = [torch.empty(2, 900, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
        truth = reference.kd_rows(student.double(), teacher.double(), labels, scale, scale, spec, grads[2])
        eager = reference.kd_rows(student, teacher, labels, scale, scale, spec, grads[1])
        with interpreted():
            soft, _ = gpu.kd_rows(student, teacher, labels, scale, scale, spec, grads[0])
        compare.assert_value(soft, truth[0], eager[0], str(divergence))
        compare.assert_gradient(*grads, str(divergence))


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_reads_and_writes(divergence: Divergence) -> None:
    """Student and teacher twice each and the gradient once; a third read where the normalisers come first.

    The label's column is read, and its gradient written, once more.
    """
    student, teacher = cases.logits("far", 3, 3001, torch.bfloat16)
    grad = torch.empty_like(student)
    trace = judge(student, teacher, divergence, hard=False, grad=grad)
    closed = divergence.canonical().name in ("forward_kl", "reverse_kl", "symmetric_kl", "mse")
    for side in (student, teacher):
        assert trace.loads(side).unique().tolist() == [2 if closed else 3]
    assert trace.stores(grad).unique().tolist() == [1]
    assert trace.loads(grad).unique().tolist() == [0]

    trace = judge(student, teacher, divergence, grad=grad)
    labels = cases.labels(3, 3001)
    assert (trace.stores(grad).gather(1, labels[:, None]) == 2).all()
    assert trace.stores(grad).sum() == grad.numel() + 3


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "mse"])
def test_loss_alone_reads_less(divergence: str) -> None:
    student, teacher = cases.logits("far", 2, 1200)
    spec, scale = cases.spec(TABLE[divergence](), 1200), torch.ones(2)
    with interpreted() as trace:
        soft, _ = gpu.kd_rows(student, teacher, None, scale, None, spec, None)
    truth, _ = reference.kd_rows(student.double(), teacher.double(), None, scale.double(), None, spec, None)
    compare.assert_value(soft, truth)
    for side in (student, teacher):
        assert trace.loads(side).unique().tolist() == [2 if divergence == "jsd" else 1]


def test_skipped_rows_and_terms_are_not_read() -> None:
    student, teacher = cases.logits("far", 4, 700)
    student[3], teacher[3], teacher[2] = torch.nan, torch.inf, torch.nan
    labels = cases.labels(4, 700)
    labels[1] = labels[3] = -100
    soft_scale, hard_scale = torch.tensor([1.0, 0.5, 0, 0]), torch.tensor([2.0, 0, 0.7, 0])
    spec = cases.spec(fastkd.ForwardKL(), 700)
    grads = [torch.full_like(student, 9.0) for _ in range(2)]
    truth = reference.kd_rows(student, teacher, labels, soft_scale, hard_scale, spec, grads[1])
    with interpreted() as trace:
        ours = gpu.kd_rows(student, teacher, labels, soft_scale, hard_scale, spec, grads[0])
    for a, b in zip(ours, truth, strict=True):
        compare.assert_value(a, b)
    for i in range(3):
        assert compare.relative_error(grads[0][i], grads[1][i]) < 1e-6
    assert (grads[0][3] == 0).all()
    assert trace.loads(student)[3].sum() == trace.loads(teacher)[2:].sum() == 0


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_masked_vocabulary_and_padding(divergence: Divergence) -> None:
    """−inf columns, whole steps of them included; columns beyond `vocab_size` are never read and get gradient 0."""
    student, teacher = cases.logits("far", 2, 4100)
    student[:, 50:2100] = teacher[:, 50:2100] = -torch.inf
    spec, scale = cases.spec(divergence, 4001), torch.ones(2)
    grads = [
        torch.full(student.shape, torch.nan, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64)
    ]
    truth = reference.kd_rows(student.double(), teacher.double(), None, scale.double(), None, spec, grads[2])
    eager = reference.kd_rows(student, teacher, None, scale, None, spec, grads[1])
    with interpreted() as trace:
        soft, _ = gpu.kd_rows(student, teacher, None, scale, None, spec, grads[0])
    compare.assert_value(soft, truth[0], eager[0])
    compare.assert_gradient(grads[0], grads[1], grads[2])
    assert (grads[0][:, 50:2100] == 0).all()
    assert (grads[0][:, 4001:] == 0).all()
    assert trace.loads(student)[:, 4001:].sum() == trace.loads(teacher)[:, 4001:].sum() == 0


@pytest.mark.parametrize("divergence", TABLE)
def test_one_sided_infinities(divergence: str) -> None:
    """p > 0 beside q = 0 makes forward KL infinite, q > 0 beside p = 0 the reverse; bounded ones stay finite."""
    student, teacher = cases.logits("far", 2, 100)
    student[0, 7] = teacher[1, 9] = -torch.inf
    spec, scale = cases.spec(TABLE[divergence](), 100), torch.ones(2)
    truth, _ = reference.kd_rows(student.double(), teacher.double(), None, scale, None, spec, None)
    with interpreted():
        ours, _ = gpu.kd_rows(student, teacher, None, scale, None, spec, torch.empty_like(student))
    compare.assert_value(ours, truth)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_nan_is_never_hidden(divergence: Divergence, side: int) -> None:
    for column in (0, 500, 998):
        pair = cases.logits("far", 2, 999)
        pair[side][1, column] = torch.nan
        grad, scale = torch.empty_like(pair[0]), torch.ones(2)
        with interpreted():
            soft, _ = gpu.kd_rows(*pair, None, scale, None, cases.spec(divergence, 999), grad)
        assert soft.isnan().tolist() == [False, True]
        assert grad[1].isnan().any()
        assert grad[0].isfinite().all()


def test_labels_outside_the_vocabulary_are_never_read() -> None:
    student, teacher = cases.logits("far", 3, 100)
    grad, scale = torch.empty_like(student), torch.ones(3)
    labels = torch.tensor([10**12, -5, 99])
    with interpreted():
        _, hard = gpu.kd_rows(student, teacher, labels, scale, scale, cases.spec(fastkd.ForwardKL(), 100), grad)
    assert hard.isnan().tolist() == [True, True, False]
    assert grad.isnan().any(-1).tolist() == [True, True, False]


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("settings", [{}, {"inplace": True}, {"reduction": "none", "shift": True}], ids=str)
def test_through_the_call(divergence: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """KDLoss end to end on the interpreted backend: autograd, masks, shift, in place, a scaled second backward."""
    from fastkd import backend

    student, teacher = (x.view(2, 3, 300) for x in cases.logits("far", 6, 300))
    labels = cases.labels(6, 300, ignored=(1,)).view(2, 3)
    kd = fastkd.KDLoss(2.0, divergence=divergence, **settings)  # type: ignore[arg-type]
    outcomes = []
    for name in ("reference", "triton"):
        monkeypatch.setattr(backend, "_forced", name)
        leaf = student.clone().requires_grad_()
        with interpreted():
            loss = kd(leaf * 1, teacher, labels)
            first = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0].clone()
            (second,) = torch.autograd.grad(3 * loss.sum(), leaf)
        torch.testing.assert_close(second, 3 * first)
        outcomes.append((loss.detach(), first))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=1e-4, atol=1e-7)


# --- vocabulary tiles -------------------------------------------------------------------------------------------

WIDTHS = (256, 256, 256, 132)
SOME = (fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.JSD(), fastkd.AlphaBeta(), fastkd.MSE())


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
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


@pytest.mark.parametrize("divergence", TABLE)
def test_one_sided_infinities_in_tiles(divergence: str) -> None:
    """Also where one side's whole tile is without probability, so that only the other has a maximum yet."""
    student, teacher = cases.logits("far", 4, 300)
    student[0, 7] = teacher[1, 209] = -torch.inf
    student[2, :100] = teacher[3, :100] = -torch.inf
    spec, scale = cases.spec(TABLE[divergence](), 300), torch.ones(4)
    truth, _ = reference.kd_rows(student.double(), teacher.double(), None, scale, None, spec, None)
    with interpreted():
        grad = torch.empty_like(student)
        ours, _ = kd_rows_in_tiles(student, teacher, None, scale, None, spec, grad, (100, 100, 100))
    compare.assert_value(ours, truth)


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
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
    spec = cases.spec(TABLE[divergence](), 300)
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


# --- statistics and log-softmax ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 9, 2050])
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_statistics_and_log_softmax(family: str, vocab: int, temperature: float) -> None:
    logits, upstream = cases.logits(family, 3, vocab)[0], torch.randn(3, vocab)
    labels = cases.labels(3, vocab, ignored=(1,))
    with interpreted() as trace:
        log_sum_exp, entropy, argmax, picked = gpu.row_statistics(logits, labels, temperature)
    assert trace.loads(logits).sum() == logits.numel() + 2  # once, and the labels' columns
    exact = torch.log_softmax(logits.double() / temperature, -1)
    eager = torch.log_softmax(logits / temperature, -1)
    compare.assert_value(log_sum_exp, torch.logsumexp(logits.double() / temperature, -1))
    entropies = [-(x.exp() * x).nan_to_num(0.0).sum(-1) for x in (exact, eager)]
    compare.assert_value(entropy, entropies[0], entropies[1])
    assert argmax.tolist() == logits.argmax(-1).tolist()
    assert picked[1].isnan()
    for i in (0, 2):
        compare.assert_value(picked[i], exact[i, labels[i]], eager[i, labels[i]])

    out, grad = torch.empty_like(logits), torch.empty_like(logits)
    with interpreted():
        normaliser = gpu.log_softmax(logits, temperature, out)
        gpu.log_softmax_backward(upstream, logits, normaliser, temperature, grad)
    assert normaliser.shape == (3, 2)  # as the operator's fake says
    compare.assert_gradient(out, eager, exact, "log-probabilities")
    q, above = exact.exp(), upstream.double()
    truth = (above - q * above.sum(-1, keepdim=True)) / temperature
    slope = (upstream - eager.exp() * upstream.sum(-1, keepdim=True)) / temperature
    compare.assert_gradient(grad, slope, truth)


@pytest.mark.parametrize("count", [3, 4096, 4099, 4112, 5997])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scale(dtype: torch.dtype, count: int) -> None:
    """In place by a scalar on the device, whole vectors and what is left; by 1 without touching the gradient."""
    original = torch.randn(1, count).to(dtype)
    for factor, touched in ((0.3, 1), (1.0, 0)):
        grad = original.clone()
        with interpreted() as trace:
            assert gpu.scale_(grad, torch.tensor(factor)) is grad
        assert torch.equal(grad, (original.float() * factor).to(dtype))
        assert trace.loads(grad).unique().tolist() == trace.stores(grad).unique().tolist() == [touched]
    strided = original.clone()[:, ::2]
    assert torch.equal(gpu.scale_(strided, torch.tensor(2.0)), original[:, ::2] * 2)


@triton.jit
def _offset(rows, row, out):
    tl.store(out, row_offset(rows, tl.program_id(0) + row))


def test_offsets_beyond_two_to_the_31() -> None:
    layout, out = Rows(torch.empty(1), 3, 2**33, 2**31 - 1), torch.empty(1, dtype=torch.int64)
    with interpreted():
        _offset[(1,)](layout, 2_000_000_000, out)
    assert out.item() == 2_000_000_000 // 3 * 2**33 + 2_000_000_000 % 3 * (2**31 - 1)


# --- the checker itself -----------------------------------------------------------------------------------------


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
    tl.store(target + offsets, tl.load(source + offsets) * 2)


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


def test_the_judge_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of the wrong temperature, or none at all, does not pass the contract."""
    student, teacher = cases.logits("far", 2, 300)
    original = gpu.kd_rows

    def no_gradient(*arguments: object) -> object:
        result = original(*arguments)  # type: ignore[arg-type]
        arguments[-1].zero_()  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(gpu, "kd_rows", no_gradient)
    with pytest.raises(AssertionError, match="gradient"):
        judge(student, teacher, fastkd.ForwardKL())
