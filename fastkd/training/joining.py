"""The processes of a run, joined by accelerate: a group for the training, and one that waits without a limit."""

from __future__ import annotations

import datetime
import functools

import torch.distributed as dist
from accelerate import PartialState

from fastkd.processes import PATIENCE, Processes
from fastkd.training.launcher import started
from fastkd.training.loading import device_of
from fastkd.training.options import ModelOptions

__all__ = ["joined", "leave"]

_ours: list[bool] = []  # whether the training's group was made here
_STEP = datetime.timedelta(minutes=30)  # at most, for what is summed in a training step


def joined(models: ModelOptions | None = None) -> Processes:
    """The processes that a launcher has started, or this one alone.

    The first call, which all make, brings them together, on the device of `models`. Raises what accelerate does where
    they do not find each other.
    """
    if started() == 1:
        return Processes()
    if not dist.is_initialized():
        _ours.append(True)
        cpu = models is not None and device_of(models).type == "cpu"
        PartialState(cpu=cpu, **({} if cpu else {"timeout": _STEP}))
    return _beside(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _beside(world: dist.ProcessGroup) -> Processes:
    # On the host, whatever the devices are; a step's own group would give up on a process that judges for long.
    return Processes(dist.new_group(backend="gloo", timeout=PATIENCE))


def leave() -> None:
    """The work is done, in all processes: end the group that `joined` has made."""
    _beside.cache_clear()
    if _ours and dist.is_initialized():
        _ours.clear()
        dist.destroy_process_group()
