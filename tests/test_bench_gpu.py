"""The visit to a GPU, where there is none: a dry run of all of it, and processes that hang, crash or fail."""

from __future__ import annotations

import importlib
import os
import pathlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.gpu import (
    conductor,
    findings,
    steps,
    summary,
)
from bench.gpu.conductor import Conductor
from bench.gpu.findings import Finding, Findings
from bench.gpu.steps import Step
from bench.harness import store
from bench.report import page
from fastkd.divergences import TABLE
from tests import cases
from tests.gpu_visits import visiting

pytest.importorskip("triton")

_ROOT = pathlib.Path(__file__).parent.parent
#: What a bare machine has: Python, and torch and triton with their own requirements.
_BARE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

ALLOWED = {"torch", "triton", "fastkd", "bench", "tests", "tools", "torchgen", "functorch", "sitecustomize"}
ALLOWED |= {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"}
ALLOWED |= {"typing_extensions"}
ALLOWED |= set(sys.stdlib_module_names)

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata"):  # which is named after the platform
            return PathFinder.find_spec(name, path, target)
        return None

sys.meta_path = [finder for finder in sys.meta_path if finder in (BuiltinImporter, FrozenImporter)] + [Bare]
"""


def bare(folder: pathlib.Path) -> dict[str, str]:
    """An environment in which Python finds nothing beyond torch and triton, nor an installed fastkd."""
    (folder / "sitecustomize.py").write_text(_BARE)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], pathlib.Path]:
    """The whole of it, on a bare machine: how it ended, and what it left."""
    out, site = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(out), "--seconds", "300", "--processes", "2"]
    return subprocess.run(command, cwd=_ROOT, env=bare(site), capture_output=True, text=True, check=False), out


# --- a dry run ---------------------------------------------------------------------------------------------------

Dry = tuple[subprocess.CompletedProcess[str], pathlib.Path]


def test_a_bare_machine_is_bare(tmp_path: pathlib.Path) -> None:
    """The import hook refuses what it should, or the dry run would prove nothing."""
    for module, found in (("numpy", False), ("pytest", False), ("torch", True), ("bench.gpu", True)):
        done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=_ROOT, env=bare(tmp_path), check=False)
        assert (done.returncode == 0) == found, module


def test_a_dry_run_makes_every_step_and_fails_none(dry: Dry) -> None:
    done, out = dry
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = findings.read(out / "findings")
    ended = {each["step"] for each in found if each["kind"] == "ended" and each["ok"]}
    assert ended == {steps.FACTS.name, *(step.name for stage in steps.STAGES for step in stage)}
    assert not [each for each in found if each["kind"] in ("error", "left")]


def test_a_dry_run_checks_every_divergence_dtype_and_source(dry: Dry) -> None:
    names = [each["name"] for each in findings.read(dry[1] / "findings") if each["kind"] == "check"]
    assert len(names) == len(set(names))
    for divergence in TABLE.values():
        for dtype in cases.DTYPES:
            for kind in ("logits:", "hidden:"):
                wanted = f"{kind} {divergence()} {str(dtype)[6:]} "
                assert any(name.startswith(wanted) for name in names), wanted
    for kind in ("ghost", "renormalize", "sampled"):
        assert any(name.startswith(f"sparse: {kind} forward_kl") for name in names), kind
    for way in ("default", "several chunks", "tiles"):
        assert any(name.startswith("hidden:") and f" {way} " in name for name in names), way
    for edge in ("−inf", "masked rows", "misaligned", "reduction=none", "inplace=True", "shift=True", "2^31"):
        assert any(edge in name for name in names), edge


def test_what_a_dry_run_raced_can_be_reported(dry: Dry) -> None:
    (folder,) = (dry[1] / "results").iterdir()
    stored = store.load(folder)
    assert {"logits", "divergences", "memory", "host", "projections", "projections_soft"} <= {
        result.question for result in stored.results
    }
    assert all(value > 0 for result in stored.results for value in result.values.values())
    assert "### Forward KL (T = 2) and cross-entropy on logits" in page.text(stored)


def test_a_summary_names_machine_bars_and_steps(dry: Dry) -> None:
    told = (dry[1] / "summary.md").read_text()
    assert told.strip() in dry[0].stdout
    for heading in (
        "dry run, whose times mean nothing",
        "## Correctness",
        "## Bars",
        "## Launch table",
        "## Operations",
    ):
        assert heading in told, heading


# --- processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def staged(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Runs steps that are given as the bodies of `run(visit)`; what they found."""
    monkeypatch.setattr(conductor, "_LEAST", 0.5)
    monkeypatch.setattr(conductor, "_GRACE", 0.2)

    def run(seconds: float = 60.0, **bodies: str) -> list[Finding]:
        for name, body in bodies.items():
            text = "import os, signal, subprocess, sys, time\ndef run(visit):\n" + textwrap.indent(body, "    ")
            (tmp_path / f"{name}.py").write_text(text)
        environment = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        limits = {name: 8.0 if name.startswith("hangs") else 60.0 for name in bodies}
        conducted = Conductor(tmp_path / "out", time.monotonic() + seconds, len(bodies), environment)
        conducted.stage([Step(name, name, limits[name]) for name in bodies])
        return findings.read(tmp_path / "out" / "findings")

    return run


def test_a_step_that_hangs_is_killed_with_what_it_started_and_others_run(staged: Any, tmp_path: pathlib.Path) -> None:
    hangs = """
        visit.findings.say("check", name="before", ok=True)
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        visit.findings.say("started", pid=started.pid)
        time.sleep(600)
    """
    begin = time.monotonic()
    found = staged(hangs=textwrap.dedent(hangs), works='visit.findings.say("check", name="other", ok=True)')
    assert time.monotonic() - begin < 60
    assert {each["name"] for each in found if each["kind"] == "check"} == {"before", "other"}
    ended = {each["step"]: each for each in found if each["kind"] == "ended"}
    assert ended["works"]["ok"]
    assert ended["hangs"]["how"].startswith("killed after")
    (pid,) = (each["pid"] for each in found if each["kind"] == "started")
    state = pathlib.Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_findings_survive_a_crash_and_an_error(staged: Any) -> None:
    crashes = 'visit.findings.say("check", name="before", ok=True)\nos.kill(os.getpid(), signal.SIGSEGV)'
    found = staged(crashes=crashes, raises='raise RuntimeError("the device is lost")')
    assert [each["name"] for each in found if each["kind"] == "check"] == ["before"]
    failed = summary.failures(found)
    assert any("step crashes" in line and f"exit status {-11}" in line for line in failed), failed
    assert any("step raises" in line for line in failed), failed
    (error,) = (each for each in found if each["kind"] == "error")
    assert error["error"] == "RuntimeError: the device is lost"


def test_what_the_time_does_not_suffice_for_is_said(staged: Any) -> None:
    found = staged(seconds=0.1, works="pass")
    assert [each["kind"] for each in found] == ["left"]
    visit = visiting(until=time.monotonic() + 0.05)
    assert list(visit.mine(["a", "b"], at_least=60)) == []
    assert visit.findings.said == [("left", {"count": 2, "first": "a"})]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: pathlib.Path) -> None:
    Findings(tmp_path / "a.jsonl", step="one").say("check", ok=True)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"kind": "che')
    assert findings.read(tmp_path) == [{"kind": "check", "step": "one", "ok": True}]


def test_every_walk_has_processes_of_its_own() -> None:
    stage = (Step("rows", "m", 9, processes=4, walks=5), Step("other", "m", 9, processes=2))
    jobs = conductor.jobs_of(stage, ("sweeps", "cluster"), at_once=8)
    counted = {(job.step.name, job.walk, job.seconds) for job in jobs}
    assert counted == {("rows", "sweeps", 9), ("other", "sweeps", 9), ("rows", "cluster", 5)}
    assert [str(job) for job in jobs] == [
        *(f"rows-{part}" for part in range(4)),
        *(f"other-{part}" for part in range(2)),
        *(f"rows-cluster-{part}" for part in range(2)),
    ]


def test_the_limits_of_all_steps_fit_into_six_minutes() -> None:
    with_walks = 0.0
    for stage in ((steps.FACTS,), *steps.STAGES):
        alone = [step.seconds + 2 * (step.walks or 0) for step in stage if step.alone]
        with_walks += sum(alone) + max((step.seconds for step in stage if not step.alone), default=0)
    assert with_walks <= steps.SECONDS < 360


@pytest.mark.parametrize(
    "step", [steps.FACTS, *(step for stage in steps.STAGES for step in stage)], ids=lambda s: s.name
)
def test_every_step_is_a_module_that_runs(step: Step) -> None:
    assert callable(importlib.import_module(step.module).run)


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match="'tea' is no step; steps are facts, calls"):
        steps.selected(["facts", "tea"])


def test_make_gpu_makes_no_environment() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "gpu", "PYTHON=some-python"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["some-python", "-m", "bench.gpu"]
