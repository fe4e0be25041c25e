"""Inside a sharded module: two processes give what one gives."""

from __future__ import annotations

import datetime
import pathlib
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastkd

WORLD, ROWS, V, H = 2, 12, 300, 16
fsdp = pytest.importorskip("torch.distributed.fsdp")


class Student(nn.Module):
    """The loss is computed in the forward, where sharded weights are whole."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(V, H), nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.kd = fastkd.KDLoss(2.0)

    def forward(self, tokens: Tensor, teacher: fastkd.Projection, labels: Tensor, num_items: int) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        return self.kd(fastkd.Projection(hidden, self.head.weight), teacher, labels, num_items=num_items)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(V, (ROWS,), generator=generator) for _ in range(2))
    labels[:4] = -100  # the shards count different numbers of tokens
    return tokens, torch.randn(ROWS, 8, generator=generator), torch.randn(V, 8, generator=generator), labels


def step(model: nn.Module, rows: slice) -> None:
    tokens, hidden, weight, labels = batch()
    teacher = fastkd.Projection(hidden[rows], weight)
    model(tokens[rows], teacher, labels[rows], num_items=ROWS - 4).backward()


def worker(rank: int, kind: str, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = Student(tied=kind == "ddp tied")
    if kind == "fsdp":
        fsdp.fully_shard(model.body)
        fsdp.fully_shard(model)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    step(wrapped, slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD))
    grads = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(grads, pathlib.Path(folder) / "grads.pt")
    dist.barrier()  # nobody leaves while another may still need it
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["fsdp", "ddp tied"])
def test_two_processes_give_the_gradients_of_one(kind: str, tmp_path: pathlib.Path) -> None:
    if kind == "fsdp" and not hasattr(fsdp, "fully_shard"):
        pytest.skip(f"torch {torch.__version__} has no fully_shard")
    processes = mp.spawn(worker, (kind, str(tmp_path)), nprocs=WORLD, join=False)
    try:
        deadline = time.monotonic() + 150
        while not processes.join(timeout=1):  # one of them has ended, or the second has
            assert time.monotonic() < deadline, "the processes did not end"
    finally:
        for process in processes.processes:
            process.kill()
    found = torch.load(tmp_path / "grads.pt")
    torch.manual_seed(0)
    alone = Student(tied=kind == "ddp tied")
    step(alone, slice(0, ROWS))
    expected = {name: p.grad for name, p in alone.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Gradients are averaged over processes, each of which divided by the tokens of all. An element is a sum over
        # rows, whose parts may nearly cancel: it is as right as the largest.
        largest = float(gradient.abs().max())
        assert largest > 0
        torch.testing.assert_close(WORLD * found[name], gradient, rtol=1e-5, atol=1e-6 * largest)
