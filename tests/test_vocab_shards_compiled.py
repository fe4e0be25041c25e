"""Losses whose vocabulary is spread over ranks, under torch.compile: one graph, and what eager computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastkd
from tests import shards
from tests.processes import run

V = shards.V


def both(function: Any, leaves: list[Any]) -> None:
    """Eager and compiled: the same bits of the loss and of every gradient."""
    torch._dynamo.reset()
    found = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        loss = call(*leaves)
        found.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(getattr(a, "to_local", lambda a=a: a)(), getattr(b, "to_local", lambda b=b: b)())


def plain(rank: int) -> None:
    batch, at = shards.Batch.of(), shards.cut(rank, 2, uneven=True)
    group = torch.distributed.group.WORLD

    def shard(source: Any) -> fastkd.VocabShard:
        return fastkd.VocabShard(source, at.first, V, group)

    def loss(*leaves: Tensor) -> Any:  # of a projection, beside logits that are spread too
        return per_token(shard(fastkd.Projection(*leaves, softcap=20.0)), shard(batch.teacher[:, at.own]), batch.labels)

    per_token, mean = fastkd.KDLoss(divergence="jsd", reduction="none"), fastkd.KDLoss(divergence="jsd")
    both(loss, shards.student(batch, "projection", at.own)[0])
    sparse = shards.teacher(batch, "logits", "sparse")
    leaves, _ = shards.student(batch, "logits", at.own)
    both(lambda z: mean(shard(z), sparse, batch.labels), leaves)
    both(lambda z: fastkd.log_softmax(shard(z), 2.0), leaves)


def dtensors(rank: int) -> None:
    batch, mesh = shards.Batch.of(), init_device_mesh("cpu", (2,))
    mean, per_token = fastkd.KDLoss(divergence="jsd"), fastkd.KDLoss(divergence="jsd", reduction="none")
    whole, columns, rows = [Replicate()], [Shard(-1)], [Shard(0)]
    taught = distribute_tensor(batch.teacher, mesh, columns)
    leaf = distribute_tensor(batch.student.clone(), mesh, columns).requires_grad_()
    both(lambda z: per_token(z, taught, batch.labels), [leaf])
    operands = zip(batch.student_head, [whole, rows, rows], strict=True)
    leaves = [distribute_tensor(x.clone(), mesh, placements).requires_grad_() for x, placements in operands]
    both(lambda *leaves: mean(fastkd.Projection(*leaves), taught, batch.labels), leaves)


@pytest.mark.parametrize("work", [plain, dtensors])
def test_one_graph_computes_what_eager_does(work: Any) -> None:
    run(2, work)
