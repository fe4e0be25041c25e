"""project() under DeepSpeed's ZeRO-3, which empties parameters between uses: gradients are those it has by itself."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
from tests.causal_lms import DECODER, V, llama
from tests.processes import run

transformers = pytest.importorskip("transformers")

WORLD, ROWS, T = 2, 4, 7


def empty_between_uses(head: nn.Linear) -> None:
    """What ZeRO-3 does to a module: parameters are whole in its forward and in its backward, and else empty."""
    weight: Any = head.weight
    weight.ds_id, weight.ds_shape, rows = 0, weight.shape, weight.detach().clone()

    def fill(*_: Any) -> None:
        weight.data = rows.clone()

    def empty(*_: Any) -> None:
        weight.data = rows[:0, 0].clone()

    def after_forward(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fill)
        empty()

    weight.register_post_accumulate_grad_hook(empty)
    head.register_forward_pre_hook(fill)
    head.register_forward_hook(after_forward)
    empty()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_that_is_emptied_between_uses(reduction: Any) -> None:
    torch.manual_seed(0)
    alone = llama().float()
    ids, teacher = torch.randint(3, V, (ROWS, T)), torch.randn(ROWS, T, V)
    kd = fastkd.KDLoss(2.0, shift=True, reduction=reduction)
    kd(fastkd.project(alone, input_ids=ids), teacher, ids).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in alone.named_parameters()}
    alone.zero_grad()
    empty_between_uses(alone.lm_head)
    projection = fastkd.project(alone, input_ids=ids)
    assert alone.lm_head.weight.numel() == 0
    kd(projection, teacher, ids).sum().backward()
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], msg=name)
    with pytest.raises(ValueError, match=r"ZeRO-3 keeps its \(61, 16\) in parts"):
        fastkd.Projection(torch.randn(3, 16), alone.lm_head.weight)


def step(engine: Any, share: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    engine.backward(share(engine))
    found = {name: safe_get_full_grad(weight).clone() for name, weight in engine.module.named_parameters()}
    engine.step()
    return found


def distances(rank: int) -> dict[str, float]:
    """The largest distance of a gradient from that of a loss on DeepSpeed's own logits, relative to its size."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    import deepspeed

    rows, found = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD), {}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (ROWS, T), generator=generator)[rows]
    teacher = torch.randn(ROWS, T, V, generator=generator)[rows]
    kd = fastkd.KDLoss(2.0, shift=True)

    def projected(engine: Any) -> Tensor:
        with torch.no_grad():
            fastkd.project(engine, input_ids=ids)  # as a teacher
        return kd(fastkd.project(engine, input_ids=ids), teacher, ids, num_items=ROWS * (T - 1))

    def dense(engine: Any) -> Tensor:
        return kd(engine(input_ids=ids, use_cache=False).logits, teacher, ids, num_items=ROWS * (T - 1))

    for tied in (False, True):
        for kept in (0, 100_000):  # parameters of fewer elements stay whole
            engines = []
            for _ in range(2):
                torch.manual_seed(0)
                config = transformers.LlamaConfig(**DECODER, initializer_range=0.3, tie_word_embeddings=tied)
                model = transformers.LlamaForCausalLM(config)
                zero = {"stage": 3, "stage3_param_persistence_threshold": kept}
                settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
                settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0])
            for i in range(3):  # later steps prefetch what the first has recorded
                ours, theirs = step(engines[0], projected), step(engines[1], dense)
                assert ours.keys() == theirs.keys()
                found[f"tied {tied}, kept {kept}, step {i}"] = max(
                    float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs
                )
    return found


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_gradients_are_deepspeeds_own() -> None:
    for found in run(WORLD, distances):
        assert len(found) == 12
        for case, error in found.items():
            assert error <= 1e-5, f"{case}: off by {error:.1e}"
