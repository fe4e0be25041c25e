"""project() under FSDP2: two processes give the gradients of the whole batch, wherever the model's units are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

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


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in found.items()}


def distances(rank: int) -> dict[str, dict[str, float]]:
    """Of every gradient from one process's, relative to its largest element."""
    rows, found = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD), {}
    for name, layout in LAYOUTS.items():
        for way in WAYS:
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


def test_gradients_are_reduced_in_every_layout() -> None:
    for found in run(WORLD, distances):
        assert len(found) == len(LAYOUTS) * len(WAYS)
        for case, errors in found.items():
            assert errors, case
            for name, error in errors.items():
                assert error <= 5e-6, f"{case}: {name} is off by {error:.1e}"
