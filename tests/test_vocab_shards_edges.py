"""Shards at their edges: ranks without columns, padding, rows of −inf, terms of weight 0, a second backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastkd
from tests import shards
from tests.processes import run
from tests.test_vocab_shards import close, here

N, V = shards.N, shards.V


def shard(source: Any, at: shards.Cut, group: Any = None) -> fastkd.VocabShard:
    return fastkd.VocabShard(source, at.first, V, group)


# --- padding and memory -----------------------------------------------------------------------------------------


def padding_in_place(batch: shards.Batch, at: shards.Cut, other: shards.Cut) -> None:
    """The gradient of columns beyond `vocab_size` is 0, whatever the teacher is, and in whole logits too."""
    real = V - 40
    batch = batch._replace(labels=batch.labels.clamp(max=real - 1))
    teachers: dict[str, tuple[Any, Any]] = {
        "logits": (batch.teacher, batch.teacher),
        "projection": (shards.teacher(batch, "projection", "dense"),) * 2,
        "mixture": (fastkd.Mixture([batch.teacher, batch.teacher.roll(1, 0)]),) * 2,
        "cut otherwise": (batch.teacher, shard(batch.teacher[:, other.own], other)),
    }
    for name, (whole, taught) in teachers.items():
        settings: dict[str, Any] = {"vocab_size": real}
        wanted = shards.outcome(batch, shards.student(batch, "logits"), whole, {}, **settings)
        for own in (at, shards.Cut(0, V)):
            (leaf,), _ = shards.student(batch, "logits", own.own)
            written = leaf * 1
            source = shard(written, own) if own == at else written
            loss = fastkd.KDLoss(inplace=True, **settings)(source, taught, batch.labels)
            loss.backward()
            close([loss, leaf.grad], [wanted[0], wanted[1][0][:, own.own]], f"in place beside {name}, {own}")


def dtensors_in_place(batch: shards.Batch) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wanted = shards.outcome(batch, shards.student(batch, "logits"), batch.teacher, {})
    kd = fastkd.KDLoss(inplace=True)
    for placement in (Shard(-1), Replicate()):
        for through in ("leaf", "function"):
            leaf = distribute_tensor(batch.student.clone(), mesh, [placement]).requires_grad_()
            logits = leaf if through == "leaf" else leaf * 1
            memory = logits.to_local().data_ptr()
            loss = kd(logits, batch.teacher, batch.labels)
            loss.backward()
            assert isinstance(leaf.grad, DTensor)
            assert leaf.grad.placements == leaf.placements
            assert leaf.grad.to_local().data_ptr() == memory or through == "function"
            close([loss, leaf.grad.full_tensor()], [wanted[0], wanted[1][0]], f"in place, {placement} {through}")
    leaf = distribute_tensor(batch.student.clone(), mesh, [Shard(-1)]).requires_grad_()
    loss = kd(leaf.tanh(), batch.teacher, batch.labels)  # whose backward needs the logits that are gone
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    local = leaf.mul(1).to_local()
    before, first = local.detach().clone(), shards.cut(dist.get_rank(), dist.get_world_size()).first
    with pytest.raises(ValueError, match="pass the DTensor itself"):
        kd(fastkd.VocabShard(local, first, V), batch.teacher, batch.labels)
    assert torch.equal(local, before)


# --- rows of −inf -----------------------------------------------------------------------------------------------


def log_softmax_of_nothing(batch: shards.Batch, at: shards.Cut) -> None:
    """Rows of which this rank, the other or both have nothing but −inf; or beside that a number that is none."""
    first, second = shards.cut(0, 2).own, shards.cut(1, 2).own
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = batch.student[:8].to(dtype, copy=True)
        logits[0, first] = logits[1, second] = logits[2] = -torch.inf
        logits[3, first] = logits[4, first] = -torch.inf
        logits[3, V - 1], logits[4, V - 2] = torch.nan, torch.inf
        logits[5, first] = -torch.inf
        logits[5] -= 3e4
        for backend in (None, "reference"):
            with fastkd.use_backend(backend):
                whole, own = logits.clone().requires_grad_(), logits[:, at.own].clone().requires_grad_()
                wanted, found = fastkd.log_softmax(whole, 1.5), fastkd.log_softmax(shard(own, at), 1.5)
                upstream = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(dtype)
                wanted.backward(upstream)
                found.backward(upstream[:, at.own])
            torch.testing.assert_close(found, wanted[:, at.own], equal_nan=True)
            torch.testing.assert_close(own.grad, whole.grad[:, at.own], equal_nan=True)


# --- terms and backwards ----------------------------------------------------------------------------------------


def idle_terms(batch: shards.Batch, at: shards.Cut, other: shards.Cut) -> None:
    cases: tuple[dict[str, Any], ...] = (
        {"soft_weight": 0.0, "hard_weight": 1.0},
        {"divergence": "mse", "hard_weight": 0.0},
    )
    for settings in cases:
        kd = fastkd.KDLoss(return_parts=True, **settings)
        for form in ("logits", "projection"):
            for cut in (at, other):
                wanted, found = [], []
                for values, own, taught in (
                    (wanted, None, shards.teacher(batch, form, "dense")),
                    (found, at, shard(shards.teacher(batch, form, "dense", cut.own), cut)),
                ):
                    leaves, source = shards.student(batch, form, slice(None) if own is None else own.own)
                    parts = kd(source if own is None else shard(source, own), taught, batch.labels)
                    values += [*parts, torch.autograd.grad(parts.loss, leaves)]
                close(found[:3], wanted[:3], f"{settings} {form}")
                close(found[3], here(wanted[3], form, at.own), f"{settings} {form}")


def backward_twice(batch: shards.Batch, at: shards.Cut) -> None:
    """From hidden states, some of which are masked and so left out."""
    for kind in ("sparse", "dense"):
        leaves, source = shards.student(batch, "projection", at.own)
        taught = shards.teacher(batch, "projection", kind)
        loss = fastkd.KDLoss(reduction="none")(shard(source, at), taught, batch.labels)
        first = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss.sum(), leaves)))


# --- groups -----------------------------------------------------------------------------------------------------


def named_groups(batch: shards.Batch, at: shards.Cut) -> None:
    """A group and its name are the same."""
    logits = batch.student[:, at.own]
    group = dist.new_group([0, 1])
    values = [fastkd.KDLoss()(shard(logits, at, x), batch.teacher, batch.labels) for x in (group, group.group_name)]
    assert torch.equal(*values)


def data_parallel_heads(batch: shards.Batch, rank: int) -> None:
    """Each rank of tensor parallelism keeps its rows of the head in parts, over its own data-parallel group."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    group, replicas = mesh["tp"].get_group(), ranks // 2
    at = shards.cut(rank % 2, 2)
    hidden, weight, bias = batch.student_head
    tokens = slice(rank // 2, None, replicas)  # of this replica
    batch = batch._replace(labels=batch.labels[tokens])
    for teachers in ("logits", "head"):
        wanted: list[Any] = []
        for replica in range(replicas):
            every = slice(replica, None, replicas)
            leaves = [x.clone().requires_grad_() for x in (hidden[every], weight, bias)]
            taught: Any = batch.teacher[every]
            if teachers == "head":
                taught = fastkd.Projection(batch.teacher_head[0][every], *batch.teacher_head[1:])
            labels = shards.Batch.of().labels[every]
            loss = fastkd.KDLoss()(fastkd.Projection(*leaves), taught, labels)
            wanted.append((loss.detach(), torch.autograd.grad(loss, leaves)))
        mine = wanted[rank // 2]

        def in_parts(values: Tensor) -> Any:
            return distribute_tensor(values[at.own].clone(), mesh["dp"], [Shard(0)])

        leaves = [hidden[tokens].clone().requires_grad_(), *(in_parts(x).requires_grad_() for x in (weight, bias))]
        taught = batch.teacher[tokens]
        if teachers == "head":
            _, *head = batch.teacher_head
            taught = shard(fastkd.Projection(batch.teacher_head[0][tokens], *map(in_parts, head)), at, group)
        loss = fastkd.KDLoss()(shard(fastkd.Projection(*leaves), at, group), taught, batch.labels)
        found = torch.autograd.grad(loss, leaves)
        means = [torch.stack(x).mean(0)[at.own] for x in zip(*(w[1][1:] for w in wanted), strict=True)]
        assert all(isinstance(g, DTensor) and g.placements == (Shard(0),) for g in found[1:])
        close(
            [loss, found[0], *(g.full_tensor() for g in found[1:])],  # type: ignore[attr-defined]
            [mine[0], mine[1][0], *means],
            f"heads in parts, {teachers}",
        )


# --- ranks without columns --------------------------------------------------------------------------------------


def no_columns(batch: shards.Batch, rank: int) -> None:
    """All columns are on one rank, the first or the last."""
    for owner in (0, 1):
        at = shards.Cut(0, V) if rank == owner else shards.Cut(V if rank > owner else 0, 0)
        for name in ("forward_kl", "jsd", "mse"):
            for kind in ("dense", "alike", "otherwise", "sparse", "absent"):
                if name == "mse" and kind == "sparse":
                    continue
                for form in ("logits", "projection"):
                    compare_without_columns(batch, at, name, kind, form)
        with fastkd.use_backend("reference"):
            for form in ("logits", "projection"):
                compare_without_columns(batch, at, "jsd", "otherwise", form)
        of_rows_without_columns(batch, at)
    with pytest.raises(ValueError, match="vocab > 0"):
        fastkd.KDLoss()(batch.student[:, :0], batch.teacher, batch.labels)
    hidden, weight, _ = batch.student_head
    with pytest.raises(ValueError, match="vocab > 0"):
        fastkd.KDLoss()(fastkd.Projection(hidden, weight[:0]), batch.teacher, batch.labels)
    with pytest.raises(ValueError, match="vocab > 0"):
        fastkd.Mixture([fastkd.Projection(hidden, weight[:0])])


def compare_without_columns(batch: shards.Batch, at: shards.Cut, name: str, kind: str, form: str) -> None:
    whole = shards.teacher(batch, form, "dense" if kind in ("alike", "otherwise") else kind)
    taught = whole
    cut = at if kind == "alike" else shards.cut(dist.get_rank(), 2, uneven=True)
    if kind in ("alike", "otherwise"):
        taught = shard(shards.teacher(batch, form, "dense", cut.own), cut)
    for settings in ({}, {"reduction": "none"}, {"inplace": form == "logits"}):
        call: dict[str, Any] = {"divergence": name, **settings}
        wanted = shards.outcome(batch, shards.student(batch, form), whole, {}, **{**call, "inplace": False})
        leaves, source = shards.student(batch, form, at.own)
        if call.get("inplace"):
            source = leaves[0] * 1
        found = shards.outcome(batch, (leaves, shard(source, at)), taught, {}, **call)
        close([found[0], *found[1]], [wanted[0], *here(wanted[1], form, at.own)], f"{at} {kind} {form} {call}")


def of_rows_without_columns(batch: shards.Batch, at: shards.Cut) -> None:
    for backend in (None, "reference"):
        with fastkd.use_backend(backend):
            for form in ("logits", "projection"):
                source, own = shards.student(batch, form)[1], shards.student(batch, form, at.own)[1]
                wanted, found = (fastkd.row_statistics(x, batch.labels, 1.5) for x in (source, shard(own, at)))
                torch.testing.assert_close((*found,), (*wanted,), equal_nan=True)
            leaf, whole = (x.clone().requires_grad_() for x in (batch.student[:, at.own], batch.student))
            upstream = torch.linspace(-1, 1, whole.numel()).view_as(whole)
            wanted, found = fastkd.log_softmax(whole, 1.5), fastkd.log_softmax(shard(leaf, at), 1.5)
            wanted.backward(upstream)
            found.backward(upstream[:, at.own])
            torch.testing.assert_close((found, leaf.grad), (wanted[:, at.own], whole.grad[:, at.own]))
    rows = batch.student[:20].view(4, 5, V)  # more than one leading dimension
    labels, taught = batch.labels[:20].view(4, 5), batch.teacher[:20].view(4, 5, V)
    for teacher in (taught, shard(taught[..., at.own], at), fastkd.Mixture([taught, taught.roll(1, 0)])):
        outcomes = []
        for whole in (True, False):
            leaf = rows[..., slice(None) if whole else at.own].clone().requires_grad_()
            beside = taught if whole and isinstance(teacher, fastkd.VocabShard) else teacher
            loss = fastkd.KDLoss(shift=True)(leaf if whole else shard(leaf, at), beside, labels)
            outcomes.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        (wanted, grad), (found, own) = outcomes
        close([found, own], [wanted, grad[..., at.own]], f"{at}, {type(teacher).__name__}, leading dimensions")


def dtensors_without_columns(rank: int) -> None:
    """5 columns over 4 ranks are 2, 2, 1 and none."""
    data_parallel_heads(shards.Batch.of(), rank)
    mesh = init_device_mesh("cpu", (4,))
    hidden, weight, teacher = torch.linspace(-2, 2, N * 3 + 15 + N * 5).sin().split([N * 3, 15, N * 5])
    hidden, weight, teacher = hidden.view(N, 3), weight.view(5, 3), teacher.view(N, 5)
    labels = torch.arange(N) % 5
    for name in ("forward_kl", "jsd"):
        kd = fastkd.KDLoss(divergence=name)
        plain = [x.clone().requires_grad_() for x in (hidden, weight)]
        wanted = kd(fastkd.Projection(*plain), teacher, labels)
        wanted.backward()
        spread = [
            distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_(),
            distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(),
        ]
        placed = distribute_tensor(teacher, mesh, [Shard(-1)])
        for taught in (teacher, placed):
            loss = kd(fastkd.Projection(*spread), taught, labels)
            found = torch.autograd.grad(loss, spread)
            close([loss, *(g.full_tensor() for g in found)], [wanted, *(x.grad for x in plain)], name)
        logits = distribute_tensor(hidden @ weight.t(), mesh, [Shard(-1)]).requires_grad_()
        loss = kd(logits, placed, labels)
        (found_,) = torch.autograd.grad(loss, logits)
        assert found_.to_local().shape[-1] == (2, 2, 1, 0)[rank]
        close([loss], [wanted], name)
    out = fastkd.log_softmax(logits)
    torch.testing.assert_close(out.full_tensor(), torch.log_softmax(logits.full_tensor(), -1))


# --- all of them ------------------------------------------------------------------------------------------------


def edges(rank: int) -> None:
    batch, at, other = shards.Batch.of(), shards.cut(rank, 2), shards.cut(rank, 2, uneven=True)
    padding_in_place(batch, at, other)
    dtensors_in_place(batch)
    log_softmax_of_nothing(batch, at)
    idle_terms(batch, at, other)
    backward_twice(batch, at)
    named_groups(batch, at)
    data_parallel_heads(batch, rank)
    no_columns(batch, rank)


def test_shards_at_their_edges_are_as_one_process() -> None:
    run(2, edges)


def test_ranks_of_dtensors_may_have_no_columns() -> None:
    run(4, dtensors_without_columns)
