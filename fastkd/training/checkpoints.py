"""Which checkpoints are whole. Trainer writes a checkpoint file by file: one that is whole has a seal, with their sums.

A process that dies while it writes leaves files without a seal. A seal whose files are missing, cut or altered is
broken. Training is resumed from the last whole checkpoint whose best one so far is whole too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from fastkd.training.joining import joined
from fastkd.training.whole import write_whole

__all__ = ["Sealer", "checkpoint_of", "fault", "last_whole", "state_of"]

_SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Sealer(TrainerCallback):
    """Seals every checkpoint that Trainer has written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has written all files of this step's checkpoint that are this process's."""
        checkpoint, processes = checkpoint_of(Path(args.output_dir), state.global_step), joined()
        processes.agree(lambda: None)  # now the others' too
        processes.first_alone(lambda: _seal(checkpoint))


def _seal(checkpoint: Path) -> None:
    sums = {name: _sum(checkpoint / name, sync=True) for name in _files(checkpoint)}
    write_whole(checkpoint / _SEAL, json.dumps(sums, indent=1))


def checkpoint_of(directory: Path, step: int) -> Path:
    """Where Trainer keeps the checkpoint of a step."""
    return directory / f"checkpoint-{step}"


def state_of(checkpoint: Path) -> TrainerState:
    """Trainer's state in a whole checkpoint."""
    found: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return found


def last_whole(directory: Path) -> Path | None:
    """The checkpoint to resume from, or None; says which are not whole, and deletes these: Trainer would count them."""
    found = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    found.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    faults = {path: fault(path) for path in found}
    for path in found:
        best = None if faults[path] else state_of(path).best_global_step
        if best and (why := faults.get(checkpoint_of(directory, best), "it is missing")):
            faults[path] = f"its best one, {checkpoint_of(directory, best).name}, is not: {why}"
    whole = next((path for path in found if not faults[path]), None)
    for path, why in faults.items():
        if why:
            print(f"note: {path} is not whole ({why}), so it is not resumed from")
            shutil.rmtree(path, ignore_errors=True)
    if faults:
        print(f"resumed from {whole}" if whole else "no checkpoint is whole: training starts at the first step again")
    return whole


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is as it was written."""
    try:
        sums = dict(json.loads((checkpoint / _SEAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, TypeError) as error:
        return f"{_SEAL} cannot be read: {error}"
    for name, expected in sums.items():
        try:
            if _sum(checkpoint / name) != expected:
                return f"{name} is damaged"
        except OSError:
            return f"{name} is missing"
    return None


def _files(checkpoint: Path) -> list[str]:
    paths = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != _SEAL)
    return sorted(path.relative_to(checkpoint).as_posix() for path in paths)


def _sum(path: Path, *, sync: bool = False) -> list[Any]:
    """[size, BLAKE2b] of a file's content, which is on disk after `sync`."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return [size, digest.hexdigest()]
