"""What a launcher says of the processes it has started: how many, where they meet, and which of them speaks."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch.distributed as dist

from fastkd.processes import received
from fastkd.training.options import InputError

__all__ = ["check_launch", "quiet", "started", "tells"]

#: Where launchers say how many processes they have started; the first is torchrun's, and accelerate's.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HOW = "torchrun --nproc-per-node N -m fastkd ..., or accelerate launch -m fastkd ..."


def check_launch(command: str, several: bool) -> None:
    """Refuse processes that could not work together, or of which `command` takes one only. Raises InputError."""
    for name in _WORLD_SIZES:
        given = os.environ.get(name) or "1"
        size = _number(name, 1)
        if size < 1 or (size == 1 and given.strip() != "1"):
            raise InputError(f"{name} is {given!r}, which is no number of processes: start them with {_HOW}")
        if size == 1:
            continue
        has = f"there are {size} processes ({name}={given})"
        missing = [needed for needed in _MEETING if not os.environ.get(needed)]
        if missing and name == "WORLD_SIZE":
            raise InputError(
                f"{has}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so these processes "
                f"cannot find each other: start them with {_HOW}. If a job scheduler has set {name} and one process "
                f"is meant, take it away: env -u {name} fastkd ..."
            )
        if size > started():  # each would believe that it is alone; a torchrun in each of them has started as many
            raise InputError(
                f"{has}, started by a launcher that fastkd does not work with: use {_HOW}. If each is a run of its "
                f"own, take it away: env -u {name} fastkd ..."
            )
        if not several:
            raise InputError(
                f"{has}, but fastkd {command} works in one: start it without torchrun or accelerate. fastkd distill, "
                "cache and eval work in several"
            )


def started() -> int:
    """How many processes there are."""
    return max(_number("WORLD_SIZE", 1), 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In all processes but the first, what is printed goes nowhere."""
    if started() == 1 or _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def tells(error: BaseException) -> bool:
    """Whether this process is the one that tells of an error.

    One tells of what all raise, and of what ended the others. An interrupt is the first one's to tell of.
    """
    if started() == 1:
        return True
    if isinstance(error, KeyboardInterrupt):
        return _rank() == 0
    return not received(error) and _claimed()


def _rank() -> int:
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    """A variable of the environment as torch reads it, spaces around it or not."""
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default


def _claimed() -> bool:
    """Whether no other process has told of an error before; from now on none will. Where it cannot be asked, yes."""
    key = f"fastkd/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = datetime.timedelta(seconds=5)
        # A client of the store that the processes have met by.
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)  # type: ignore
        return bool(store.compare_set(key, "", str(_rank())).decode() == str(_rank()))
    except (KeyError, ValueError, RuntimeError):
        return True
