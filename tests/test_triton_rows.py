"""The Triton loss kernels on whole rows, interpreted on CPU tensors: values against float64, every access to memory.

What a GPU would add, speed and the hardware's own exp2 and log2, `test_gpu.py` tests where there is one.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import fastkd
from fastkd import reference
from fastkd.divergences import TABLE, Divergence
from fastkd.kernels import gpu
from fastkd.kernels.gpu.blocks import row_offset
from fastkd.kernels.gpu.launch import Rows
from fastkd.sparse import sparse_rows
from tests import cases, compare
from tests.sparse_targets import kept
from tests.triton_interpreter import interpreted
from tests.triton_judge import judge


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
    step = 128 * 2 * 16 // dtype.itemsize  # columns: 128 threads, 2 vectors of 16 bytes (kernels/gpu/launch.py)
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


@pytest.mark.parametrize("divergence", cases.KINDS, ids=str)
def test_reads_and_writes(divergence: Divergence) -> None:
    """Student and teacher twice each and the gradient once; a third read where the normalisers come first.

    The label's column is read, and its gradient written, once more.
    """
    student, teacher = cases.logits("far", 3, 3001, torch.bfloat16)
    grad = torch.empty_like(student)
    trace = judge(student, teacher, divergence, hard=False, grad=grad)
    closed = not divergence.canonical().normalised
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


@pytest.mark.parametrize("divergence", cases.KINDS, ids=str)
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


@pytest.mark.parametrize("divergence", cases.KINDS, ids=str)
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


def test_such_labels_spoil_no_gradient_in_which_they_have_no_weight() -> None:
    student, teacher = cases.logits("far", 3, 100)
    scale, labels = torch.ones(3), torch.tensor([10**12, -5, 99])
    for target in (teacher, sparse_rows(kept(teacher, 5), scale, 100, torch.float32)):
        outcomes = []
        for beside in (scale, None):
            grad = torch.empty_like(student)
            spec = cases.spec(fastkd.ForwardKL(), 100, hard_weight=0.0)
            with interpreted():
                _, hard = gpu.kd_rows(student, target, None if beside is None else labels, scale, beside, spec, grad)
            outcomes.append((hard, grad))
        assert outcomes[0][0].isnan().tolist() == [True, True, False]
        torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
        assert outcomes[1][1].abs().max() > 0.01


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
        monkeypatch.setattr(backend, "automatic", lambda *_, name=name: name)
        leaf = student.clone().requires_grad_()
        with interpreted():
            loss = kd(leaf * 1, teacher, labels)
            first = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0].clone()
            (second,) = torch.autograd.grad(3 * loss.sum(), leaf)
        torch.testing.assert_close(second, 3 * first)
        outcomes.append((loss.detach(), first))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=1e-4, atol=1e-7)


@triton.jit
def _offset(rows, row, out):
    tl.store(out, row_offset(rows, tl.program_id(0) + row))


def test_offsets_beyond_two_to_the_31() -> None:
    layout, out = Rows(torch.empty(1), 3, 2**33, 2**31 - 1), torch.empty(1, dtype=torch.int64)
    with interpreted():
        _offset[(1,)](layout, 2_000_000_000, out)
    assert out.item() == 2_000_000_000 // 3 * 2**33 + 2_000_000_000 % 3 * (2**31 - 1)


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
