"""The Triton kernels of two ranks, interpreted in two processes: the loss of one, from what they exchange of a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.agreement import layout_of
from fastkd.divergences import Divergence
from fastkd.ranks import Layout, Rows
from fastkd.rows import SparseRows
from fastkd.sparse import sparse_rows
from tests import cases, compare, sparse_targets
from tests.processes import run

pytest.importorskip("triton")
ROWS, V, FIRST = 3, 300, 130  # of rank 1
WHICH: tuple[Divergence, ...] = (
    fastkd.ForwardKL(),
    fastkd.ReverseKL(),
    fastkd.SymmetricKL(),
    fastkd.JSD(),
    fastkd.AlphaBeta(),
    fastkd.MSE(),
    cases.MIXES[1],
    cases.MIXES[2],
)


def judged(layout: Layout, divergence: Divergence, kind: str, wanted: bool = True, vocab: int = V) -> list[Tensor]:
    """On this rank, with the gradient or without. Returns the values, which must be the same on the other."""
    from fastkd.kernels import gpu
    from tests.triton_interpreter import interpreted

    own = slice(FIRST, vocab) if layout.rank else slice(0, FIRST)
    found = []
    for family in ("near_equal", "offset") if kind == "dense" else ("far",):
        student, teacher = cases.logits(family, ROWS, vocab)
        labels = cases.labels(ROWS, vocab)
        labels[0], labels[1] = FIRST - 1, min(FIRST, vocab - 1)
        spec = cases.spec(divergence, vocab, 1.5)
        soft, hard = torch.tensor([0.5, 0.0, 1.5]), torch.tensor([0.3, 0.7, 0.0])
        outcomes = []
        for wide in (torch.float64, torch.float32):
            beside = sparse_rows(sparse_targets.kept(teacher, 5, temperature=1.5), None, vocab, wide)
            grad = torch.empty(ROWS, vocab, dtype=wide)
            whole: Tensor | SparseRows = beside if kind == "sparse" else teacher.to(wide)
            values = reference.kd_rows(student.to(wide), whole, labels, soft.to(wide), hard.to(wide), spec, grad)
            outcomes.append((*values, grad))
        truth, eager = outcomes
        part = teacher[:, own].clone() if kind == "dense" else beside
        rows = Rows(layout, gpu, spec)
        state = gpu.tile_state(ROWS, student.device).fill_(torch.nan)
        grad = student[:, own].clone()  # in place
        with interpreted():
            values = rows.kd_rows(grad, part, labels, soft, hard, grad if wanted else None, state)
        compare.assert_value(values[0], truth[0], eager[0], f"{divergence} {kind} {family}")
        compare.assert_value(values[1], truth[1], eager[1], f"cross-entropy, {divergence} {kind} {family}")
        if wanted:
            compare.assert_gradient(grad, eager[2][:, own], truth[2][:, own], f"{divergence} {kind} {family}")
        found += values
    return found


def both_kinds(rank: int) -> list[Tensor]:
    group = torch.distributed.group.WORLD.group_name
    layout = layout_of(group, FIRST * rank, (FIRST, V - FIRST)[rank], V, torch.device("cpu"))
    found = []
    for divergence in WHICH:
        for kind in ("dense", "sparse") if divergence.tempered else ("dense",):
            found += judged(layout, divergence, kind)
    found += judged(layout, fastkd.ForwardKL(), "dense", wanted=False)
    found += judged(layout, fastkd.JSD(), "dense", vocab=FIRST)  # no column of rank 1 counts
    return found


def test_two_ranks_make_one_row() -> None:
    first, second = run(2, both_kinds)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
