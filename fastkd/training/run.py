"""The directory of a run: who may write there, what is left in it after failures, and how a run goes on.

A run begins with `config.yaml`. What it works with (checkpoints, a cache, a trained teacher) goes into folders, which
an interrupted run leaves for `--resume`. Results are written beside and moved in together when all of them are there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd.training.configuration import differences, dump, load
from fastkd.training.options import InputError, Options

__all__ = ["CHECKPOINTS", "CONFIG_FILE", "METRICS_FILE", "check_output", "results", "working"]

CONFIG_FILE, METRICS_FILE, CHECKPOINTS = "config.yaml", "metrics.json", "checkpoints"
_MAY_CHANGE = ("output", "overwrite", "resume", "device")


def check_output(options: Options) -> None:
    """Refuse a directory that is not free, no earlier run, or the run of another configuration."""
    output, training = Path(options.training.output), options.training
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file: name a directory")
    config = output / CONFIG_FILE
    if training.resume:
        if not config.is_file():
            raise InputError(f"{output} has no run to resume (no {CONFIG_FILE}): leave --resume away")
        if (output / METRICS_FILE).exists():
            raise InputError(f"the run in {output} is finished: there is nothing to resume")
        changed = differences(load(config), options, _MAY_CHANGE)
        if changed:
            raise InputError(
                f"the run in {output} was started with other options, so it cannot be resumed with these: "
                f"{'; '.join(changed)}. Resume with fastkd distill {config} --resume"
            )
        return
    if not output.exists() or not any(output.iterdir()):
        return
    if not training.overwrite:
        raise InputError(
            f"the output directory {output} is not empty: name another, or pass --overwrite or, to go on with an "
            "interrupted run, --resume"
        )
    if not config.is_file():  # or `--output . --overwrite` would delete someone's work
        raise InputError(f"{output} is no earlier run (it has no {CONFIG_FILE}): not overwritten")


@contextmanager
def working(options: Options) -> Iterator[Path]:
    """The run's directory, with its configuration, an earlier run removed. A failure removes what cannot be resumed."""
    output = Path(options.training.output)
    try:
        if output.exists() and not options.training.resume:
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG_FILE).write_text(dump(options), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    try:
        yield output
    except BaseException as error:
        if not any(path.is_file() for path in output.rglob("*") if path != output / CONFIG_FILE):
            shutil.rmtree(output)
        elif isinstance(error, KeyboardInterrupt):
            hint = f"{error or 'interrupted'}: go on with fastkd distill {output / CONFIG_FILE} --resume"
            raise KeyboardInterrupt(hint) from None
        raise


@contextmanager
def results(output: Path) -> Iterator[Path]:
    """A directory to write results in: they replace those in `output` if the block succeeds, else they go away."""
    staging = Path(tempfile.mkdtemp(prefix=".results-", dir=output))
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
