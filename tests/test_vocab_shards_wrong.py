"""What is wrong with shards raises, on every rank and before any gradient; and each known bug of the field is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import fastkd
from fastkd import autograd, ops, ranks
from tests import shards
from tests.processes import run
from tests.test_vocab_shards import equals_one_process

V = shards.V


def raised(call: Callable[[], Any], *expected: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as found:
        call()
    for text in expected:
        assert text in str(found.value)


# --- mistakes ---------------------------------------------------------------------------------------------------


def mistakes(rank: int) -> None:
    batch, at = shards.Batch.of(), shards.cut(rank, 2)
    logits, kd = batch.student[:, at.own].clone().requires_grad_(), fastkd.KDLoss(hard_weight=0.5)

    def loss(first: int = at.first, vocab: int = V, rows: int = shards.N, **changed: Any) -> Any:
        given = {"labels": batch.labels, "teacher": batch.teacher, **changed}
        taught = given["teacher"]
        kd.soft_weight = 0.0 if taught is None else 0.5
        source = fastkd.VocabShard(logits[:rows], first, vocab)
        return kd(source, taught if taught is None else taught[:rows], given["labels"][:rows])

    two = ("rank 0 has [0, 1101) of 2201", "rank 1 has [0, 1100) of 2201")
    raised(lambda: loss(first=0), "do not make up one vocabulary, each on one rank", *two)
    loss()  # the cut is known now, and must not be trusted
    raised(lambda: loss(first=at.first - 40 * rank), "rank 1 has [1061, 2161)")
    raised(lambda: loss(teacher=None, vocab=V + rank), "of 2201; rank 1 has", "of 2202")
    others = batch.labels.clone()
    others[0] = rank
    raised(lambda: loss(labels=others), "the same labels")
    raised(lambda: loss(rows=shards.N - rank), "the same number of tokens")
    kd.temperature = 2.0 + rank
    raised(loss, "the same settings")
    kd.temperature = 2.0
    wrong = batch.labels.clone()
    wrong[3] = V
    raised(lambda: loss(labels=wrong), f"labels contains {V} (token 3", f"outside [0, {V})")
    raised(lambda: fastkd.Mixture([fastkd.VocabShard(logits, at.first, V)]), "VocabShard")  # type: ignore[list-item]
    for name in ("nope", ""):
        raised(lambda name=name: fastkd.VocabShard(logits, at.first, V, name), f"group '{name}' is the name of no")
    assert logits.grad is None
    loss().backward()  # and after all that it is right
    assert logits.grad is not None


def test_mistakes_raise_on_every_rank() -> None:
    run(2, mistakes)


def placements(rank: int) -> None:
    batch, mesh = shards.Batch.of(), init_device_mesh("cpu", (2,))
    kd = fastkd.KDLoss()

    def given(logits: Any) -> Callable[[], Any]:
        return lambda: kd(logits, batch.teacher, batch.labels)

    raised(
        given(distribute_tensor(batch.student, mesh, [Shard(0)])), "student logits has the placements", "Shard(dim=0)"
    )
    hidden, weight, bias = batch.student_head
    whole = distribute_tensor(hidden, mesh, [Replicate()])
    rows = distribute_tensor(weight, mesh, [Shard(0)])
    spread = distribute_tensor(hidden, mesh, [Shard(0)])
    raised(given(fastkd.Projection(spread, rows)), "student hidden has the placements", "Replicate()")
    raised(
        given(fastkd.Projection(whole, distribute_tensor(weight, mesh, [Shard(1)]))), "student weight", "Shard(dim=1)"
    )
    raised(
        given(fastkd.Projection(whole, weight)),
        "student weight is a plain tensor beside hidden states that are a DTensor",
    )
    raised(
        given(fastkd.Projection(whole, rows, distribute_tensor(bias, mesh, [Replicate()]))),
        "student bias has the placements",
    )
    partial = torch.distributed.tensor.DTensor.from_local(batch.student, mesh, [Partial()])
    raised(given(partial), "Partial")
    cut = distribute_tensor(batch.student, mesh, [Shard(1)])
    labels = distribute_tensor(batch.labels, mesh, [Shard(0)])
    raised(lambda: kd(cut, batch.teacher, labels), "labels has the placements", "redistribute")
    one = torch.tensor(5.0)
    parts = torch.distributed.tensor.DTensor.from_local(one, mesh, [Partial()])
    raised(lambda: kd(cut, batch.teacher, batch.labels, num_items=parts), "num_items has the placements")
    whole_number = distribute_tensor(one, mesh, [Replicate()])
    assert torch.equal(
        kd(cut, batch.teacher, batch.labels, num_items=whole_number),
        kd(cut, batch.teacher, batch.labels, num_items=one),
    )


def test_placements_that_cannot_be_right_raise() -> None:
    run(2, placements)


def test_a_shard_that_does_not_fit_raises_before_any_process_group() -> None:
    logits = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"the columns \[7, 12\), but vocab_size is 9"):
        fastkd.VocabShard(logits, 7, 9, "group")
    with pytest.raises(RuntimeError, match="init_process_group"):
        fastkd.VocabShard(logits, 0, 9)
    with pytest.raises(TypeError, match="process group, got int"):
        fastkd.VocabShard(logits, 0, 9, 3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        fastkd.VocabShard(logits, 0, 9, "group")
    with pytest.raises(TypeError, match=r"VocabShard source must be a torch\.Tensor of logits"):
        fastkd.VocabShard([1], 0, 9, "group")  # type: ignore[arg-type]


# --- bugs that others have had ----------------------------------------------------------------------------------
# Each is put in, and the test that compares with one process must fail.


def gradient_times_ranks() -> None:
    """NeMo-Automodel: a loss that is reduced by a collective that autograd differentiates."""
    total = ops.IMPLEMENTATIONS["kd_loss"]

    def kd_loss(*arguments: Any) -> Any:
        loss, soft, hard, *gradients, factor = total(*arguments)
        return (loss, soft, hard, *(None if g is None else g * dist.get_world_size() for g in gradients), factor)

    ops.IMPLEMENTATIONS["kd_loss"] = kd_loss


def missing_partial() -> None:
    """ms-swift: every rank keeps its own part of the hidden states' gradient."""
    autograd._ReadByRanks.backward = staticmethod(lambda ctx, upstream: (upstream, None))  # type: ignore[method-assign]


def double_reduction() -> None:
    add = ranks.sum_of_ranks
    torch.library.impl("fastkd::sum_of_ranks", "CPU", lambda values, group: add(add(values, group), group))


def wrong_offset() -> None:
    """Labels of rank 1 are looked up one column off."""
    cut = ranks.Rows.first.fget
    ranks.Rows.first = property(lambda self: cut(self) + self.layout.rank)  # type: ignore[assignment,misc,method-assign]


def label_elsewhere_read_as_0() -> None:
    def of_owner(self: Any, values: Tensor, ids: Tensor, absent: float) -> Tensor:
        return values[self.layout.rank].nan_to_num(0.0)

    ranks.Rows._of_owner = of_owner  # type: ignore[method-assign]


def own_normaliser() -> None:
    """Each rank's softmax over its own columns."""
    ranks.Rows.exchange = lambda self, stage, state, labels, teacher: None  # type: ignore[method-assign]


def planted(rank: int, bug: str) -> bool:
    globals()[bug]()
    try:
        equals_one_process(rank, 2, ["forward_kl"])
    except AssertionError:
        return True
    except RuntimeError as error:  # the other rank has found it, and is gone; a bug that cannot be put in is no find
        if "gloo" not in str(error):
            raise
    return False


@pytest.mark.parametrize(
    "bug",
    [
        gradient_times_ranks,
        missing_partial,
        double_reduction,
        wrong_offset,
        label_elsewhere_read_as_0,
        own_normaliser,
    ],
)
def test_known_bugs_are_found(bug: Callable[[], None]) -> None:
    found = run(2, planted, bug.__name__)
    assert any(found), f"{bug.__name__} passes"
