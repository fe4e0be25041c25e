"""One process at a time: for an output directory, and for the `fastkd` command as a whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastkd.training.options import InputError

__all__ = ["check_one_process", "locked"]

#: Where launchers say how many processes they have started.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_one_process() -> None:
    """Refuse to be one of several processes: each would do the whole work, in one directory. Raises InputError."""
    for name in _WORLD_SIZES:
        size = os.environ.get(name, "1")
        if size.isdigit() and int(size) > 1:
            raise InputError(
                f"the fastkd command works in one process, but a launcher has started {size} ({name}={size}): start it "
                "without torchrun, accelerate or mpirun. fastkd.training.trainer.KDTrainer trains on several, in a "
                "script of your own"
            )


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes away from a directory, which need not be there; its parents are made for the while.

    The lock is a file beside it, `.NAME.lock`: the directory itself is renamed when a run is replaced. The system
    gives the lock back when a process dies. Raises InputError where the lock is held, or cannot be written.
    """
    made = [parent for parent in output.parents if not parent.exists()]
    path = output.with_name(f".{output.name}.lock")
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(path, output)
        except OSError as error:
            raise InputError(f"cannot write to {output.parent}: {error.strerror}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it is in use
                parent.rmdir()


def _acquire(path: Path, output: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 500).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(
                f"{output} is being written by {holder}: wait until it has ended, or name another output"
            ) from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # the one who held it has deleted the file meanwhile
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor
