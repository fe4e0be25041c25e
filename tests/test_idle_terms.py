"""`return_parts` reports a term of weight 0 and leaves the gradient alone, whatever the term holds, on every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.sources import Source, Teacher
from tests import cases, compare
from tests.projections import FEW, TILES, H, N, V, operands


def on_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Source:
    return fastkd.Projection(hidden, weight, bias).logits()


def ghost(hidden: Tensor, weight: Tensor, bias: Tensor) -> Teacher:
    logprobs, ids = torch.log_softmax(on_logits(hidden, weight, bias) / 2, -1).topk(8)  # type: ignore[operator, arg-type]
    return fastkd.SparseTargets(ids, logprobs, kind="ghost", temperature=2.0)


#: Student and teacher as what, beside which settings.
PATHS: dict[str, tuple[Callable[..., Source], Callable[..., Teacher], dict[str, object]]] = {
    "logits": (on_logits, on_logits, {}),
    "none": (on_logits, on_logits, {"reduction": "none"}),
    "in place": (on_logits, on_logits, {"inplace": True}),
    "chunks": (fastkd.Projection, fastkd.Projection, {"memory_budget": FEW}),
    "tiles": (fastkd.Projection, fastkd.Projection, {"memory_budget": TILES}),
    "projection, none": (fastkd.Projection, fastkd.Projection, {"reduction": "none"}),
    "logits beside a projection, in place": (on_logits, fastkd.Projection, {"inplace": True}),
    "sparse": (on_logits, ghost, {}),
    "sparse beside a projection": (fastkd.Projection, ghost, {"memory_budget": TILES}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("idle", ["soft", "hard"])
def test_a_term_of_weight_zero_stays_out_of_the_gradient(
    path: str, idle: str, backend: str, few_tokens_stand_for_many: None
) -> None:
    if backend == "reference" and PATHS[path][2].get("memory_budget") == TILES:
        pytest.skip("the reference takes no tiles")
    student_as, teacher_as, settings = PATHS[path]
    student, teacher = operands()
    labels = cases.labels(N, V, ignored=(3,))
    weights = {"soft_weight": 0.0, "hard_weight": 1.0} if idle == "soft" else {"soft_weight": 1.0, "hard_weight": 0.0}

    def outcome(broken: bool, parts: bool) -> tuple[Tensor, fastkd.KDParts | None, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in student]
        taught = teacher_as(*teacher)
        if broken and idle == "soft":
            taught = teacher_as(torch.full_like(teacher[0], torch.nan), *teacher[1:])
        kd = fastkd.KDLoss(2.0, return_parts=parts, **weights, **settings)  # type: ignore[arg-type]
        result = kd(student_as(*leaves), taught if parts or idle == "hard" else None, labels)
        loss = result.loss if isinstance(result, fastkd.KDParts) else result
        gradients = torch.autograd.grad(loss.sum(), leaves)
        return loss.detach(), result if isinstance(result, fastkd.KDParts) else None, list(gradients)

    _, _, expected = outcome(broken=False, parts=False)
    whole, parts, gradients = outcome(broken=False, parts=True)
    assert parts is not None
    value, other = (parts.soft, parts.hard) if idle == "soft" else (parts.hard, parts.soft)
    assert (value.sum() > 0.1).all(), "the term of weight 0 is not reported"
    torch.testing.assert_close(whole, other)
    loss, broken, spoilt = outcome(broken=True, parts=True)
    assert broken is not None
    assert loss.isfinite().all()
    if idle == "soft":
        assert broken.soft.isnan().any()
    for a, b, c in zip(gradients, spoilt, expected, strict=True):
        assert c.abs().max() > 1e-6
        assert torch.equal(a, b)
        assert compare.relative_error(a, c) < compare.FLOOR
    assert gradients[0].shape == (N, H)


@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"inplace": True}], ids=str)
def test_a_cross_entropy_without_a_softmax_stays_out_too(settings: dict[str, object], backend: str) -> None:
    """Rows of -inf differ from a teacher's by nothing, but have no cross-entropy."""
    student, teacher = torch.randn(2, V), torch.randn(2, V)
    student[1] = teacher[1] = -torch.inf
    leaf = student.requires_grad_()
    kd = fastkd.KDLoss(divergence="mse", soft_weight=1.0, hard_weight=0.0, return_parts=True, **settings)  # type: ignore[arg-type]
    loss, soft, hard = kd(leaf * 1, teacher, cases.labels(2, V))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert soft.isfinite().all()
    assert hard.isnan().any()
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0
    assert (gradient[1] == 0).all()
