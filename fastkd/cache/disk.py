"""Files of a cache. A file is whole or absent, one process writes at a time, and every failure is a CacheError."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CacheError", "disk", "locked", "own_names", "read", "replace_file"]

_PARTIAL, _LOCK = ".partial", ".lock"
#: What `flock` answers where the file system has no locks (some network and cluster file systems).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
#: What `fsync` of a directory answers where only files can be synced.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
_CHECK = "check that the disk is there, that files on it may be read, and try again"


class CacheError(ValueError):
    """A cache that cannot be written or read as asked; the message says why and what to do."""


@contextlib.contextmanager
def disk(problem: str, advice: str = _CHECK) -> Iterator[None]:
    """Make a CacheError of an OSError: the problem, what the system says, what to do."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{problem}: {error.strerror or error}; {advice}") from error


def read(path: Path) -> bytes:
    """A whole file. CacheError where it cannot be read."""
    with disk(f"{path} cannot be read"):
        return path.read_bytes()


def own_names(name: str) -> bool:
    """Whether a file of this name is what a writer leaves for a time beside a cache."""
    return name == _LOCK or (name.startswith(".") and name.endswith(_PARTIAL))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other writers out, and delete what an interrupted one left half-written.

    The lock is the system's own, and ends with the process. On a file system without locks it is a file, which an
    interrupted process leaves behind: the CacheError of the next writer says which file to delete.
    """
    with contextlib.ExitStack() as held:
        with disk(f"cannot lock {directory}", "check that the directory is there and may be written to"):
            descriptor = os.open(directory, os.O_RDONLY)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CacheError(f"another process is writing the cache {directory}: wait for it, or end it") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _make_lock_file(directory / _LOCK)
                held.callback(_remove, directory / _LOCK)
            for path in directory.glob(f".*{_PARTIAL}"):
                path.unlink(missing_ok=True)
        yield


def _make_lock_file(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        owner = read(path).decode(errors="replace").strip()
        raise CacheError(
            f"another process is writing the cache {path.parent}: {owner or 'one that has just begun'}. Wait for it; "
            f"if it is gone, delete {path}, which it left because this file system has no locks of its own"
        ) from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")


def replace_file(path: Path, content: bytes, advice: str) -> None:
    """Write a file under another name and rename it once it is on disk; nothing is left of one that fails."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        with disk(f"cannot write {path}", advice):
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            _sync(path.parent)
    except BaseException:
        _remove(partial)
        raise


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
