"""Work on two processes that share this machine, as torchrun would start them."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two(work: Callable[[int, str], None], folder: Path) -> None:
    """Do `work(rank, folder)` in both, which end within two minutes."""
    processes = mp.spawn(_one, (work, str(folder)), nprocs=2, join=False)
    try:
        deadline = time.monotonic() + 120
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes did not end"
    finally:
        for process in processes.processes:
            process.kill()


def _one(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT="29577", ACCELERATE_USE_CPU="true")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    work(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
