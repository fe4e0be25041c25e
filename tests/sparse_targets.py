"""Sparse targets of any teacher, and the numerics contract they are held to on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence
from fastkd.sparse import sparse_rows
from tests import cases, compare

ROWS, VOCAB = 4, 5003  # odd, several blocks and a tail
TEMPERED = tuple(divergence for divergence in cases.DIVERGENCES if divergence.tempered)


def kept(
    teacher: Tensor, entries: int, kind: str = "ghost", temperature: float = 2.0, shuffled: bool = False
) -> fastkd.SparseTargets:
    """The `entries` likeliest tokens of each row, with the mass of all others where the kind knows it."""
    logprobs = torch.log_softmax(teacher.double() / temperature, -1)
    top, ids = logprobs.topk(entries)
    if shuffled:
        order = torch.randperm(entries, generator=torch.Generator().manual_seed(2))
        top, ids = top[..., order], ids[..., order]
    rest = torch.logsumexp(logprobs.scatter(-1, ids, -math.inf), -1)
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    return fastkd.SparseTargets(ids, top.to(dtype), kind, temperature, rest=rest.to(dtype) if kind == "ghost" else None)


def judge(
    compute: Callable[..., tuple[Tensor, Tensor]],
    student: Tensor,
    targets: fastkd.SparseTargets,
    divergence: Divergence,
    temperature: float = 2.0,
    hard: bool = True,
) -> None:
    """Hold `compute`, which is `Backend.kd_rows` of some backend, to the numerics contract."""
    rows, vocab = student.shape
    labels = cases.labels(rows, vocab)
    labels[0] = targets.ids[0, 0]  # a label among the tokens that are kept
    spec = cases.spec(divergence, vocab, temperature)
    outcomes = []
    for backend, dtype in (
        (reference.kd_rows, torch.float64),
        (reference.kd_rows, torch.float32),
        (compute, student.dtype),
    ):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.full((rows, vocab), torch.nan, dtype=dtype)
        scale = torch.full((rows,), 1 / rows, dtype=wide)
        teacher = sparse_rows(targets, None, vocab, wide)
        values = backend(
            student.to(dtype), teacher, labels if hard else None, scale, scale if hard else None, spec, grad
        )
        outcomes.append((*values, grad))
    truth, eager, ours = outcomes
    compare.assert_value(ours[0], truth[0], eager[0], "soft loss")
    compare.assert_value(ours[1], truth[1], eager[1], "hard loss")
    compare.assert_gradient(ours[2], eager[2].to(student.dtype), truth[2])
