"""project() under FSDP2: two processes give the gradients of the whole batch, wherever the model's units are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastkd
from tests.causal_lms import DECODER, V
from tests.processes import run

transformers = pytest.importorskip("transformers")
fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip(f"torch {torch.__version__} has no fully_shard", allow_module_level=True)

WORLD, ROWS, T = 2, 4, 7


class Layout(NamedTuple):
    """The units beside the root's, inner ones first; what is trained ("" for all); what fully_shard is given."""

    units: Callable[[Any], list[Any]] = lambda _model: []
    trained: str = ""
    tied: bool = False
    reshard: bool | None = None  # None: FSDP2's default, which reshards all but the root


LAYOUTS = {
    "root": Layout(),
    "layers": Layout(lambda m: list(m.model.layers)),
    "root, head alone": Layout(trained="lm_head"),
    "layers, head alone": Layout(lambda m: list(m.model.layers), "lm_head"),
    "layers, last norm and head": Layout(lambda m: list(m.model.layers), "lm_head model.norm"),
    "layers, head frozen": Layout(lambda m: list(m.model.layers), "model"),
    "root sharded again": Layout(reshard=True),
    "head": Layout(lambda m: [m.lm_head]),
    "head kept": Layout(lambda m: [m.lm_head], reshard=False),
    "head, head alone": Layout(lambda m: [m.lm_head], "lm_head"),
    "all": Layout(lambda m: [*m.model.layers, m.model.embed_tokens, m.model.norm, m.lm_head], reshard=True),
    "tied": Layout(lambda m: list(m.model.layers), tied=True),
    # As accelerate does.
    "norm with head": Layout(lambda m: [*m.model.layers, m.model.embed_tokens, [m.model.norm, m.lm_head]]),
    "tied, norm with head": Layout(
        lambda m: [*m.model.layers, [m.model.norm, m.model.embed_tokens, m.lm_head]], tied=True
    ),
}


def student(layout: Layout) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**DECODER, "num_hidden_layers": 2}, initializer_range=0.3, tie_word_embeddings=layout.tied
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not layout.trained or name.startswith(tuple(layout.trained.split())))
    return model


def sharded(layout: Layout, **settings: Any) -> Any:
    model = student(layout)
    for unit in layout.units(model):
        fsdp.fully_shard(unit, reshard_after_forward=layout.reshard, **settings)
    return fsdp.fully_shard(model, reshard_after_forward=layout.reshard, **settings)


def share(model: Any, rows: slice, **settings: Any) -> Tensor:
    """The part of some rows in the loss of the batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (ROWS, T), generator=generator)
    teacher = torch.randn(ROWS, T, V, generator=generator)
    kd = fastkd.KDLoss(2.0, shift=True, **settings)
    projection = fastkd.project(model, input_ids=ids[rows])
    if settings:
        return kd(projection, teacher[rows], ids[rows]).sum() / (ROWS * (T - 1))
    return kd(projection, teacher[rows], ids[rows], num_items=ROWS * (T - 1))


def halves(rows: slice) -> tuple[slice, slice]:
    middle = (rows.start + rows.stop) // 2
    return slice(rows.start, middle), slice(middle, rows.stop)


def plainly(model: Any, rows: slice) -> None:
    for _ in range(2):  # the second adds to the first
        share(model, rows).backward()


def unshard_before(model: Any, rows: slice) -> None:
    if hasattr(model, "unshard"):
        model.unshard()
    share(model, rows).backward()


def together(model: Any, rows: slice) -> None:
    """Several calls before one backward, the second forward after the first loss."""
    first, second = halves(rows)
    (share(model, first) + share(model, second)).backward()


def accumulated(model: Any, rows: slice) -> None:
    first, second = halves(rows)
    for part, is_last in ((first, False), (second, True)):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(is_last)
        share(model, part).backward()


def per_token(model: Any, rows: slice) -> None:
    share(model, rows, reduction="none").backward()


def taught_by_itself(model: Any, rows: slice) -> None:
    """Its own forward without gradients, which shards again, comes between its hidden states and the loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (ROWS, T), generator=generator)
    projection = fastkd.project(model, input_ids=ids[rows])
    with torch.no_grad():
        teacher = fastkd.project(model, input_ids=ids[rows].flip(1))
    loss = fastkd.kd_loss(projection, teacher, ids[rows], shift=True, num_items=ROWS * (T - 1))
    loss.backward()


WAYS = (plainly, unshard_before, together, accumulated, per_token, taught_by_itself)
#: Where all ways are gone; the other layouts take two plain steps.
CLOSELY = ("root", "root sharded again", "head kept", "all", "tied, norm with head")


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in found.items()}


def distances(rank: int) -> dict[str, dict[str, float]]:
    """Of every gradient from one process's, relative to its largest element."""
    rows, found = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD), {}
    for name, layout in LAYOUTS.items():
        for way in WAYS if name in CLOSELY else (plainly,):
            model, alone = sharded(layout), student(layout)
            way(model, rows)
            way(alone, slice(0, ROWS))
            expected, ours = gradients(alone), gradients(model)
            assert ours.keys() == expected.keys(), f"{name}, {way.__name__}: {ours.keys() ^ expected.keys()}"
            found[f"{name}, {way.__name__}"] = {
                # Gradients are averaged over processes, each of which divided by the tokens of all.
                of: float((WORLD * ours[of] - expected[of]).abs().max() / expected[of].abs().max())
                for of in expected
            }
    return found


def teachers(rank: int) -> dict[str, Any]:
    """Of a teacher in parts: whether its head stays so, the collectives of a loss, and its distance from one whole."""
    found = {}
    ids = torch.randint(3, V, (ROWS, T), generator=torch.Generator().manual_seed(rank))
    logits = torch.randn(ROWS, T, V)
    for name in ("root", "all", "tied, norm with head"):
        teacher, alone = sharded(LAYOUTS[name]._replace(reshard=True)), student(LAYOUTS[name])
        with torch.no_grad():
            projection, expected = fastkd.project(teacher, input_ids=ids), fastkd.project(alone, input_ids=ids)
        with CommDebugMode() as collectives:
            loss = fastkd.kd_loss(logits, projection, soft_weight=1.0, hard_weight=0.0)
        truth = fastkd.kd_loss(logits, expected, soft_weight=1.0, hard_weight=0.0)
        found[name] = type(projection.weight).__name__, collectives.get_total_counts(), abs(float(loss / truth) - 1)
    return found


def mixed_precision(rank: int) -> dict[str, tuple[list[torch.dtype], float, list[dict[str, int]]]]:
    """bf16 in the forward, summed in fp32, with replicas: dtypes, distance from what FSDP2 itself gives, and calls."""
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ids = torch.randint(3, V, (ROWS, T), generator=torch.Generator().manual_seed(rank))
    logits, kd, found = torch.randn(ROWS, T, V), fastkd.KDLoss(2.0, shift=True), {}
    for name in ("root", "all"):
        ours, theirs = (sharded(LAYOUTS[name], mesh=mesh, mp_policy=policy) for _ in range(2))
        for unit in (*ours.modules(), *theirs.modules()):
            if isinstance(unit, fsdp.FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_gradient_divide_factor(1.0)  # a sum in place of the mean
        with CommDebugMode() as our_calls:
            projection = fastkd.project(ours, input_ids=ids)
            kd(projection, logits, ids).backward()
        with CommDebugMode() as their_calls:
            kd(theirs(ids, use_cache=False).logits.float(), logits, ids).backward()
        expected, gradient = theirs.lm_head.weight.grad.full_tensor(), ours.lm_head.weight.grad.full_tensor()
        dtypes = [projection.hidden.dtype, projection.weight.dtype, gradient.dtype]
        calls = [{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (our_calls, their_calls)]
        found[name] = dtypes, float((gradient - expected).abs().max() / expected.abs().max()), calls
    return found


def freed(rank: int) -> list[str]:
    """What is said where the head's memory is gone: before a loss, and before the backward that needs it."""
    model = sharded(LAYOUTS["root"])
    ids = torch.randint(3, V, (ROWS, T))
    found = []
    for late in (False, True):
        projection = fastkd.project(model, input_ids=ids)
        if late:
            loss = fastkd.kd_loss(projection, None, ids, soft_weight=0.0, hard_weight=1.0, reduction="none").sum()
        model.reshard()
        try:
            if late:
                loss.backward()
            else:
                fastkd.kd_loss(projection, None, ids, soft_weight=0.0, hard_weight=1.0)
        except ValueError as error:
            found.append(str(error))
    return found


def refused(rank: int) -> dict[str, str]:
    """What is said of heads that tensor parallelism has placed, before the model's forward."""
    ids, found = torch.randint(3, V, (ROWS, T)), {}
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("data", "tensor"))
    for name in ("alone", "beside fully_shard"):
        model = student(LAYOUTS["root"])
        model.model.forward = lambda **_: pytest.fail("the model ran")
        weight = distribute_tensor(model.lm_head.weight.detach(), mesh["tensor"], (Shard(0),))
        model.lm_head.weight = torch.nn.Parameter(weight)
        if name != "alone":
            fsdp.fully_shard(model, mesh=mesh["data"])
        try:
            fastkd.project(model, input_ids=ids)
        except ValueError as error:
            found[name] = str(error)
    return found


def everything(rank: int) -> tuple[Any, ...]:
    return tuple(work(rank) for work in (distances, teachers, mixed_precision, freed, refused))


@pytest.fixture(scope="module")
def found() -> list[tuple[Any, ...]]:
    """By rank; in one group of processes, which import transformers once."""
    return run(WORLD, everything)


def test_gradients_are_reduced_in_every_layout(found: Any) -> None:
    for by_case, *_ in found:
        assert len(by_case) == len(LAYOUTS) + len(CLOSELY) * (len(WAYS) - 1)
        for case, errors in by_case.items():
            assert errors, case
            for name, error in errors.items():
                assert error <= 1e-6, f"{case}: {name} is off by {error:.1e}"


def test_a_teacher_stays_in_parts_until_a_loss_needs_it(found: Any) -> None:
    for _, by_layout, *_ in found:
        for layout, (kind, collectives, error) in by_layout.items():
            assert (kind, collectives) == ("DTensor", 1), layout
            assert error <= 1e-6, layout


def test_the_reduction_is_the_units_own(found: Any) -> None:
    for _, _, by_layout, *_ in found:
        for layout, (dtypes, error, (our_calls, their_calls)) in by_layout.items():
            # What was sharded again after the forward is gathered at once, and not again in the backward.
            assert our_calls == their_calls, layout
            assert sum(our_calls.values()) > 0
            assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32], layout
            assert error <= 1e-2, f"{layout} is off by {error:.1e}: their logits are rounded to bf16, ours are not"


def test_freed_memory_is_not_read(found: Any) -> None:
    for _, _, _, messages, _ in found:
        assert len(messages) == 2
        assert all("has been freed" in message for message in messages)


def test_tensor_parallel_heads_are_refused(found: Any) -> None:
    for *_, messages in found:
        assert set(messages) == {"alone", "beside fully_shard"}
        assert all("is a DTensor placed" in message for message in messages.values())
