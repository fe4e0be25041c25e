"""What is shown of long work: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from fastkd.training.progress import Progress
from tests.training.test_distill import flags


def fastkd(*arguments):
    return [sys.executable, "-m", "fastkd.cli", *arguments]


@pytest.fixture
def command(options, tmp_path):
    """A run of 40 steps out of a cache."""
    return fastkd("distill", *flags(options, cache_dir=str(tmp_path / "cache"), cache_tokens=8, sample_tokens=0))


def test_a_run_whose_output_is_kept_writes_lines(command):
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert "\r" not in found.stdout + found.stderr
    assert len(found.stderr) < 4096
    lines = found.stderr.splitlines()
    training = [line for line in lines if line.startswith("training: ")]
    assert 5 <= len(training) <= 12
    assert training[0].startswith("training: 0 of 40 steps (0%), validation perplexity=")
    values = r"loss=\d+\.\d{3}, hard=\d+\.\d{3}, soft=\d+\.\d{3}, tokens/s=\d+"
    assert re.fullmatch(rf"training: 40 of 40 steps \(100%\), .*{values}, \d+ s, 0 s left", training[-1])
    written = [line for line in lines if line.startswith("cache: ")]
    assert re.search(r"of [\d,]+ tokens \(100%\), tokens/s=\d+, bytes/token=\d+", written[-1])
    assert len(written) <= 12


def test_on_a_terminal_there_is_a_bar(command):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # rows, columns
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            some = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not some:
            break
        shown += some
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"\rtraining: 100%\|.*\| 40/40 .*soft=", shown)
    assert re.search(rb"\rcache: 100%\|", shown)


def shown(monkeypatch, work, clock=(0.0,)):
    """The lines of `work` with a Progress of 100 tokens; the clock reads `clock[0]`."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    with Progress("work", 100, "token") as progress:
        work(progress)
    return stream.getvalue().splitlines()


def test_lines_come_with_every_tenth_and_at_the_end(monkeypatch):
    found = shown(monkeypatch, lambda progress: [progress.update(done, {"x": str(done)}) for done in range(1, 96)])
    assert [line.split()[1] for line in found] == ["1", "11", "21", "31", "41", "51", "61", "71", "81", "91", "95"]
    assert found[-1].startswith("work: 95 of 100 tokens (95%), x=95")


def test_slow_work_writes_a_line_a_minute(monkeypatch):
    clock = [0.0]

    def work(progress):
        progress.skip(20)
        for done in (20, 21, 22, 23):
            progress.update(done, {"x": str(done)})
            clock[0] += 40.0

    found = shown(monkeypatch, work, clock)
    assert [line.split()[1] for line in found] == ["20", "22", "23"]
    assert found[1].endswith("80 s, 3,120 s left")  # 2 tokens in 80 s; those that were there already do not count


def test_work_without_values_writes_one_line(monkeypatch):
    assert shown(monkeypatch, lambda progress: progress.update(100)) == [
        "work: 100 of 100 tokens (100%), 0 s, 0 s left"
    ]
