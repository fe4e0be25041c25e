"""The README's picture: the textbook's loss holds six more tensors of the size of the logits, fastkd's one, or none."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd

TOKENS, VOCAB = 32, 500


class Counting(TorchDispatchMode):
    """Counts the tensors of at least `[TOKENS, VOCAB]` that are alive."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._alive: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= TOKENS * VOCAB:
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                if address not in self._given and address not in self._alive:
                    self._alive.add(address)
                    weakref.finalize(storage, self._alive.discard, address)
        self.peak = max(self.peak, len(self._alive))
        return found


def textbook(student, teacher, labels):
    hard = F.cross_entropy(student, labels)
    log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
    return 0.5 * hard + 0.5 * 2**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize(
    ("loss", "expected"), [(textbook, 6), (fastkd.KDLoss(2.0), 1), (fastkd.KDLoss(2.0, inplace=True), 0)]
)
def test_tensors_alive_at_the_peak(loss, expected):
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, requires_grad=True)
    student, teacher = logits * 1, torch.randn(TOKENS, VOCAB)  # as a model gives it: no leaf
    with Counting(student, teacher) as counted:
        loss(student, teacher, torch.randint(VOCAB, (TOKENS,))).backward()
    assert counted.peak - (1 if expected else 0) * 0 == expected
