"""Is a loss whose vocabulary is spread over ranks as much faster as its products are shorter?

    python -m bench.ranks                    1024 × 128256 on one rank and on two, one thread each, taking turns
    python -m bench.ranks --tokens 512 --vocab 50257 --ranks 1 2 4

Forward and backward, in seconds by the clock: the median of all rounds, of the slowest rank in each. A round starts new
processes, so that no rank is always the one that another process is in the way of. Needs as many free cores as ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastkd

__all__ = ["Size", "compared", "main"]

HIDDEN, TEACHER_HIDDEN = 256, 768
#: Of the time on one rank, on two: from hidden states, where products take most of it.
BAR = 0.65


class Size(argparse.Namespace):
    """Of the batch, and what is computed of it."""

    tokens: int
    vocab: int
    repeats: int


def _loss(rank: int, ranks: int, size: Size, form: str, divergence: str) -> tuple[Any, list[Tensor]]:
    """A function that makes the loss, and its leaves."""
    step = -(-size.vocab // ranks)
    first = min(step * rank, size.vocab)
    width = min(step, size.vocab - first)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def shard(source: Any) -> Any:
        return source if ranks == 1 else fastkd.VocabShard(source, first, size.vocab)

    labels = torch.randint(size.vocab, (size.tokens,), generator=generator)
    kd = fastkd.KDLoss(divergence=divergence)
    if form == "logits":
        logits, taught = normal(size.tokens, width).requires_grad_(), normal(size.tokens, width)
        return lambda: kd(shard(logits), shard(taught), labels), [logits]
    hidden, weight = normal(size.tokens, HIDDEN).requires_grad_(), (normal(width, HIDDEN) / 16).requires_grad_()
    teacher = fastkd.Projection(normal(size.tokens, TEACHER_HIDDEN), normal(width, TEACHER_HIDDEN) / 28)
    return lambda: kd(shard(fastkd.Projection(hidden, weight)), shard(teacher), labels), [hidden, weight]


def _timed(rank: int, ranks: int, size: Size, form: str, divergence: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    loss, leaves = _loss(rank, ranks, size, form, divergence)
    seconds = []
    for _ in range(size.repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        loss().backward()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        for leaf in leaves:
            leaf.grad = None
    torch.save(seconds[1:], f"{folder}/{rank}.pt")  # the first asks the ranks for their columns
    dist.barrier()
    dist.destroy_process_group()


def compared(size: Size, ranks: list[int], rounds: int, form: str, divergence: str) -> dict[int, float]:
    """Number of ranks → median seconds."""
    found: dict[int, list[float]] = {count: [] for count in ranks}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "fastkd"])
    for _ in range(rounds):
        for count in ranks:
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_timed, (count, size, form, divergence, folder), count, start_method="forkserver")
                found[count] += torch.load(f"{folder}/0.pt")
    return {count: statistics.median(seconds) for count, seconds in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the first is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="in each round")
    parser.add_argument("--divergences", nargs="+", default=["forward_kl", "jsd"])
    size = parser.parse_args(arguments, Size())
    slow = False
    print(f"{size.tokens} × {size.vocab}, fp32, hidden sizes {HIDDEN}/{TEACHER_HIDDEN}, one thread a rank; seconds")
    for form in ("hidden states", "logits"):
        for divergence in size.divergences:
            found = compared(size, size.ranks, size.rounds, form, divergence)
            alone = found[size.ranks[0]]
            each = ", ".join(f"{count}: {s:.3f} ({s / alone:.2f})" for count, s in found.items())
            print(f"{form}, {divergence}: {each}", flush=True)
            slow |= form == "hidden states" and 2 in found and found[2] > BAR * alone
    print(f"two ranks take {'more' if slow else 'at most'} {BAR} of the time of one from hidden states")
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
