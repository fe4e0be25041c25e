"""The call: what KDLoss promises beyond the value of one row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.backend import warn_once
from tests import cases, compare

B, S, V = 3, 5, 130


def batch(dtype: torch.dtype = torch.float32, vocab: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher `[B, S, vocab]`, labels `[B, S]` with two ignored."""
    student, teacher = cases.logits("far", B * S, vocab, dtype)
    labels = cases.labels(B * S, vocab, ignored=(2, 7))
    return student.view(B, S, vocab).requires_grad_(), teacher.view(B, S, vocab), labels.view(B, S)


def rows(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """Textbook soft (T² included) and hard value of every token, by autograd."""
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    soft = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    hard = F.cross_entropy(student.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return soft, hard


def agrees(ours: Tensor, expected: Tensor, student: Tensor, upstream: Tensor | None = None) -> None:
    """Same value, and same gradient for the given upstream."""
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours, student, upstream, retain_graph=True)
    (truth,) = torch.autograd.grad(expected, student, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-7)
    assert truth.abs().max() > 1e-6


def test_mean_is_over_unmasked_tokens(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = rows(student, teacher, labels)
    mask = labels != -100
    expected = (0.3 * soft + 0.9 * hard)[mask].mean()
    agrees(fastkd.KDLoss(2.0, soft_weight=0.3, hard_weight=0.9)(student, teacher, labels), expected, student)


def test_golden_example(backend: str) -> None:
    """Four tokens over five logits, the worked example of a published explainer; values from float64 arithmetic."""
    teacher = [[2, 1, 4, 0.5, 0.3], [0.5, 3, 1, 0.2, 0.3], [0.1, 0.2, 0.5, 4.5, 0.7], [3.5, 1.5, 0.1, 0, 0.2]]
    student = [
        [1.9, 1.1, 3.9, 0.6, 0.4],
        [0.6, 2.9, 1.1, 0.3, 0.4],
        [0.2, 0.1, 0.6, 4.4, 0.8],
        [3.4, 1.4, 0.2, 0.1, 0.3],
    ]
    s, t = torch.tensor(student), torch.tensor(teacher)
    labels = torch.tensor([2, 1, 3, 0])
    for temperature, soft, hard in GOLDEN:
        parts = fastkd.KDLoss(temperature, return_parts=True)(s, t, labels)
        assert parts.soft.item() == pytest.approx(soft, abs=2e-6)
        assert parts.hard.item() == pytest.approx(hard, rel=1e-6)
        assert parts.loss.item() == pytest.approx(0.5 * soft + 0.5 * hard, abs=1e-6)


# (temperature, T²·KL, cross-entropy): means over the four tokens.
GOLDEN = [
    (1.0, 0.002038845865, 0.222642102933),
    (2.0, 0.004296823083, 0.222642102933),
    (4.0, 0.004788818118, 0.222642102933),
]


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "none"])
def test_reductions(backend: str, reduction: str) -> None:
    student, teacher, labels = batch()
    soft, hard = rows(student, teacher, labels)
    tokens = torch.where(labels != -100, 0.5 * soft + 0.5 * hard, 0.0)
    expected = {"sum": tokens.sum(), "batchmean": tokens.sum() / B, "none": tokens}[reduction]
    upstream = torch.rand(B, S) if reduction == "none" else None
    agrees(fastkd.KDLoss(2.0, reduction=reduction)(student, teacher, labels), expected, student, upstream)


def test_weights_and_their_divisor(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = rows(student, teacher, labels)
    weights = torch.rand(B, S)
    scale = weights * (labels != -100)
    expected = ((0.5 * soft + 0.5 * hard) * scale).sum() / scale.sum()
    agrees(fastkd.KDLoss(2.0)(student, teacher, labels, weights=weights), expected, student)


@pytest.mark.parametrize("num_items", [40, 40.0, torch.tensor(40), torch.tensor([40.0])], ids=repr)
def test_num_items_makes_accumulation_exact(backend: str, num_items: float | Tensor) -> None:
    student, teacher, labels = batch()
    soft, hard = rows(student, teacher, labels)
    expected = ((0.5 * soft + 0.5 * hard) * (labels != -100)).sum() / 40
    agrees(fastkd.KDLoss(2.0)(student, teacher, labels, num_items=num_items), expected, student)


def test_micro_batches_equal_one_batch(backend: str) -> None:
    student, teacher, labels = batch()
    kd = fastkd.KDLoss(2.0)
    count = (labels != -100).sum()
    whole = torch.autograd.grad(kd(student, teacher, labels), student)[0]
    for i in range(B):
        kd(student[i], teacher[i], labels[i], num_items=count).backward()
    torch.testing.assert_close(student.grad, whole, rtol=1e-6, atol=1e-9)


def test_shift_scores_the_next_token_in_both_terms(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = rows(student[:, :-1], teacher[:, :-1], labels[:, 1:].contiguous())
    mask = labels[:, 1:] != -100
    weights = torch.rand(B, S)
    tokens = 0.5 * soft + 0.5 * hard
    agrees(fastkd.KDLoss(2.0, shift=True)(student, teacher, labels), tokens[mask].mean(), student)
    scale = weights[:, 1:] * mask
    agrees(
        fastkd.KDLoss(2.0, shift=True)(student, teacher, labels, weights=weights),
        (tokens * scale).sum() / scale.sum(),
        student,
    )
    per_token = fastkd.KDLoss(2.0, shift=True, reduction="none")(student, teacher, labels)
    assert per_token.shape == (B, S - 1)
    agrees(per_token, torch.where(mask, tokens, 0.0), student, torch.rand(B, S - 1))


def test_shift_inverted_is_another_loss() -> None:
    """Were the shift applied to one term only, or the wrong way, these would not differ."""
    student, teacher, labels = batch()
    kd = fastkd.KDLoss(2.0, return_parts=True)
    shifted = fastkd.KDLoss(2.0, shift=True, return_parts=True)(student, teacher, labels)
    backwards = kd(student[:, 1:], teacher[:, 1:], labels[:, :-1])
    plain = kd(student, teacher, labels)
    for other in (backwards, plain):
        assert abs(shifted.soft - other.soft) > 1e-3
        assert abs(shifted.hard - other.hard) > 1e-3


def test_shift_without_labels_leaves_out_the_last_position(backend: str) -> None:
    student, teacher, labels = batch()
    soft, _ = rows(student[:, :-1], teacher[:, :-1], labels[:, 1:].contiguous())
    agrees(fastkd.KDLoss(2.0, soft_weight=1, hard_weight=0, shift=True)(student, teacher), soft.mean(), student)


def test_mask_soft_false_counts_every_position(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = rows(student, teacher, labels)
    expected = 0.5 * soft.mean() + 0.5 * hard[labels != -100].mean()
    agrees(fastkd.KDLoss(2.0, mask_soft=False)(student, teacher, labels), expected, student)


def test_alpha_means_what_alpha_on_says(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = (x[labels != -100].mean() for x in rows(student, teacher, labels))
    agrees(fastkd.KDLoss(2.0, alpha=0.2, alpha_on="soft")(student, teacher, labels), 0.2 * soft + 0.8 * hard, student)
    agrees(fastkd.KDLoss(2.0, alpha=0.2, alpha_on="hard")(student, teacher, labels), 0.8 * soft + 0.2 * hard, student)


def test_parts_are_unweighted_and_detached(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = (x[labels != -100].mean() for x in rows(student, teacher, labels))
    parts = fastkd.KDLoss(2.0, soft_weight=0.25, hard_weight=3.0, return_parts=True)(student, teacher, labels)
    assert isinstance(parts, fastkd.KDParts)
    torch.testing.assert_close(parts.soft, soft.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(parts.hard, hard.detach(), rtol=2e-6, atol=0)
    agrees(parts.loss, 0.25 * soft + 3 * hard, student)
    assert not parts.soft.requires_grad
    assert not parts.hard.requires_grad
    tokens = fastkd.KDLoss(2.0, reduction="none", return_parts=True)(student, teacher, labels)
    assert tokens.soft.shape == tokens.hard.shape == (B, S)


def test_a_term_of_weight_zero_is_reported_but_not_differentiated(backend: str) -> None:
    student, teacher, labels = batch()
    soft, hard = (x[labels != -100].mean() for x in rows(student, teacher, labels))
    parts = fastkd.KDLoss(2.0, soft_weight=1, hard_weight=0, return_parts=True)(student, teacher, labels)
    torch.testing.assert_close(parts.hard, hard.detach(), rtol=2e-6, atol=0)
    agrees(parts.loss, soft, student)


def test_scale_t2_changes_value_and_gradient(backend: str) -> None:
    student, teacher, labels = batch()
    soft, _ = rows(student, teacher, labels, 3.0)
    kd = fastkd.KDLoss(3.0, soft_weight=1, hard_weight=0, scale_t2=False)
    agrees(kd(student, teacher), soft.mean() / 9, student)


def test_teacher_temperature(backend: str) -> None:
    student, teacher, _ = batch()
    log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 3, -1)
    expected = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    kd = fastkd.KDLoss(2.0, teacher_temperature=3.0, soft_weight=1, hard_weight=0)
    agrees(kd(student, teacher), expected, student)


def test_mse_knows_no_temperature(backend: str) -> None:
    student, teacher, _ = batch()
    kd = fastkd.KDLoss(3.0, divergence="mse", soft_weight=1, hard_weight=0)
    agrees(kd(student, teacher), F.mse_loss(student, teacher), student)


def test_hard_term_alone_needs_no_teacher(backend: str) -> None:
    student, _, labels = batch()
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    agrees(fastkd.KDLoss(soft_weight=0, hard_weight=1)(student, None, labels), expected, student)


@pytest.mark.parametrize("divergence", cases.NAMES)
def test_padded_vocabularies_of_different_width(backend: str, divergence: str) -> None:
    student, teacher, labels = batch()
    size = V - 10
    labels = labels.clamp(max=size - 1)
    wide_student = F.pad(student[..., :size].detach(), (0, 14), value=50.0).requires_grad_()
    wide_teacher = F.pad(teacher[..., :size], (0, 3), value=50.0)
    kd = fastkd.KDLoss(2.0, divergence=divergence, vocab_size=size)
    cut = student[..., :size].detach().requires_grad_()
    loss = kd(wide_student, wide_teacher, labels)
    expected = kd(cut, teacher[..., :size], labels)
    loss.backward()
    expected.backward()
    assert loss.item() == expected.item()
    assert wide_student.grad is not None
    assert torch.equal(wide_student.grad[..., :size], cut.grad)
    assert (wide_student.grad[..., size:] == 0).all()


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 2, 3), (2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_shapes(backend: str, leading: tuple[int, ...], reduction: str) -> None:
    student, teacher = torch.randn(*leading, V, requires_grad=True), torch.randn(*leading, V)
    labels = torch.randint(V, leading)
    loss = fastkd.KDLoss(2.0, reduction=reduction)(student, teacher, labels)
    flat = [x.reshape(-1, V) for x in (student.detach(), teacher)]
    flat[0].requires_grad_()
    expected = fastkd.KDLoss(2.0, reduction=reduction)(*flat, labels.reshape(-1))
    assert loss.shape == (leading if reduction == "none" else ())
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss.reshape(-1), expected.reshape(-1), rtol=0, atol=0)
    torch.testing.assert_close(student.grad.reshape(-1, V), flat[0].grad, rtol=0, atol=0)


def test_everything_masked_is_zero_not_nan(backend: str) -> None:
    student, teacher, labels = batch()
    with torch.no_grad():
        student[0, 0, 0] = torch.nan
    for kd in (
        fastkd.KDLoss(2.0),
        fastkd.KDLoss(2.0, reduction="none"),
        fastkd.KDLoss(2.0, inplace=True),
        fastkd.KDLoss(1.5, divergence="jsd", reduction="batchmean"),
    ):
        leaf = student.detach().clone().requires_grad_()
        loss = kd(leaf, teacher, torch.full_like(labels, -100))
        loss.sum().backward()
        assert (loss == 0).all()
        assert (leaf.grad == 0).all()


def test_no_tokens_at_all(backend: str) -> None:
    for leading in ((0,), (2, 0)):
        student = torch.randn(*leading, V, requires_grad=True)
        loss = fastkd.KDLoss(2.0)(student, torch.randn(*leading, V), torch.zeros(leading, dtype=torch.long))
        loss.backward()
        assert loss.item() == 0
        assert student.grad.shape == student.shape


def test_student_without_grad_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.kernels import cpu
    from fastkd.kernels.cpu import at_once

    wanted = []
    rows, whole = cpu.kd_rows, at_once.kd_loss
    monkeypatch.setattr(cpu, "kd_rows", lambda *a: (wanted.append(a[-1] is not None), rows(*a))[1])
    student, teacher, labels = batch()
    for dtype in (torch.float16, torch.float32):  # of which only the second is computed at once
        monkeypatch.setattr(at_once, "kd_loss", lambda *a: (wanted.append(a[6] is not None), whole(*a))[1])
        student = student.detach().to(dtype).requires_grad_()
        wanted.clear()
        loss = fastkd.KDLoss(2.0)(student.detach(), teacher, labels)
        with torch.no_grad():
            fastkd.KDLoss(2.0)(student, teacher, labels)
        fastkd.KDLoss(2.0)(student, teacher, labels)
        assert not loss.requires_grad
        assert wanted == [False, False, True]


def test_teacher_never_gets_a_gradient(backend: str) -> None:
    student, teacher, labels = batch()
    teacher.requires_grad_()
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"teacher requires a gradient.*torch\.no_grad\(\)"):
        fastkd.KDLoss(2.0)(student, teacher, labels).backward()
    assert teacher.grad is None
    loss = fastkd.KDLoss(2.0)(student.detach(), teacher, labels)
    assert not loss.requires_grad


@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"inplace": True}], ids=str)
def test_second_backward_and_any_upstream(backend: str, settings: dict[str, object]) -> None:
    student, teacher, labels = batch()
    expected = torch.autograd.grad(fastkd.KDLoss(2.0, reduction="mean")(student, teacher, labels), student)[0]
    leaf = student.detach().clone().requires_grad_()
    loss = fastkd.KDLoss(2.0, **settings)(leaf * 1, teacher, labels)  # type: ignore[arg-type]
    if settings.get("reduction") == "none":
        loss = loss.sum() / (labels != -100).sum()
    for factor in (1.0, 3.0, 0.0, 0.5):
        (gradient,) = torch.autograd.grad(factor * loss, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(0.25 * loss, leaf)
    torch.testing.assert_close(gradient, 0.25 * expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"inplace": True}], ids=str)
def test_double_backward_raises(backend: str, settings: dict[str, object]) -> None:
    student, teacher, labels = batch()
    loss = fastkd.KDLoss(2.0, **settings)(student * 1, teacher, labels)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss.sum(), student, create_graph=True)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", cases.NAMES)
@pytest.mark.parametrize("vocab", [130, 3001])  # less than one block of the native kernels, and several
def test_in_place_equals_out_of_place(backend: str, divergence: str, dtype: torch.dtype, vocab: int) -> None:
    student, teacher, labels = batch(dtype, vocab)
    expected = fastkd.KDLoss(2.0, divergence=divergence)(student, teacher, labels)
    expected.backward()
    logits = student.detach().clone().requires_grad_()
    storage = logits.data_ptr()
    loss = fastkd.KDLoss(2.0, divergence=divergence, inplace=True)(logits, teacher, labels)
    loss.backward()
    assert loss.item() == expected.item()
    assert torch.equal(logits.grad, student.grad)
    assert logits.grad.data_ptr() == storage


def test_in_place_makes_later_readers_raise(backend: str) -> None:
    student, teacher, labels = batch()
    logits = student * 1
    other = logits.square().sum()  # saves the logits
    fastkd.KDLoss(2.0, inplace=True)(logits, teacher, labels).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_without_grad_leaves_the_logits_alone(backend: str) -> None:
    student, teacher, labels = batch()
    before = student.detach().clone()
    with torch.no_grad():
        fastkd.KDLoss(2.0, inplace=True)(student, teacher, labels)
    assert torch.equal(student, before)


def test_module_and_function_agree(backend: str) -> None:
    student, teacher, labels = batch()
    settings = {"temperature": 3.0, "divergence": fastkd.JSD(beta=0.3), "shift": True}
    module = fastkd.KDLoss(**settings)(student, teacher, labels)  # type: ignore[arg-type]
    assert module.item() == fastkd.kd_loss(student, teacher, labels, **settings).item()
    assert "JSD(beta=0.3)" in repr(fastkd.KDLoss(divergence=fastkd.JSD(beta=0.3)))


def test_settings_may_change_between_calls(backend: str) -> None:
    """Schedules assign to the module; a value that cannot be meant raises at the next call."""
    student, teacher, labels = batch()
    kd = fastkd.KDLoss(2.0)
    kd.temperature, kd.soft_weight, kd.hard_weight = 1.0, 1.0, 0.0
    assert kd(student, teacher, labels).item() == pytest.approx(
        fastkd.kd_loss(student, teacher, labels, temperature=1.0, soft_weight=1.0, hard_weight=0.0).item()
    )
    kd.temperature = -1.0
    with pytest.raises(ValueError, match="temperature"):
        kd(student, teacher, labels)


def test_twice_the_same_bits(backend: str) -> None:
    student, teacher, labels = batch()
    outcomes = []
    for _ in range(2):
        loss = fastkd.KDLoss(1.7)(student, teacher, labels)
        outcomes.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_float64_runs_in_float64() -> None:
    student, teacher, labels = batch(torch.float64)
    soft, hard = (x[labels != -100].mean() for x in rows(student, teacher, labels))
    loss = fastkd.KDLoss(2.0)(student, teacher, labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, 0.5 * soft + 0.5 * hard, rtol=1e-12, atol=0)


def test_low_precision_gradient_has_the_logits_dtype(backend: str) -> None:
    student, teacher, labels = batch(torch.bfloat16)
    loss = fastkd.KDLoss(2.0)(student, teacher, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    exact = student.detach().double().requires_grad_()
    with fastkd.use_backend("reference"):
        fastkd.KDLoss(2.0)(exact, teacher.double(), labels).backward()
    assert compare.relative_error(student.grad, exact.grad) < compare.LOW_PRECISION


@pytest.mark.parametrize("settings", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
def test_loss_scaling_saves_fp16_gradients(backend: str, settings: dict[str, object]) -> None:
    """Gradients below fp16's least number are there once a scaler's upstream gradient multiplies them."""
    student, teacher, labels = batch(torch.float16)
    student = student.detach()
    scale = 2.0**25
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaf = student.to(dtype, copy=True).requires_grad_()
        options = settings if dtype == torch.float16 else {}
        per_token = "reduction" in options  # its mean over 1e8 tokens is in the upstream gradient
        call, upstream = ({}, scale / 1e8) if per_token else ({"num_items": 1e8}, scale)
        with fastkd.use_backend("reference" if dtype == torch.float64 else backend):
            loss = fastkd.KDLoss(2.0, **options)(leaf, teacher, labels, **call)  # type: ignore[arg-type]
            grads += torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    assert grads[1].abs().max() / scale < 6e-8
    assert compare.relative_error(grads[0], grads[1]) < 1e-3
