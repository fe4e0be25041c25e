"""The README's picture: the textbook's loss holds six more tensors of the size of the logits; fastkd's one, or none."""

from __future__ import annotations

import pytest

from tests import memory

TENSORS = """
import torch
import torch.nn.functional as F

import fastkd
from tests.memory import peak

def textbook(student, teacher, labels):
    hard = F.cross_entropy(student, labels)
    log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
    return 0.5 * hard + 0.5 * 2**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

for loss in (textbook, fastkd.KDLoss(2.0), fastkd.KDLoss(2.0, inplace=True)):
    for tokens in (2, 128):  # the first brings in what is loaded once
        logits = torch.randn(tokens, 50257, requires_grad=True)
        student, teacher = logits * 1, torch.randn(tokens, 50257)  # no leaf, as a model's logits
        labels = torch.randint(50257, (tokens,))
        held = peak(lambda: torch.autograd.grad(loss(student, teacher, labels), student))
    print(held / logits.nbytes)
"""


def test_tensors_held_at_the_peak():
    textbook, ours, in_place = memory.printed(TENSORS)
    assert textbook == pytest.approx(6, abs=0.1)
    assert ours == pytest.approx(1, abs=0.1)
    assert in_place == pytest.approx(0, abs=0.1)
