"""The correspondences of docs/recipes.md: another library's loss and fastkd's have the same value and gradient.

Against the real packages where they are installed. DistillKit, which is on no package index, by its published formulas.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkd

BATCH, TOKENS, VOCAB, HIDDEN = 2, 7, 60, 8
BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def logits():
    return 2 * torch.randn(BATCH, TOKENS, VOCAB, requires_grad=True)


def masked_labels():
    labels = torch.randint(VOCAB, (BATCH, TOKENS))
    labels[0, :3] = labels[1, -1] = -100
    return labels


def only_soft(temperature=1.0, **options):
    return fastkd.KDLoss(temperature, soft_weight=1.0, hard_weight=0.0, **options)


def assert_same(theirs, ours, leaves, offset=0.0):
    """Values that differ by `offset`, and gradients that are equal and are not nothing."""
    torch.testing.assert_close(theirs, ours + offset, rtol=1e-5, atol=1e-6)
    pairs = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (theirs, ours)]
    for expected, found in zip(*pairs, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def leaves_of_projections():
    shapes = ((BATCH * TOKENS, HIDDEN), (VOCAB, HIDDEN), (BATCH * TOKENS, HIDDEN), (VOCAB, HIDDEN))
    return [torch.randn(shape, requires_grad=number < 2) for number, shape in enumerate(shapes)]


# F.kl_div


@pytest.mark.parametrize(
    ("reduction", "ours", "divisor"), [("batchmean", "batchmean", 1), ("sum", "sum", 1), ("mean", "mean", VOCAB)]
)
def test_kl_div(reduction, ours, divisor):
    student, teacher = logits().detach().requires_grad_(), logits().detach()
    theirs = 3**2 * F.kl_div(F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction=reduction)
    assert_same(theirs, only_soft(3.0, reduction=ours)(student, teacher) / divisor, [student])


def test_kl_div_of_rows():
    """With rows [N, V] batchmean is the mean over tokens."""
    student, teacher = logits().detach().flatten(0, 1).requires_grad_(), logits().detach().flatten(0, 1)
    theirs = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)
    assert_same(theirs, only_soft()(student, teacher), [student])


# Hugging Face


@pytest.mark.parametrize("num_items", [None, 29])
def test_hugging_face_models_own_loss(num_items):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids, labels = torch.randint(VOCAB, (BATCH, TOKENS)), masked_labels()
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    theirs = model(ids, labels=labels, **extra).loss
    kd = fastkd.KDLoss(soft_weight=0.0, hard_weight=1.0, shift=True)
    ours = kd(fastkd.project(model, input_ids=ids), None, labels, num_items=num_items)
    assert_same(theirs, ours, list(model.parameters()))


# TRL


def trl_loss():
    return pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_items", [None, 29])
def test_trl_gkd(beta, num_items):
    student, teacher, labels = logits().detach().requires_grad_(), logits().detach(), masked_labels()
    theirs = trl_loss()(
        student[:, :-1], teacher[:, :-1], labels[:, 1:], beta=beta, temperature=2.0, num_items_in_batch=num_items
    )
    kd = only_soft(2.0, divergence=fastkd.JSD(beta), scale_t2=False, shift=True)
    assert_same(theirs, kd(student, teacher, labels, num_items=num_items), [student])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_items", [None, 29])
def test_trl_distillation(beta, num_items):
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    hidden, head, above, teacher_head = leaves_of_projections()
    labels = masked_labels().flatten()
    theirs, *_ = trainer._chunked_divergence_loss(
        hidden,
        above,
        head,
        teacher_head,
        labels != -100,
        beta,
        num_items,
        temperature=2.0,
        student_final_logit_softcapping=9.0,
    )
    kd = only_soft(2.0, divergence=fastkd.JSD(beta), scale_t2=False)
    student = fastkd.Projection(hidden, head, softcap=9.0)
    ours = kd(student, fastkd.Projection(above, teacher_head), labels, num_items=num_items)
    assert_same(theirs, ours, [hidden, head])


# Liger


@pytest.mark.parametrize("beta", BETAS)
def test_liger_fused_linear(beta):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, head, above, teacher_head = leaves_of_projections()
    labels = masked_labels().flatten()
    liger = chunked.LigerFusedLinearJSDLoss(0.3, 0.7, beta=beta, temperature=2.0, compiled=False)
    kd = fastkd.KDLoss(2.0, hard_weight=0.3, soft_weight=0.7, divergence=fastkd.JSD(beta), scale_t2=False)
    ours = kd(fastkd.Projection(hidden, head), fastkd.Projection(above, teacher_head), labels)
    assert_same(liger(hidden, head, above, teacher_head, labels), ours, [hidden, head])


_LIGER_KERNEL = """
import sys

import torch
from liger_kernel.transformers import LigerJSD

student, teacher, labels, beta = torch.load(sys.argv[1])
student.requires_grad_()
loss = LigerJSD(beta=beta)(student.log_softmax(-1), teacher.log_softmax(-1), labels)
loss.backward()
torch.save((loss.detach(), student.grad), sys.argv[1])
"""


def test_liger_kernel(tmp_path):
    """Its Triton kernel, interpreted: in a process of its own, since that is decided when Triton is imported."""
    pytest.importorskip("liger_kernel")
    beta = 0.3
    student, teacher, labels = (
        logits().detach().flatten(0, 1),
        logits().detach().flatten(0, 1),
        masked_labels().flatten(),
    )
    file = tmp_path / "tensors.pt"
    torch.save((student, teacher, labels, beta), file)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _LIGER_KERNEL, file], env=environment, check=True)
    loss, gradient = torch.load(file)
    student.requires_grad_()
    ours = only_soft(divergence=fastkd.JSD(beta))(student, teacher, labels)
    torch.testing.assert_close(loss, ours.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(ours, student)[0], rtol=1e-4, atol=1e-6)


# torchtune


def torchtune_losses():
    """Its module of losses alone: the package as a whole imports only beside an old torchao."""
    package = importlib.util.find_spec("torchtune")
    if package is None or package.origin is None:
        pytest.skip("torchtune is not installed")
    path = Path(package.origin).parent / "modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    return losses


@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"])
def test_torchtune(name):
    losses = torchtune_losses()
    student, teacher = (logits().detach().flatten(0, 1) for _ in range(2))
    student.requires_grad_()
    labels = masked_labels().flatten()
    entropy = fastkd.row_statistics(teacher).entropy[labels != -100].mean()
    divergence, share, options = {
        "ForwardKLLoss": ("forward_kl", 1.0, {}),
        "ReverseKLLoss": ("reverse_kl", 0.0, {}),
        "SymmetricKLLoss": (fastkd.SymmetricKL(0.3), 0.3, {"sym_kd_ratio": 0.3}),
    }[name]
    theirs = getattr(losses, name)(**options)(student, teacher, labels)
    assert_same(theirs, only_soft(divergence=divergence)(student, teacher, labels), [student], share * entropy)


# DistillKit: its formulas as published, since it is not on the package index


@pytest.mark.parametrize("num_items", [None, 29])
def test_distillkit_dense(num_items):
    """T²·KL over positions that have a label, which is not moved: position i counts where label i does."""
    student, teacher, labels = logits().detach().requires_grad_(), logits().detach(), masked_labels()
    mask = labels >= 0
    rows = F.kl_div(F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="none", log_target=True)
    theirs = 2**2 * (rows.sum(-1) * mask).sum() / (mask.sum() if num_items is None else num_items)
    assert_same(theirs, only_soft(2.0)(student, teacher, labels, num_items=num_items), [student])


@pytest.mark.parametrize(("missing", "kind"), [("zero", "renormalize"), ("symmetric_uniform", "ghost")])
def test_distillkit_sparse(missing, kind):
    student, teacher, labels = logits().detach().requires_grad_(), logits().detach(), masked_labels()
    mask = labels >= 0
    log_p, ids = F.log_softmax(teacher / 2, -1).topk(5)
    log_q = F.log_softmax(student / 2, -1).gather(-1, ids)
    if missing == "zero":
        target = log_p - log_p.logsumexp(-1, keepdim=True)
        rows = (target.exp() * (target - log_q)).sum(-1)
    else:
        rest_p, rest_q = (1 - log.exp().sum(-1) for log in (log_p, log_q))
        rows = (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    targets = fastkd.SparseTargets(ids, log_p, kind, temperature=2.0)
    assert_same(2**2 * (rows * mask).sum() / mask.sum(), only_soft(2.0)(student, targets, labels), [student])


def test_distillkit_first_script():
    """batchmean ÷ max_length, pads counted, beside the model's own shifted loss."""
    student, teacher, labels = logits().detach().requires_grad_(), logits().detach(), masked_labels()
    alpha, longest = 0.3, TOKENS
    soft = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean") * 2**2 / longest
    hard = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    ours = alpha * only_soft(2.0)(student, teacher) + (1 - alpha) * fastkd.kd_loss(
        student, None, labels, soft_weight=0.0, hard_weight=1.0, shift=True
    )
    assert_same(alpha * soft + (1 - alpha) * hard, ours, [student])


def test_a_shift_is_not_free():
    """The recipes differ in it, so leaving it out must show."""
    student, teacher, labels = logits().detach(), logits().detach(), masked_labels()
    moved, still = (only_soft(shift=shift)(student, teacher, labels) for shift in (True, False))
    assert (moved - still).abs() > 1e-3
