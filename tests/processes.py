"""Several processes of one group, on one machine: what tests of collectives run in.

    def work(rank: int, shift: int) -> Tensor: ...      # in every process, which is in a group of gloo by then

    first, second = run(2, work, 3)                     # what each rank returned, by rank

Processes are forked from a server that has imported torch and fastkd, and no more: so one costs a fraction of a second.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pathlib
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run"]

_PATIENCE = 240  # seconds for all of it: a process that waits for one that died would wait for ever
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "fastkd"])


def run(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, *arguments)` in `world` processes of one thread each; what they return, by rank.

    `work` is a function of a module, and what it returns can be pickled. AssertionError with the traceback of every
    process that raised or died.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = [
            _forkserver.Process(target=_in_group, args=(rank, world, folder, work, arguments)) for rank in range(world)
        ]
        for process in started:
            process.start()
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=_PATIENCE)
        for process in started:
            process.join(max((deadline - datetime.datetime.now()).total_seconds(), 0.1))
        late = [rank for rank, process in enumerate(started) if process.is_alive()]
        for rank in late:
            started[rank].kill()
            started[rank].join()
        said = {rank: _text(folder, rank) for rank in range(world)}
        failed = [f"rank {rank}: {text or 'died'}" for rank, text in said.items() if started[rank].exitcode != 0]
        if failed:
            raise AssertionError(f"after {_PATIENCE} s: {late}\n" * bool(late) + "\n".join(failed))
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world)]


def _in_group(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=_PATIENCE / 2)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=patience
        )
        result = work(rank, *arguments)
        torch.save(result, _result(folder, rank))
        dist.barrier()  # nobody leaves while another may still need it
        dist.destroy_process_group()
    except BaseException:
        pathlib.Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _result(folder: str, rank: int) -> str:
    return f"{folder}/{rank}.pt"


def _text(folder: str, rank: int) -> str:
    path = pathlib.Path(folder, f"{rank}.txt")
    return path.read_text() if path.exists() else ""
