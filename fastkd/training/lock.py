"""One run at a time has an output directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastkd.training.options import InputError

__all__ = ["locked"]


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
