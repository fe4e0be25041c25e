"""Sources that are spread over ranks in different ways, or are DTensors; and what else a loss can be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastkd
from fastkd import ranks
from tests import compare, shards
from tests.processes import run
from tests.test_vocab_shards import close, here

V = shards.V
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")


def shard(source: Any, at: shards.Cut, group: Any = None) -> fastkd.VocabShard:
    return fastkd.VocabShard(source, at.first, V, group)


# --- which side is spread, and how ------------------------------------------------------------------------------


def spread(rank: int) -> None:
    """Student and teacher: here as a rank's columns, cut evenly or not, or whole."""
    batch = shards.Batch.of()
    even, uneven = shards.cut(rank, 2), shards.cut(rank, 2, uneven=True)
    for name in DIVERGENCES:
        for form in ("logits", "projection"):
            for taught_as in ("logits", "projection"):
                wanted = shards.outcome(
                    batch, shards.student(batch, form), shards.teacher(batch, taught_as, "dense"), {}, divergence=name
                )
                whole = shards.teacher(batch, taught_as, "dense")
                cuts = {at: shard(shards.teacher(batch, taught_as, "dense", at.own), at) for at in (even, uneven)}
                leaves, source = shards.student(batch, form, even.own)
                for taught in (whole, cuts[uneven]):
                    found = shards.outcome(batch, (leaves, shard(source, even)), taught, {}, divergence=name)
                    what = f"{name}, {form} of a student that is spread, {taught_as} of {type(taught).__name__}"
                    close([found[0], *found[1]], [wanted[0], *here(wanted[1], form, even.own)], what)
                found = shards.outcome(batch, shards.student(batch, form), cuts[uneven], {}, divergence=name)
                close([found[0], *found[1]], [wanted[0], *wanted[1]], f"{name}, {form} of a whole student")


def test_student_and_teacher_may_be_spread_each_in_its_way() -> None:
    run(2, spread)


def asked_for(rank: int) -> None:
    """Every option that decides which rows and columns count, and how teachers are made."""
    batch, at = shards.Batch.of(), shards.cut(rank, 2, uneven=True)
    hidden, weight, bias = batch.teacher_head
    logs = torch.log_softmax(batch.teacher, -1).as_subclass(fastkd.sources.LogProbabilities)
    mixture = fastkd.Mixture([batch.teacher, fastkd.Projection(hidden, weight, bias)], [0.25, 0.75])
    tokens = torch.linspace(0, 2, shards.N)
    cases: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "weights": (batch.teacher, {"weights": tokens}, {}),
        "two masks": (batch.teacher, {"weights": tokens}, {"mask_soft": False, "reduction": "none"}),
        "two temperatures": (
            batch.teacher,
            {},
            {"temperature": 1.5, "teacher_temperature": 3.0, "divergence": "skew_kl"},
        ),
        "one term": (batch.teacher, {}, {"hard_weight": 0.0}),
        "log-probabilities": (logs, {}, {"divergence": "jsd"}),
        "mixture": (mixture, {}, {"divergence": "reverse_kl"}),
        "mix": (batch.teacher, {}, {"divergence": "forward_kl:0.5+tvd:0.5"}),
        "kl mix": (batch.teacher, {}, {"divergence": "forward_kl+reverse_kl:2"}),
        "fewer columns": (batch.teacher, {}, {"vocab_size": at.first + at.width - 40 if rank else V - 40}),
        "columns of one rank": (batch.teacher, {}, {"vocab_size": shards.cut(0, 2, uneven=True).width - 3}),
    }
    labels = batch.labels.clamp(max=shards.cut(0, 2, uneven=True).width - 4)
    batch = batch._replace(labels=labels.where(batch.labels >= 0, -100))
    for name, (taught, call, settings) in cases.items():
        for form in ("logits", "projection"):
            wanted = shards.outcome(batch, shards.student(batch, form), taught, call, **settings)
            leaves, source = shards.student(batch, form, at.own)
            found = shards.outcome(batch, (leaves, shard(source, at)), taught, call, **settings)
            close([found[0], *found[1]], [wanted[0], *here(wanted[1], form, at.own)], f"{name}, {form}")
    values = [
        fastkd.KDLoss(return_parts=True, soft_weight=soft)(source, batch.teacher, batch.labels)
        for soft in (0.0, 0.5)
        for source in (batch.student, shard(batch.student[:, at.own], at))
    ]
    close(values[1], values[0], "parts, one of them idle")
    close(values[3], values[2], "parts")
    (leaf,), _ = shards.student(batch, "logits", at.own)
    written = leaf * 1
    loss = fastkd.KDLoss(inplace=True)(shard(written, at), batch.teacher, batch.labels)
    loss.backward()
    wanted = shards.outcome(batch, shards.student(batch, "logits"), batch.teacher, {})
    close([loss, leaf.grad, written], [wanted[0], wanted[1][0][:, at.own], wanted[1][0][:, at.own]], "in place")


def test_every_option_has_its_effect() -> None:
    run(2, asked_for)


# --- numerics ---------------------------------------------------------------------------------------------------


def contract(rank: int) -> None:
    at = shards.cut(rank, 2, uneven=True)
    for dtype in (torch.float32, torch.bfloat16):
        batch = shards.Batch.of(dtype, near=True)
        for form in ("logits", "projection"):
            for name in ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "squared_hellinger"):
                judged = []
                for wide in (torch.float64, dtype):
                    one = batch.to(wide)
                    with fastkd.use_backend("reference"):
                        judged.append(shards.outcome(one, shards.student(one, form), one.teacher, {}, divergence=name))
                leaves, source = shards.student(batch, form, at.own)
                loss, gradients = shards.outcome(batch, (leaves, shard(source, at)), batch.teacher, {}, divergence=name)
                compare.assert_value(loss, judged[0][0], judged[1][0], f"{name} {form} {dtype}")
                truths, eagers = (here(outcome[1], form, at.own) for outcome in judged)
                for found, eager, truth in zip(gradients, eagers, truths, strict=True):
                    compare.assert_gradient(found, eager, truth, f"{name} {form} {dtype}")


def test_a_spread_loss_keeps_the_numerics_contract() -> None:
    run(2, contract)


def edges(rank: int) -> None:
    """Rows of which a rank has nothing that is finite, or something that is no number; a whole row of −inf."""
    at, (low, nan) = shards.cut(rank, 2), (-torch.inf, torch.nan)
    second = shards.cut(1, 2).own
    batch = shards.Batch.of()
    student, teacher, labels = batch.student[:7].clone(), batch.teacher[:7].clone(), batch.labels[:7].clamp(0, 900)
    student[0, second] = teacher[0, second] = low
    teacher[1, second] = low
    student[2, second] = low  # an infinite forward KL, beside a finite reverse one
    student[3, 5] = nan
    teacher[4, V - 1] = nan
    student[5] = low
    student[6] += 1e4
    for name in ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "tvd", "mse"):
        for reduction in ("none", "sum"):
            kd = fastkd.KDLoss(divergence=name, reduction=reduction)  # type: ignore[arg-type]
            whole, own = student.clone().requires_grad_(), student[:, at.own].clone().requires_grad_()
            wanted = kd(whole, teacher, labels)
            found = kd(shard(own, at), shard(teacher[:, at.own], at), labels)
            torch.testing.assert_close(found, wanted, equal_nan=True, msg=f"{name} {reduction}: {found} {wanted}")
            if reduction == "none":
                wanted.backward(torch.ones(7))
                found.backward(torch.ones(7))
                torch.testing.assert_close(own.grad, whole.grad[:, at.own], equal_nan=True, rtol=1e-5, atol=1e-7)


def test_infinities_and_nan_reach_every_rank() -> None:
    run(2, edges)


def in_float64(rank: int) -> None:
    """On the reference, which gathers."""
    with fastkd.use_backend("reference"):
        batch, at = shards.Batch.of(torch.float64), shards.cut(rank, 2, uneven=True)
        for form in ("logits", "projection"):
            for reduction in ("mean", "none"):
                for kind in ("dense", "sparse", "absent"):
                    call: dict[str, Any] = {"reduction": reduction}
                    taught = shards.teacher(batch, form, kind)
                    wanted = shards.outcome(batch, shards.student(batch, form), taught, {}, **call)
                    leaves, source = shards.student(batch, form, at.own)
                    found = shards.outcome(batch, (leaves, shard(source, at)), taught, {}, **call)
                    for a, b in zip([found[0], *found[1]], [wanted[0], *here(wanted[1], form, at.own)], strict=True):
                        assert compare.relative_error(a, b) < compare.DOUBLE


def test_float64_on_the_reference() -> None:
    run(2, in_float64)


# --- what is exchanged ------------------------------------------------------------------------------------------


def counted(rank: int) -> None:
    """Collectives and their bytes, of losses that have been asked before, so that the cut is known."""
    batch, at = shards.Batch.of(), shards.cut(rank, 2)
    sent: list[tuple[str, int]] = []
    gather, add = ranks.gathered, dist.all_reduce

    def gathered(values: Tensor, group: str) -> Tensor:
        sent.append(("gather", values.shape[-1] if values.is_floating_point() else 0))
        return gather(values, group)

    def reduced(values: Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(("sum", values.numel()))
        return add(values, *arguments, **named)

    ranks.gathered, dist.all_reduce = gathered, reduced  # type: ignore[assignment]
    for name, most, exchanges in (("forward_kl", 8, 1), ("reverse_kl", 8, 1), ("symmetric_kl", 9, 1), ("jsd", 8, 2)):
        for form in ("logits", "projection"):
            for reduction in ("mean", "none"):
                leaves, source = shards.student(batch, form, at.own)
                taught = shard(shards.teacher(batch, form, "dense", at.own), at)
                kd = fastkd.KDLoss(divergence=name, reduction=reduction)
                kd(shard(source, at), taught, batch.labels)  # now the cut is known
                sent.clear()
                loss = kd(shard(source, at), taught, batch.labels)
                numbers = [count for what, count in sent if what == "gather" and count]
                assert len(numbers) == exchanges, (name, form, reduction, sent)
                # On CPUs ranks also tell each other both cuts, and then their settings: which are integers.
                assert len(sent) == exchanges + 3, (name, form, reduction, sent)
                assert max(numbers) <= most
                sent.clear()
                loss.backward(torch.ones_like(loss))
                hidden = [("sum", leaves[0].numel())] if form == "projection" else []
                assert sent == hidden, (name, form, reduction, sent)


def test_ranks_exchange_once_and_in_the_backward_hidden_states_alone() -> None:
    run(2, counted)


def partial(rank: int) -> tuple[Tensor, Tensor]:
    batch, at = shards.Batch.of(), shards.cut(rank, 2)
    parts = []
    for alone in (True, False):
        leaves, source = shards.student(batch, "projection", at.own)
        whole = fastkd.VocabShard(source, at.first, V, partial_hidden=alone)
        fastkd.KDLoss()(whole, batch.teacher, batch.labels).backward()
        assert leaves[0].grad is not None
        parts.append(leaves[0].grad)
    return parts[0], parts[1]


def test_a_rank_can_have_its_part_of_the_hidden_states_gradient() -> None:
    (first, whole), (second, same) = run(2, partial)
    assert torch.equal(whole, same)
    torch.testing.assert_close(first + second, whole)
    assert compare.relative_error(first, whole) > 0.1


# --- DTensors ---------------------------------------------------------------------------------------------------


def dtensors(rank: int, world: int) -> None:
    batch = shards.Batch.of()
    meshes = [(init_device_mesh("cpu", (world,)), [Shard(-1)], [Shard(0)])]
    if world == 4:  # replicas of a vocabulary over two ranks
        meshes.append((init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(-1)], [Replicate(), Shard(0)]))
    kd = fastkd.KDLoss(divergence="jsd")
    for mesh, columns, rows in meshes:
        whole = [Replicate()] * mesh.ndim
        for taught_as in ("logits", "projection", "plain"):
            taught: Any = batch.teacher
            if taught_as == "logits":
                taught = distribute_tensor(batch.teacher, mesh, columns)
            elif taught_as == "projection":
                taught = fastkd.Projection(*map(distribute_tensor, batch.teacher_head, [mesh] * 3, [whole, rows, rows]))
            plain = fastkd.Projection(*batch.teacher_head) if taught_as == "projection" else batch.teacher
            for form in ("logits", "projection"):
                wanted = shards.outcome(batch, shards.student(batch, form), plain, {}, divergence="jsd")
                given = (batch.student,) if form == "logits" else batch.student_head
                placements = [columns] if form == "logits" else [whole, rows, rows]
                leaves = [
                    distribute_tensor(x.clone(), mesh, p).requires_grad_()
                    for x, p in zip(given, placements, strict=True)
                ]
                source = leaves[0] if form == "logits" else fastkd.Projection(*leaves, softcap=20.0)
                loss = kd(source, taught, batch.labels)
                gradients = torch.autograd.grad(loss, leaves)
                if form == "projection":
                    assert any(isinstance(p, Partial) for p in gradients[0].placements)
                    assert gradients[1].placements == tuple(rows)
                close([loss, *(g.full_tensor() for g in gradients)], [wanted[0], *wanted[1]], f"{taught_as} {form}")


@pytest.mark.parametrize("world", [2, 4])
def test_dtensors_are_taken_as_they_are_placed(world: int) -> None:
    run(world, dtensors, world)


# --- statistics -------------------------------------------------------------------------------------------------


def statistics(rank: int, world: int) -> list[Tensor]:
    at, found = shards.cut(rank, world, uneven=True), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        batch = shards.Batch.of(dtype)
        for offset in (0.0, 1e4 if dtype != torch.bfloat16 else 0.0):
            logits = batch.student + offset
            with fastkd.use_backend("reference"):
                truth = fastkd.row_statistics(logits.double(), batch.labels, 1.5)
            ours = fastkd.row_statistics(shard(logits[:, at.own], at), batch.labels, 1.5)
            alone = fastkd.row_statistics(logits, batch.labels, 1.5)
            for name, a, b, c in zip(ours._fields, ours, truth, alone, strict=True):
                live = batch.labels >= 0 if name == "label_logprob" else slice(None)
                compare.assert_value(a[live], b[live].double(), c[live].double(), f"{name} {dtype} {offset}")
            assert ours.label_logprob.isnan().tolist() == (batch.labels < 0).tolist()
            found += [*ours[:3]]
            leaf = logits[:, at.own].clone().requires_grad_()
            whole = logits.clone().requires_grad_()
            upstream = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(dtype)
            out = fastkd.log_softmax(shard(leaf, at), 1.5)
            wanted = fastkd.log_softmax(whole, 1.5)
            out.backward(upstream[:, at.own])
            wanted.backward(upstream)
            torch.testing.assert_close(out, wanted[:, at.own])
            torch.testing.assert_close(leaf.grad, whole.grad[:, at.own])
    head = fastkd.Projection(*shards.Batch.of().student_head)
    own = fastkd.Projection(head.hidden, head.weight[at.own], head.bias[at.own])  # type: ignore[index]
    for a, b in zip(fastkd.row_statistics(shard(own, at)), fastkd.row_statistics(head), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    mesh = init_device_mesh("cpu", (world,))
    placed = distribute_tensor(shards.Batch.of().student, mesh, [Shard(-1)])
    out = fastkd.log_softmax(placed, 2.0)
    assert isinstance(out, DTensor)
    torch.testing.assert_close(out.full_tensor(), torch.log_softmax(shards.Batch.of().student / 2, -1))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_statistics_and_log_softmax_of_all_ranks(world: int) -> None:
    first, *others = run(world, statistics, world)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
