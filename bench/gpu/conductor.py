"""Starts the processes of a visit, stops those that take too long, and writes down how each ended.

A finding of kind `ended` holds step, walk and part, `seconds`, `ok`, and where it is not, `how` and the end of its log.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.gpu import walks
from bench.gpu.checkout import ROOT
from bench.gpu.findings import Findings
from bench.gpu.steps import Step

__all__ = ["Conductor", "Job", "jobs_of"]

_GRACE = 2.0  # seconds past its limit after which a process is killed
_LEAST = 6.0  # seconds without which none is started
_POLL = 0.05
_LOG = 2000  # characters of it that are kept where a process failed


@dataclass(frozen=True)
class Job:
    """One process of a step."""

    step: Step
    walk: str
    part: int
    parts: int
    seconds: float

    def __str__(self) -> str:
        walk = "" if self.walk == walks.DEFAULT else f"-{self.walk}"
        return f"{self.step.name}{walk}-{self.part}"


def jobs_of(stage: Iterable[Step], offered: Iterable[str], at_once: int) -> list[Job]:
    """The default walk's first. Of another walk, where it makes a difference, half as many.

    A step has fewer parts where more processes than can run at once would let some wait until no time is left.
    """
    wanted = []
    for walk in offered:
        for step in stage:
            usual = walk == walks.DEFAULT
            seconds = step.seconds if usual else step.walks
            if seconds is not None:
                wanted.append((step, walk, step.processes if usual else (step.processes + 1) // 2, seconds))
    parts = [count for *_, count, _ in wanted]
    while sum(parts) > at_once and max(parts) > 1:
        parts[parts.index(max(parts))] -= 1
    return [
        Job(step, walk, part, count, seconds)
        for (step, walk, _, seconds), count in zip(wanted, parts, strict=True)
        for part in range(count)
    ]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: pathlib.Path
    begin: float
    limit: float


@dataclass
class Conductor:
    """Of one visit."""

    out: pathlib.Path
    until: float  # of time.monotonic()
    at_once: int  # processes of a stage
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._findings = Findings(self.out / "findings" / "conductor.jsonl")

    def stage(self, stage: Iterable[Step], offered: Iterable[str] = (walks.DEFAULT,)) -> None:
        """Run the steps to their end, side by side but for those that are to be alone."""
        waiting = jobs_of(stage, offered, self.at_once)
        running: list[_Running] = []
        end = time.monotonic() + max((job.seconds for job in waiting if not job.step.alone), default=0)
        try:
            while waiting or running:
                while waiting and len(running) < (1 if waiting[0].step.alone else self.at_once):
                    job = waiting.pop(0)
                    until = self.until if job.step.alone else min(end, self.until)
                    limit = min(job.seconds, until - time.monotonic())
                    if limit < _LEAST:
                        self._findings.say("left", step=job.step.name, walk=job.walk, count=None, first="no time")
                    else:
                        running.append(self._start(job, limit))
                time.sleep(_POLL)
                running = [each for each in running if not self._over(each)]
        finally:
            for each in running:
                _kill(each.process)

    def _start(self, job: Job, limit: float) -> _Running:
        log = self.out / "logs" / f"{job}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bench.gpu.child", job.step.module]
        command += [str((self.out / "findings" / f"{job}.jsonl").resolve()), "--step", job.step.name]
        until = time.monotonic() + limit
        command += ["--until", str(until), "--part", str(job.part), "--parts", str(job.parts)]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, walks.VARIABLE: job.walk},
                start_new_session=True,  # so that what it starts is killed with it
            )
        return _Running(job, process, log, time.monotonic(), limit)

    def _over(self, each: _Running) -> bool:
        seconds, job = time.monotonic() - each.begin, each.job
        code = each.process.poll()
        if code is None and seconds < each.limit + _GRACE:
            return False
        told = {"step": job.step.name, "walk": job.walk, "part": job.part, "seconds": round(seconds, 1)}
        if code == 0:
            self._findings.say("ended", **told, ok=True)
        else:
            if code is None:
                _kill(each.process)
            how = f"killed after {seconds:.0f} s" if code is None else f"exit status {code}"
            log = each.log.read_text(errors="replace")[-_LOG:]
            self._findings.say("ended", **told, ok=False, how=how, log=log)
        print(f"{job}: {'done' if code == 0 else how} after {seconds:.0f} s", flush=True)
        return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
