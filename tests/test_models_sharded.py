"""project() under FSDP2: two processes give the gradients of the whole batch, however the model is cut."""

from __future__ import annotations

import datetime
import pathlib
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastkd
from tests.causal_lms import DECODER, V

transformers = pytest.importorskip("transformers")
fsdp = pytest.importorskip("torch.distributed.fsdp")

WORLD, ROWS, T = 2, 4, 7
LAYOUTS = {  # (layers have units of their own, what is trained)
    "root": (False, ""),
    "layers and root": (True, ""),
    "root, head alone": (False, "lm_head"),
    "layers and root, head alone": (True, "lm_head"),
    "layers and root, last norm and head": (True, "lm_head model.norm"),
}


def student(trained: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": 2}, initializer_range=0.3)
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not trained or name.startswith(tuple(trained.split())))
    return model


def step(model: Any, rows: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (ROWS, T), generator=generator)
    teacher = torch.randn(ROWS, T, V, generator=generator)
    loss = fastkd.KDLoss(2.0, shift=True)
    loss(fastkd.project(model, input_ids=ids[rows]), teacher[rows], ids[rows], num_items=ROWS * (T - 1)).backward()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in found.items()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    found = {}
    for layout, (units, trained) in LAYOUTS.items():
        model = student(trained)
        for layer in model.model.layers if units else ():
            fsdp.fully_shard(layer)
        fsdp.fully_shard(model)
        for _ in range(2):  # the second adds to the first
            model.unshard()
            step(model, slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD))
        found[layout] = gradients(model)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()  # nobody leaves while another may still need it
    dist.destroy_process_group()


def test_gradients_are_reduced_in_every_layout(tmp_path: pathlib.Path) -> None:
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip(f"torch {torch.__version__} has no fully_shard")
    processes = mp.spawn(worker, (str(tmp_path),), nprocs=WORLD, join=False)
    try:
        deadline = time.monotonic() + 150
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes did not end"
    finally:
        for process in processes.processes:
            process.kill()
    for layout, found in torch.load(tmp_path / "found.pt").items():
        alone = student(LAYOUTS[layout][1])
        step(alone, slice(0, ROWS))
        step(alone, slice(0, ROWS))
        expected = gradients(alone)
        assert found.keys() == expected.keys(), layout
        for name, gradient in expected.items():
            # Gradients are averaged over processes, each of which divided by the tokens of all.
            torch.testing.assert_close(WORLD * found[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{layout}: {name}")
            assert gradient.abs().max() > 1e-4, layout
