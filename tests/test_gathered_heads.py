"""Heads in parts over data-parallel ranks: value and gradients of one process on the whole batch, by one collective."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.reductions import StorageWeakRef

import fastkd
from tests.processes import run

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip(f"torch {torch.__version__} has no fully_shard", allow_module_level=True)

ROWS, H = 96, 16
BUDGET = 90_000  # several chunks of tokens
#: name → sizes of the mesh beside its last dimension, placements, V
LAYOUTS = {
    2: {
        "shard": ((), (Shard(0),), 300),
        "uneven": ((), (Shard(0),), 301),
        "replicate": ((), (Replicate(),), 300),
    },
    4: {
        "uneven": ((), (Shard(0),), 301),
        "empty last part": ((), (Shard(0),), 5),
        "replicate x shard": ((2,), (Replicate(), Shard(0)), 301),
        "shard x replicate": ((2,), (Shard(0), Replicate()), 301),
    },
}


def batch(V: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(V)
    labels = torch.randint(V, (ROWS,), generator=generator)
    labels[: ROWS // 3] = -100  # the ranks count different numbers of tokens; of four, the first counts none
    tensors = {"hidden": (ROWS, H), "weight": (V, H), "bias": (V,), "taught": (ROWS, H), "teacher": (V, H)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensors.items()}
    return {**made, "labels": labels}


def step(inputs: dict[str, Any], rows: slice = slice(0, ROWS), **settings: Any) -> Tensor:
    """The share of some rows in the loss of the batch, differentiated."""
    kd = fastkd.KDLoss(2.0, **{"memory_budget": BUDGET, **settings})
    student = fastkd.Projection(inputs["hidden"][rows], inputs["weight"], inputs["bias"])
    teacher = fastkd.Projection(inputs["taught"][rows], inputs["teacher"])
    if kd.reduction == "none":
        loss = kd(student, teacher, inputs["labels"][rows]).sum() / (ROWS * 2 // 3)
    else:
        loss = kd(student, teacher, inputs["labels"][rows], num_items=ROWS * 2 // 3)
    loss.backward()
    return loss.detach()


def mine(rank: int, world: int) -> slice:
    return slice(rank * ROWS // world, (rank + 1) * ROWS // world)


def leaves(inputs: dict[str, Tensor]) -> dict[str, Any]:
    trained = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    return {**inputs, **trained}


def in_parts(inputs: dict[str, Any], mesh: Any, placements: Any) -> dict[str, Any]:
    """The same with heads that the ranks keep in parts."""
    parts = {name: distribute_tensor(inputs[name].detach(), mesh, placements) for name in ("weight", "bias", "teacher")}
    trained = {name: nn.Parameter(parts[name]) for name in ("weight", "bias")}
    return {**inputs, **parts, **trained, "hidden": inputs["hidden"].detach().requires_grad_()}


def distance(found: Tensor, expected: Tensor, rows: slice = slice(None)) -> float:
    """Relative to the largest element: each is a sum over tokens that may nearly cancel."""
    largest = float(expected.abs().max())
    assert largest > 0
    return float((found - expected)[rows].abs().max()) / largest


def distances(rank: int, world: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, (outer, placements, V) in LAYOUTS[world].items():
        mesh = init_device_mesh("cpu", (*outer, world // (outer or (1,))[0]))
        for settings in ({}, {"reduction": "none"}):
            alone = leaves(batch(V))
            expected = step(alone, **settings)
            parts, rows = in_parts(alone, mesh, placements), mine(rank, world)
            value = step(parts, rows, **settings)
            torch.distributed.all_reduce(value)
            found[f"{name} {settings}"] = {
                "value": distance(value[None], expected[None]),
                "hidden": distance(parts["hidden"].grad, alone["hidden"].grad, rows),
                # The mean over the ranks, each of which divided by the tokens of all.
                "weight": distance(world * parts["weight"].grad.full_tensor(), alone["weight"].grad),
                "bias": distance(world * parts["bias"].grad.full_tensor(), alone["bias"].grad),
            }
            assert parts["weight"].grad.placements == placements
            assert parts["teacher"].grad is None
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_value_and_gradients_are_those_of_the_whole_batch(world: int, of_ranks: Any) -> None:
    for by_case, *_ in of_ranks(world):
        assert len(by_case) == 2 * len(LAYOUTS[world])
        for case, errors in by_case.items():
            for name, error in errors.items():
                assert error <= 1e-6, f"{case}: {name} is off by {error:.1e}"


class Student(nn.Module):
    """The loss within the forward, where fully_shard has made the head whole."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(inputs["weight"].clone()), nn.Parameter(inputs["bias"].clone())

    def forward(self, inputs: dict[str, Tensor], rows: slice) -> Tensor:
        projection = fastkd.Projection(inputs["hidden"][rows], self.weight, self.bias)
        teacher = fastkd.Projection(inputs["taught"][rows], inputs["teacher"])
        return fastkd.kd_loss(projection, teacher, inputs["labels"][rows], num_items=ROWS)


def beside_fully_shard(rank: int, world: int) -> list[tuple[str, Tensor, Tensor]]:
    """(case, gradient of this rank's part after two steps, what fully_shard itself left there)."""
    found = []
    meshes = {
        "": init_device_mesh("cpu", (world,)),
        "hybrid ": init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard")),
    }
    for mesh_name, mesh in meshes.items():
        for dtype, computed in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)):
            inputs = batch(301, dtype)
            if computed is not None:
                inputs = {**inputs, "hidden": inputs["hidden"].to(computed)}
            policy = fsdp.MixedPrecisionPolicy(param_dtype=computed)
            theirs, ours = (fsdp.fully_shard(Student(inputs), mesh=mesh, mp_policy=policy) for _ in range(2))
            for _ in range(2):  # the second adds to the first
                theirs(inputs, mine(rank, world)).backward()
                weight, bias = (x if computed is None else x.to(computed) for x in (ours.weight, ours.bias))
                Student.forward(SimpleNamespace(weight=weight, bias=bias), inputs, mine(rank, world)).backward()
            for name in ("weight", "bias"):
                grads = (getattr(student, name).grad.to_local() for student in (ours, theirs))
                found.append((f"{mesh_name}{dtype} {computed} {name}", *grads))
    return found


def test_gradients_are_those_of_fully_shard(of_ranks: Any) -> None:
    for _, found, *_ in of_ranks(4):
        for case, ours, theirs in found:
            assert ours.dtype == theirs.dtype
            assert theirs.abs().max() > 0
            # The ranks are 4, so that a mean is as exact as a sum. bf16 sums of four have three orders.
            tolerance = 1e-6 if "bfloat16" not in case else 2e-2
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()), msg=case
            )


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*inputs["weight"].shape, _weight=inputs["weight"].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding(tokens))

    def step(self, inputs: dict[str, Tensor], rows: slice) -> None:
        hidden = self(inputs["labels"][rows].clamp(min=0))
        student = fastkd.Projection(hidden, self.embedding.weight)
        loss = fastkd.kd_loss(student, inputs["logits"][rows], inputs["labels"][rows], num_items=ROWS)
        loss.backward()


def tied(rank: int, world: int) -> float:
    inputs = batch(301)
    inputs["logits"] = inputs["taught"] @ inputs["teacher"].T
    alone, sharded = Tied(inputs), fsdp.fully_shard(Tied(inputs), reshard_after_forward=True)
    alone.step(inputs, slice(0, ROWS))
    sharded.step(inputs, mine(rank, world))
    return distance(world * sharded.embedding.weight.grad.full_tensor(), alone.embedding.weight.grad)


def test_both_uses_of_a_tied_head_add_up(of_ranks: Any) -> None:
    assert max(error for _, error, _ in of_ranks(2)) <= 1e-6


GATHER, SCATTER, REDUCE = "c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.allreduce_"
#: name → settings of the loss, collectives of its forward and of its backward
CALLS: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "student": ({}, {GATHER: 1}, {SCATTER: 1}),
    "idle term": ({"return_parts": True, "hard_weight": 0.0}, {GATHER: 1}, {SCATTER: 1}),
    "per row": ({"reduction": "none"}, {GATHER: 1}, {SCATTER: 1}),
    "frozen": ({}, {GATHER: 1}, {}),
    "hybrid": ({}, {GATHER: 1}, {SCATTER: 1, REDUCE: 1}),
    "teacher": ({}, {GATHER: 1}, {}),
    "idle teacher": ({"soft_weight": 0.0}, {}, {}),
}


def collectives(rank: int, world: int) -> dict[str, Any]:
    """What was called in the forward and in the backward, by case, and whether the whole head outlived the forward."""
    meshes = {"hybrid": init_device_mesh("cpu", (world // 2, 2))}
    flat = init_device_mesh("cpu", (world,))
    inputs, rows = batch(301), mine(rank, world)
    logits = inputs["taught"] @ inputs["teacher"].T
    made: list[StorageWeakRef] = []
    whole = fastkd.gathered.whole

    def watched(name: str, value: Tensor) -> Tensor:
        found = whole(name, value)
        made.append(StorageWeakRef(found.untyped_storage()))
        return found

    fastkd.gathered.whole = watched
    found = {}
    for name, (settings, *_) in CALLS.items():
        placements = (Replicate(), Shard(0)) if name == "hybrid" else (Shard(0),)
        weight = distribute_tensor(inputs["weight"], meshes.get(name, flat), placements)
        projection = fastkd.Projection(inputs["hidden"][rows].clone().requires_grad_(), weight)
        weight.requires_grad_(name != "frozen")
        sides: tuple[Any, Any] = projection, logits[rows]
        if "teacher" in name:
            sides = logits[rows].clone().requires_grad_(), projection.detach()
        kd = fastkd.KDLoss(2.0, memory_budget=BUDGET, **settings)
        with CommDebugMode() as forward:
            loss = kd(*sides, inputs["labels"][rows])
        for _ in range(100):  # the threads of a collective may hold it a little longer
            kept = [storage.expired() for storage in made] == [False]
            if not kept:
                break
            time.sleep(0.01)
        made.clear()
        with CommDebugMode() as backward:
            (loss.loss if "return_parts" in settings else loss.sum()).backward()
        called = ({str(op): n for op, n in mode.get_comm_counts().items() if n} for mode in (forward, backward))
        found[name] = (*called, kept)
    return found


def test_a_call_gathers_once_and_reduces_once(of_ranks: Any) -> None:
    for *_, found, _ in of_ranks(4):
        for name, (_, forward, backward) in CALLS.items():
            # Losses of single tokens compute their gradient in the backward, and need the head there.
            assert found[name] == (forward, backward, name == "per row"), name


def refusals(rank: int, world: int) -> list[tuple[str, str]]:
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    part, hidden = torch.zeros(8, H), torch.zeros(3, H)
    cases = {
        "Shard(dim=1)": lambda: fastkd.Projection(hidden, DTensor.from_local(part, mesh, (Shard(1),))),
        "Partial(sum)": lambda: fastkd.Projection(hidden, DTensor.from_local(part, mesh, (Partial(),))),
        "Shard(dim=0), Shard(dim=0)": lambda: fastkd.Projection(
            hidden, DTensor.from_local(part, square, (Shard(0), Shard(0)))
        ),
        "Projection bias is a DTensor placed": lambda: fastkd.Projection(
            hidden, part, DTensor.from_local(torch.zeros(8), mesh, (Partial(),))
        ),
        "redistribute": lambda: fastkd.Projection(hidden, DTensor.from_local(part, mesh, (Shard(1),))),
    }
    found = []
    for expected, call in cases.items():
        with CommDebugMode() as collectives:
            try:
                call()
                found.append((expected, "nothing was raised"))
            except (TypeError, ValueError) as error:
                found.append((expected, str(error)))
        assert collectives.get_total_counts() == 0
    return found


def test_placements_that_cannot_be_right_raise_before_any_work(of_ranks: Any) -> None:
    for *_, found in of_ranks(4):
        for expected, message in found:
            assert expected in message


def others(rank: int, world: int) -> dict[str, float]:
    """What takes a projection besides a loss's two sides."""
    inputs, rows = batch(301), mine(rank, world)
    hidden, logits = inputs["hidden"][rows], inputs["hidden"][rows] @ inputs["weight"].T
    weight = distribute_tensor(inputs["weight"], init_device_mesh("cpu", (world,)), (Shard(0),))
    projection = fastkd.Projection(hidden, weight)
    padded = replace(projection, weight=weight[:200])  # as of a padded vocabulary
    student, labels = torch.randn_like(logits), inputs["labels"][rows]

    def taught(source: Tensor | fastkd.Projection) -> Tensor:
        return fastkd.kd_loss(student[:, :200], source, soft_weight=1.0, hard_weight=0.0)[None]

    def mixed(source: Tensor | fastkd.Projection) -> Tensor:
        return fastkd.kd_loss(student, fastkd.Mixture([source, 2 * logits]), labels)[None]

    return {
        "logits": distance(projection.logits(), logits),
        "statistics": distance(fastkd.row_statistics(projection).log_sum_exp, logits.logsumexp(-1)),
        "fewer columns": distance(fastkd.row_statistics(padded).log_sum_exp, logits[:, :200].logsumexp(-1)),
        "taught by fewer columns": distance(taught(padded), taught(logits[:, :200])),
        "mixture": distance(mixed(projection), mixed(logits)),
        "compiled": distance(torch.compile(mixed, backend="eager")(projection), mixed(logits)),
    }


def test_statistics_logits_and_mixtures(of_ranks: Any) -> None:
    for *_, found in of_ranks(2):
        for name, error in found.items():
            assert error <= 1e-6, name


WORK = {2: (distances, tied, others), 4: (distances, beside_fully_shard, collectives, refusals)}


def everything(rank: int, world: int) -> tuple[Any, ...]:
    return tuple(work(rank, world) for work in WORK[world])


@pytest.fixture(scope="module")
def of_ranks() -> Callable[[int], list[tuple[Any, ...]]]:
    """What each rank found of all that a number of processes can show, in one group of them."""
    return functools.cache(lambda world: run(world, everything, world))
