"""What is wrong with shards raises, on every rank and before any gradient; and each known bug of the field is found."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import fastkd
from fastkd import agreement, autograd, ops, ranks
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


def mistakes_of_one(rank: int) -> None:
    """One rank refuses its arguments, or was called in another way: the others do not wait for it."""
    batch, at = shards.Batch.of(), shards.cut(rank, 2)
    hidden, weight, bias = batch.student_head
    one = rank == 1
    told = "rank 1 of the group raised an error before all ranks agreed"

    def logits(dtype: torch.dtype = torch.float32) -> Tensor:
        return batch.student[:, at.own].to(dtype, copy=True).requires_grad_()

    def projection(learnt: bool = True) -> fastkd.Projection:
        return fastkd.Projection(hidden.clone().requires_grad_(learnt), weight[at.own], bias[at.own])

    def shard(source: Any) -> Any:
        return fastkd.VocabShard(source, at.first, V)

    def loss(source: Any = None, labels: Any = None, teacher: Any = None, **settings: Any) -> Any:
        kd = fastkd.KDLoss(**settings)
        given = logits() if source is None else source
        labels = batch.labels if labels is None else labels
        return kd(shard(given), batch.teacher if teacher is None else teacher, labels)

    def both(call: Callable[[], Any], own: str, others: str = told) -> None:
        raised(call, own if one else others)
        assert torch.isfinite(loss())  # the ranks are together again

    wrong = batch.labels.clone()
    wrong[3] = V if one else 0
    both(lambda: loss(labels=wrong), f"labels contains {V}")
    both(lambda: loss(labels=batch.labels.float() if one else batch.labels), "labels must be")
    both(lambda: loss(projection(), memory_budget=10 if one else None), "memory_budget=10")
    kinds = "called alike"
    taught = shard(batch.teacher[:, at.own].contiguous())
    both(lambda: loss(teacher=taught if one else batch.teacher), kinds, kinds)
    forms = "the same forms and dtypes of students"
    both(lambda: loss(projection() if one else logits()), "must have the same", "must have the same")
    double = torch.float64 if one else torch.float32
    both(lambda: loss(logits(double), teacher=batch.teacher.to(double), reduction="sum"), forms, forms)
    logprobs, ids = batch.teacher.div(2).log_softmax(-1).topk(4 - rank)
    sparse = fastkd.SparseTargets(ids, logprobs, "ghost", temperature=2.0)
    both(lambda: loss(teacher=sparse), "the same kinds of teachers", "the same kinds of teachers")
    learnt = "the same hidden states that require a gradient"
    both(lambda: loss(projection(learnt=one)), learnt, learnt)
    both(lambda: loss(reduction="none" if one else "sum"), "the same settings", "the same settings")
    capped = fastkd.Projection(hidden, weight[at.own], bias[at.own], softcap=30.0 if one else 20.0)
    both(lambda: loss(capped), "the same settings", "the same settings")
    # Losses of a whole student beside a teacher that is spread, over more ranks than the student.
    alone = [dist.new_group([other]) for other in range(2)][rank]
    rows = batch.student.roll(rank, 0)
    student = fastkd.VocabShard(rows, 0, V, alone)
    tokens = batch.labels.roll(rank, 0)
    both(lambda: fastkd.KDLoss()(student, taught, tokens), "the same labels", "the same labels")

    for call in (fastkd.log_softmax, fastkd.row_statistics):
        both(lambda call=call: call(shard(logits()), temperature=1.0 + rank), "the same temperature", "the same temp")
        both(lambda call=call: call(shard(logits()[: 5 - rank])), "the same number of rows", "the same number of rows")
        both(lambda call=call: call(shard(logits()), temperature=-1.0 if one else 1.0), "temperature must be")
    both(lambda: fastkd.row_statistics(shard(logits()), wrong), "the same labels", "the same labels")
    loss().backward()


def test_a_mistake_of_one_rank_raises_on_every_rank() -> None:
    run(2, mistakes_of_one)


def alone_with_a_mistake(rank: int) -> None:
    group = dist.new_group()  # which is of no use afterwards
    if rank == 1:
        agreement._PATIENCE = datetime.timedelta(seconds=0.5)
        logits = fastkd.VocabShard(torch.randn(3, 4), 4, 8, group)
        raised(lambda: fastkd.KDLoss(temperature=-1.0)(logits, torch.randn(3, 8), torch.zeros(3).long()), "temperature")
        raised(lambda: fastkd.KDLoss()(logits, torch.randn(3, 9), torch.zeros(3).long()), "teacher 9")


def test_a_rank_with_a_mistake_does_not_wait_for_those_that_never_come() -> None:
    run(2, alone_with_a_mistake)


def other_threads(rank: int) -> None:
    """No sum whose order depends on the threads is compared."""
    torch.set_num_threads(1 + rank)
    draw = torch.Generator().manual_seed(0)
    rows, width = 200_000, 4
    student, teacher = (torch.randn(rows, 2 * width, generator=draw) for _ in range(2))
    labels, weights = torch.randint(2 * width, (rows,), generator=draw), torch.rand(rows, generator=draw)
    for given in (weights, weights.double(), None):
        own = fastkd.VocabShard(student[:, rank * width :][:, :width], rank * width, 2 * width)
        assert torch.isfinite(fastkd.KDLoss()(own, teacher, labels, weights=given))


def test_ranks_may_have_different_numbers_of_threads() -> None:
    run(2, other_threads)


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
