"""A teacher of which each row keeps K tokens: the numbers, on the CPU kernels."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import TABLE, Divergence
from fastkd.kernels import cpu
from fastkd.sparse import sparse_rows
from tests import cases, compare
from tests.sparse_targets import ROWS, TEMPERED, VOCAB, judge, kept


@pytest.mark.parametrize(
    ("dtype", "entries"),
    [*((torch.float32, entries) for entries in (1, 12, 64)), (torch.bfloat16, 12), (torch.float16, 12)],
    ids=str,
)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", TEMPERED, ids=str)
def test_contract(divergence: Divergence, family: str, dtype: torch.dtype, entries: int) -> None:
    if family == "offset" and dtype != torch.float32:
        pytest.skip("an offset of 1e4 leaves nothing of the logits in 8 or 11 bits")
    if family == "peaked" and dtype == torch.float16 and divergence == fastkd.AlphaBeta(0.5, -0.5):
        pytest.skip("the gradient, a power of p/q, is beyond what float16 can hold")
    student, teacher = cases.logits(family, ROWS, VOCAB, dtype)
    judge(cpu.kd_rows, student, kept(teacher, entries), divergence)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("family", ["near_equal", "peaked", "offset"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_temperatures(divergence: str, family: str, temperature: float) -> None:
    student, teacher = cases.logits(family, ROWS, VOCAB)
    targets = kept(teacher, 12, temperature=temperature)
    judge(cpu.kd_rows, student, targets, TABLE[divergence](), temperature)
    judge(cpu.kd_rows, student, targets, TABLE[divergence](), temperature, hard=False)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("entries", [1, 16, 17])
def test_sizes(vocab: int, entries: int) -> None:
    student, teacher = cases.logits("far", ROWS, vocab)
    judge(cpu.kd_rows, student, kept(teacher, min(entries, vocab), shuffled=True), fastkd.ForwardKL())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_nothing_cancels_where_the_tokens_hold_nearly_everything(divergence: str) -> None:
    """Both rests hold 1e-13: one less the others would be 0, and its gradient lost."""
    student, teacher = cases.logits("far", ROWS, VOCAB)
    ids = torch.arange(7, 7 + 8).expand(ROWS, 8)
    student, teacher = (x.scatter_add(1, ids, torch.full((ROWS, 8), 80.0)) for x in (student, teacher))
    logprobs = torch.log_softmax(teacher.double() / 2, -1)
    rest = torch.logsumexp(logprobs.scatter(-1, ids, -math.inf), -1)
    assert (rest < math.log(1e-11)).all()
    targets = fastkd.SparseTargets(ids, logprobs.gather(-1, ids).float(), "ghost", 2.0, rest=rest.float())
    spec, scale = cases.spec(TABLE[divergence](), VOCAB), torch.ones(ROWS)
    gradients = []
    for backend, dtype in ((cpu, torch.float32), (reference, torch.float64)):
        grad = torch.empty(ROWS, VOCAB, dtype=dtype)
        teacher_rows = sparse_rows(targets, None, VOCAB, dtype)
        backend.kd_rows(student.to(dtype), teacher_rows, None, scale.to(dtype), None, spec, grad)  # type: ignore[attr-defined]
        gradients.append(grad.scatter(1, ids, 0.0))
    ours, truth = gradients
    assert truth.abs().max() > 0
    assert compare.relative_error(ours, truth) < 1e-5


def test_the_whole_vocabulary_is_dense_distillation() -> None:
    student, teacher = cases.logits("far", ROWS, 300)
    labels = cases.labels(ROWS, 300)
    for kind in ("ghost", "renormalize", "sampled"):
        entropy = torch.distributions.Categorical(logits=teacher / 2).entropy() if kind == "sampled" else None
        everything = kept(teacher, 300)
        targets = fastkd.SparseTargets(everything.ids, everything.logprobs, kind, 2.0, entropy=entropy)
        divergences = TEMPERED if kind == "ghost" else TEMPERED[:1]
        for divergence in divergences:
            z = student.clone().requires_grad_()
            loss = fastkd.kd_loss(z, targets, labels, divergence=divergence)
            (ours,) = torch.autograd.grad(loss, z)
            dense = fastkd.kd_loss(z, teacher, labels, divergence=divergence)
            (truth,) = torch.autograd.grad(dense, z)
            assert loss.item() == pytest.approx(dense.item(), rel=2e-5), divergence
            assert compare.relative_error(ours, truth) < 2e-5, divergence
