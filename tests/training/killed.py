"""Runs in a child process that is killed at a chosen file operation, as by a power cut or the kernel's OOM killer."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Of Python's audit events, those that come before something is written.
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "tempfile.mkdtemp")


def in_child(work: Callable[[], Any], below: Path, kill_at: int | None = None) -> int | None:
    """Do `work` in a fork; returns how many file operations it did below a directory, or None where it was killed.

    `kill_at` is the operation, from 0, before which SIGKILL comes.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count = _count(below, kill_at)
            work()
            os.write(writing, str(count()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    assert status in (0, -signal.SIGKILL), f"the child ended with status {status}"
    return int(told) if status == 0 else None


def _count(below: Path, kill_at: int | None) -> Callable[[], int]:
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        writes = event in _WRITES or (event == "open" and _is_for_writing(arguments))
        if not writes or not any(str(below) in str(one) for one in arguments[:2]):
            return
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    sys.addaudithook(hook)
    return lambda: done


def _is_for_writing(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
