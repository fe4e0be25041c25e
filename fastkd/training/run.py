"""The directory of a run: who may write there, what is left in it after failures, and how a run is resumed.

A run's directory begins with `run.json`, by which it is known as one: it says what the run was started on and which
files are the run's own. Nothing else is ever deleted. `config.yaml` is next. What a run works with (checkpoints, a
trained teacher) goes into folders, which an interrupted run leaves for `--resume`. Results are written beside and moved
in when all of them are there.

With `--overwrite` the new run works in `NAME.new` beside the earlier one, and takes its place when it is finished: the
earlier one is renamed to `.NAME.replaced`, the new one to NAME; what no run wrote (a cache, notes) is moved over; then
the earlier one is deleted. A process that dies on the way leaves the rest to the next one. Until the new run is
finished, `--resume` resumes it in `NAME.new`.

Of several processes the first does all of this, and the others learn what came of it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.processes import Processes
from fastkd.training.configuration import differences, dump, load
from fastkd.training.launcher import check_launch
from fastkd.training.lock import locked
from fastkd.training.options import InputError, Options, TrainingOptions
from fastkd.training.places import anchored, paths_in
from fastkd.training.whole import STAGING, delete, results, write_whole

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "METRICS_FILE",
    "Run",
    "claimed",
    "is_begun",
    "is_finished",
    "note_files",
    "started_with",
]

CONFIG_FILE, METRICS_FILE, CHECKPOINTS = "config.yaml", "metrics.json", "checkpoints"
_STATE_FILE = "run.json"
_MAY_CHANGE = ("output", "overwrite", "resume", "device")


@contextmanager
def claimed(
    options: Options,
    command: str = "distill",
    groups: Iterable[Any] | None = None,
    config: str | None = None,
    processes: Processes | None = None,
) -> Iterator[Run]:
    """The run that `options` ask for, checked, while no other process may touch its output.

    Nothing is written before `Run.begin`. At the end of the block the run is finished; a failure leaves only what can
    be resumed, and Ctrl-C says with which command. `groups` is what `command` reads from a configuration, where that is
    not `options`; `config` is the file it was read from; `processes` work on the run together. Raises InputError.
    """
    check_launch(command, several=processes is not None)
    processes = processes or Processes()
    output = Path(options.training.output)
    if output.is_symlink() or output.name in ("", ".."):
        output = output.resolve()
    with ExitStack() as held:

        def checked() -> Run:
            held.enter_context(locked(output))
            _settle(output)
            run = Run(options, command, list(groups or options), output)
            run.check(config)
            return run

        run = processes.of_first(checked)
        run.processes = processes
        with run.ending():
            yield run


def started_with(options: Options) -> dict[Any, Any]:
    """The configuration of the run that `options` resume; empty where they resume none."""
    if not options.training.resume or not options.training.output:
        return {}
    config = _waiting(Path(options.training.output)) / CONFIG_FILE
    return load(config) if config.is_file() else {}


def _waiting(output: Path) -> Path:
    """Where a run of this output is to be resumed: beside it, if it was to replace an earlier one."""
    beside = _beside(output)
    return beside if _state(beside).get("replaces") == output.name else output


class Run:
    """A run of a command: where it works, what it was started on, what it leaves."""

    def __init__(self, options: Options, command: str, groups: list[Any], output: Path) -> None:
        self.options, self.command, self.output = options, command, output
        self.resumed = options.training.resume
        self._groups = [
            anchored(replace(group, overwrite=False, resume=False) if isinstance(group, TrainingOptions) else group)
            for group in groups
        ]
        earlier = not self.resumed and options.training.overwrite and bool(self._occupants())
        self.directory = _beside(output) if earlier else _waiting(output) if self.resumed else output
        self.processes = Processes()
        self._begun = False

    def check(self, config: str | None) -> None:
        """Refuse a directory that is not free, no earlier run, needed, or the run of another configuration."""
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"the output {self.output} is a file: name a directory")
        self._check_cache()
        if self.resumed:
            self._check_same()
            return
        if self.options.training.overwrite:
            self._check_replaceable(config)
        elif self._occupants():
            raise InputError(
                f"the output directory {self.output} is not empty: name another, or pass --overwrite or, to resume "
                "an interrupted run, --resume"
            )

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A block at whose end the run is finished; a failure leaves only what can be resumed."""
        if not self.processes.first:
            yield
            return
        try:
            yield
            self.finish()
        except KeyboardInterrupt as error:
            if self.leave(interrupted=True):
                raise KeyboardInterrupt(self.hint(str(error) or "interrupted")) from None
            cache = self.options.distillation.cache_dir
            if os.path.isdir(cache):
                raise KeyboardInterrupt(f"interrupted: the same command resumes the cache {cache}") from None
            raise
        except InputError:
            self.leave(interrupted=False)
            raise
        except BaseException:
            if self.leave(interrupted=False):
                print(self.hint("what was trained is kept"), file=sys.stderr)
            raise

    def begin(self, **inputs: str) -> Path:
        """Start the run, or resume it, on inputs of these fingerprints; returns the directory to work in."""
        self._check_alike(inputs)
        self.processes.first_alone(self._make_directory_unless_resumed)
        self._begun = True
        self.pin(**inputs)
        return self.directory

    def pin(self, **inputs: str) -> None:
        """Keep fingerprints of what the run is started on. Raises InputError where a resumed run began on another."""
        self._check_alike(inputs)
        self.processes.first_alone(lambda: self._pin(inputs))

    def _check_alike(self, inputs: dict[str, str]) -> None:
        """Every process was given the same."""
        found = self.processes.gather(lambda: inputs)
        changed = {name for one in found for name in inputs if one[name] != found[0][name]}
        if changed:
            raise InputError(
                f"the {' and the '.join(sorted(changed))} of the {len(found)} processes differ: start all of them "
                "where they see the same files"
            )

    def _pin(self, inputs: dict[str, str]) -> None:
        known = _state(self.directory).get("inputs", {})
        changed = [name.replace("_", " ") for name, value in inputs.items() if known.get(name, value) != value]
        if changed:
            anew = f"delete {self.directory} and start anew"
            if self.directory == self.output:
                anew = "start anew with --overwrite"
            raise InputError(
                f"the {' and the '.join(changed)} changed after the run in {self.directory} was started, so it cannot "
                f"be resumed: restore what it was started on, or {anew}"
            )
        _save_state(self.directory, inputs={**known, **inputs})

    @contextmanager
    def results(self) -> Iterator[Path]:
        """A directory to write results in: they are moved into the run's if the block succeeds, else they go away."""
        with results(self.directory) as staging:
            yield staging
            names = {path.name for path in staging.iterdir()}
            in_the_way = sorted(names & {path.name for path in _foreign(self.directory)})
            if in_the_way:
                raise InputError(
                    f"{self.directory} has files that are not the run's under the names of its results: "
                    f"{', '.join(in_the_way)}. Move them away, and resume with {self._resume_command}"
                )
            note_files(self.directory, names)

    def finish(self) -> None:
        """All results are there: the run takes its place."""
        _save_state(self.directory, finished=True)
        shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)
        if self.directory != self.output:
            _replace(self.output)

    def leave(self, *, interrupted: bool) -> bool:
        """Remove a run that failed and has nothing to resume; returns whether it can be resumed."""
        if not self._begun or not self.directory.exists():  # or it has replaced the earlier one
            return False
        begun_cache = interrupted and bool(_foreign(self.directory))
        if self.resumed or begun_cache or _has_work(self.directory):
            return not _state(self.directory).get("finished")
        _delete_run(self.directory)
        return False

    def hint(self, interrupted: str) -> str:
        """What to tell after an interrupt."""
        until = "" if self.directory == self.output else f". Until it is finished, {self.output} stays as it is"
        return f"{interrupted}: resume with {self._resume_command}{until}"

    @property
    def _resume_command(self) -> str:
        return f"fastkd {self.command} {shlex.quote(str(self.directory / CONFIG_FILE))} --resume"

    def _occupants(self) -> list[Path]:
        """What is in the output beside the run's own cache."""
        if not self.output.is_dir():
            return []
        cache = _inside(self.options.distillation.cache_dir, self.output)
        return [path for path in self.output.iterdir() if path.name != cache]

    def _check_cache(self) -> None:
        cache = self.options.distillation.cache_dir
        if cache and Path(cache).resolve() == self.output.resolve():
            raise InputError(f"cache_dir {cache} is the output: name another directory, such as {self.output}/cache")
        name = _inside(cache, self.output)
        if name is not None and name in _own_names(self.output):
            raise InputError(f"cache_dir {cache} is in {self.output / name}, which is the run's own: name another")

    def _check_same(self) -> None:
        state, config = _state(self.directory), self.directory / CONFIG_FILE
        if not state or not config.is_file():
            raise InputError(
                f"{self.output} has no run to resume (no {_STATE_FILE}, {CONFIG_FILE}): leave --resume away"
            )
        if state.get("finished"):
            raise InputError(f"the run in {self.output} is finished: there is nothing to resume")
        if state["command"] != self.command:
            raise InputError(f"the run in {self.directory} is of fastkd {state['command']}, not of {self.command}")
        changed = differences(load(config), self._groups, _MAY_CHANGE)
        if changed:
            raise InputError(
                f"the run in {self.directory} was started with other options, so it cannot be resumed with these: "
                f"{'; '.join(changed)}. Resume with {self._resume_command}"
            )

    def _check_replaceable(self, config: str | None) -> None:
        """Refuse to replace what holds more than an earlier run, and what is still in use."""
        place, here = self.output.resolve(), Path.cwd().resolve()
        for name, taken in (("the current directory", here), ("your home directory", Path.home().resolve())):
            if place == taken or place in taken.parents:
                raise InputError(
                    f"--overwrite would replace {self.output}, which is or holds {name}: name another output"
                )
        given = [("the configuration", os.path.expanduser(config))] if config else []
        for name, path in (*paths_in(self._groups), *given):
            if _inside(path, self.output) is not None or Path(path).resolve() == place:
                raise InputError(
                    f"{name} {path} is in the output {self.output}, which --overwrite would replace: move "
                    "it, or name another output"
                )
        beside, occupants = _beside(self.output), self._occupants()
        if occupants and not _state(self.output):  # or someone's work would be deleted
            raise InputError(
                f"{self.output} is no earlier run (it has no {_STATE_FILE}), so it is not overwritten: name another"
            )
        if occupants and os.path.ismount(self.output):
            raise InputError(f"{self.output} is a mount point, which cannot be replaced: name a directory in it")
        if not occupants:
            return
        ours = _state(beside).get("replaces") == self.output.name
        for place in (_aside(self.output),) if ours else (_aside(self.output), beside):
            if place.exists():
                raise InputError(f"{place} is in the way of a run that is to replace {self.output}: rename it")
        if _has_work(beside):
            raise InputError(
                f"{beside} is an interrupted run that was to replace {self.output}. Go on with fastkd "
                f"{_state(beside)['command']} {beside / CONFIG_FILE} --resume, or delete it: rm -r {beside}"
            )
        if beside.exists():
            _delete_run(beside)

    def _make_directory_unless_resumed(self) -> None:
        if self.resumed:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=self.directory == self.output)
            if self.directory == self.output and self._occupants():
                raise InputError(f"the output directory {self.output} was filled meanwhile: name another")
            self._begun = True  # what a failure from here on leaves is the run's
            state = {"fastkd_run": 1, "command": self.command, "finished": False, "files": [], "inputs": {}}
            if self.directory != self.output:
                state["replaces"] = self.output.name
            write_whole(self.directory / _STATE_FILE, json.dumps(state, indent=1))
            write_whole(self.directory / CONFIG_FILE, dump(self._groups))
        except OSError as error:
            raise InputError(f"cannot write to {self.directory}: {error.strerror}") from error


def note_files(directory: Path, names: Iterable[str]) -> None:
    """Files and folders that are the run's own from now on. Nothing happens where there is no run."""
    state = _state(directory)
    if state:
        _save_state(directory, files=sorted({*state["files"], *names}))


def is_begun(directory: Path) -> bool:
    """Whether there is a run in a directory."""
    return bool(_state(directory)) and (directory / CONFIG_FILE).is_file()


def is_finished(directory: Path) -> bool:
    """Whether there is a run in a directory that has all its results."""
    return bool(_state(directory).get("finished"))


def _beside(output: Path) -> Path:
    """Where a run works that is to replace the one in `output`."""
    return output.with_name(f"{output.name}.new")


def _aside(output: Path) -> Path:
    """Where a run goes that is being replaced."""
    return output.with_name(f".{output.name}.replaced")


def _state(directory: Path) -> dict[str, Any]:
    """What run.json says; nothing where there is no run."""
    try:
        found = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("fastkd_run") == 1 else {}


def _save_state(directory: Path, **changes: Any) -> None:
    write_whole(directory / _STATE_FILE, json.dumps(_state(directory) | changes, indent=1))


def _own_names(directory: Path) -> set[str]:
    """The names that are the run's in its directory."""
    return {CONFIG_FILE, _STATE_FILE, CHECKPOINTS, *_state(directory).get("files", [])}


def _foreign(directory: Path) -> list[Path]:
    """What is in a run's directory and no run wrote."""
    own = _own_names(directory)
    own |= {f"{name}.partial" for name in (CONFIG_FILE, _STATE_FILE)}
    return [path for path in directory.iterdir() if path.name not in own and not path.name.startswith(STAGING)]


def _has_work(directory: Path) -> bool:
    """Whether a run has what would be lost with it: saved steps, finished cells, a trained teacher."""
    work = directory / CHECKPOINTS
    saved = any(any(work.rglob(pattern)) for pattern in ("checkpoint-*", "finished.pt", "rows.json"))
    return saved or bool(_state(directory).get("files"))


def _settle(output: Path) -> None:
    """Complete a replacement during which a process died."""
    beside, aside = _state(_beside(output)), _aside(output)
    waiting = beside.get("replaces") == output.name and bool(beside.get("finished"))
    with suppress(OSError):  # empty: only this was left to do
        aside.rmdir()
    if _state(aside).get("replaced"):
        if not output.exists():
            os.rename(_beside(output) if waiting else aside, output)
        _clear(output)
    elif waiting:
        _replace(output)


def _replace(output: Path) -> None:
    """Put the finished run beside in the place of the earlier one."""
    beside = _beside(output)
    if output.exists() and any(output.iterdir()):
        names = {path.name for path in _foreign(output)} & {path.name for path in beside.iterdir()}
        if names or not _state(output):
            why = f"has files that no run wrote: {', '.join(sorted(names))}" if names else "is no earlier run any more"
            raise InputError(
                f"the run in {beside} is finished, but {output} {why}. Move them away, and ask for it again"
            )
        os.sync()  # the new run is on disk before the old one goes
        _save_state(output, replaced=True)
        os.rename(output, _aside(output))
    os.rename(beside, output)
    _clear(output)


def _clear(output: Path) -> None:
    """Move over what no run wrote, and delete the run that was replaced."""
    aside = _aside(output)
    if aside.exists():
        for path in _foreign(aside):
            os.rename(path, output / path.name)
        _delete_run(aside)
    state = {name: value for name, value in _state(output).items() if name not in ("replaces", "replaced")}
    write_whole(output / _STATE_FILE, json.dumps(state, indent=1))


def _delete_run(directory: Path) -> None:
    """Delete what a run wrote, run.json last, and its directory, if there is nothing else in it."""
    foreign = {path.name for path in _foreign(directory)}
    for path in directory.iterdir():
        if path.name not in foreign and path.name != _STATE_FILE:
            delete(path)
    delete(directory / _STATE_FILE)
    with suppress(OSError):
        directory.rmdir()


def _inside(path: str, directory: Path) -> str | None:
    """The name in `directory` that holds `path`; None where it does not."""
    if not path:
        return None
    parts = Path(os.path.relpath(Path(path).resolve(), directory.resolve())).parts
    return parts[0] if parts and parts[0] != ".." else None
