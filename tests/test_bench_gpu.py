"""The visit to a GPU, where there is none: a dry run of all of it, and what it does of hangs, crashes and errors."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import fastkd
from bench.gpu import (
    check_calls,
    check_hidden,
    check_logits,
    check_repeats,
    check_sparse,
    conductor,
    findings,
    launch_table,
    raced,
    results,
    steps,
    summary,
    walks,
)
from bench.gpu.__main__ import _conclude
from bench.gpu.conductor import Conductor
from bench.gpu.device import Cpu, Cuda, Device
from bench.gpu.findings import Finding, Findings
from bench.gpu.steps import Step
from bench.gpu.visit import Visit
from bench.harness import store
from bench.report import compared, page, readme
from fastkd import reference
from fastkd.divergences import TABLE
from fastkd.kernels.gpu import rows as kernels
from tests import cases, compare
from tests.triton_interpreter import interpreted
from tools.machine_code.offline import TARGETS, compiled, threads

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


# --- a dry run --------------------------------------------------------------------------------------------------

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
    assert not (_ROOT / "bench" / "results" / folder.name / "results.json").samefile(folder / "results.json")


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


# --- processes --------------------------------------------------------------------------------------------------


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
    done = subprocess.run(["make", "-n", "gpu", "PYTHON=some-python"], cwd=_ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["some-python", "-m", "bench.gpu"]


# --- checks that can fail ---------------------------------------------------------------------------------------


class _Said:
    """Findings that are kept."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def say(self, kind: str, **facts: Any) -> None:
        self.said.append((kind, facts))


def visiting(until: float = float("inf"), parts: int = 1) -> Any:
    return Visit(Cpu(), _Said(), until, 0, parts)  # type: ignore[arg-type]


def outcomes(visit: Any) -> set[bool]:
    assert visit.findings.said
    return {facts["ok"] for _, facts in visit.findings.said}


@pytest.mark.parametrize(("module", "parts"), [(check_logits, 29), (check_hidden, 37), (check_sparse, 31)])
def test_a_gradient_that_is_a_little_off_fails(module: Any, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = fastkd.kd_loss

    def off(*arguments: Any, **settings: Any) -> torch.Tensor:
        """By 2 %, but for the reference, which judges."""
        loss = exact(*arguments, **settings)
        judges = fastkd.backend.forced() == "reference"
        return loss if judges else loss.detach() + 1.02 * (loss - loss.detach())

    module.run(right := visiting(parts=parts))
    assert outcomes(right) == {True}
    monkeypatch.setattr(fastkd, "kd_loss", off)
    module.run(wrong := visiting(parts=parts))
    passed = [facts["name"] for _, facts in wrong.findings.said if facts["ok"]]
    assert all("V=1 " in name for name in passed), "of one token the gradient is 0"


def test_a_bit_that_differs_fails() -> None:
    calls = iter(range(100))
    step = lambda: (torch.ones(3), torch.tensor([1.0, 2.0 + (next(calls) == 4) * 1e-6, 3.0]))  # noqa: E731
    with pytest.raises(AssertionError, match="1 of 3 × 6 numbers differ"):
        check_repeats.judge(Cpu(), step, 3)


def test_a_failing_check_is_a_failing_visit(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Findings(tmp_path / "findings" / "a.jsonl", step="calls", walk="sweeps")
    said.say("first", loss=1.0)
    with Visit(Cpu(), said, float("inf")).check("fine"):
        pass
    assert _conclude(tmp_path, dry=True) == 0
    with Visit(Cpu(), said, float("inf")).check("wrong"):
        compare.assert_value(torch.ones(1), torch.zeros(1))
    assert _conclude(tmp_path, dry=True) == 1
    assert "FAILED wrong [sweeps]: AssertionError: value: 1 of 1 off" in capsys.readouterr().out


def test_a_visit_without_a_loss_is_a_failing_visit(tmp_path: pathlib.Path) -> None:
    Findings(tmp_path / "findings" / "a.jsonl", step="facts", walk="sweeps").say("note")
    assert _conclude(tmp_path, dry=True) == 1


# --- bars -------------------------------------------------------------------------------------------------------

_FACTS = {"gpu": "Imagined GPU", "cuda": "13.0", "cpu": "a", "cores": 2, "threads": 2, "torch": "3", "fastkd": "0"}
_FACTS |= {"torch_capability": "b", "backend": "c", "allocator": "default", "transparent_huge_pages": "never"}


def found_of(*races: Finding) -> list[Finding]:
    facts = {"kind": "facts", "machine": _FACTS, "commit": "0" * 40, "changed": False, "date": "2030-01-01T00:00"}
    return [{**facts, "walks": ["sweeps"], "step": "facts", "walk": "sweeps", "folder": "imagined"}, *races]


def raced_in(case: Any, walk: str = "sweeps", **times: float) -> Finding:
    bars = [vars(bar) for bar in case.bars]
    described = {"question": case.question.name, "case": str(case), "unit": case.question.unit, "work": case.work}
    named = {name.replace("_", " "): [seconds] * 3 for name, seconds in times.items()}
    return {"kind": "race", "step": "t", "walk": walk, **described, "bars": bars, "times": named, "errors": {}}


@pytest.mark.parametrize(("fastkd_seconds", "met"), [(1.0, True), (1.2, False)])
def test_a_bar_is_a_share_of_copy_speed(fastkd_seconds: float, met: bool, tmp_path: pathlib.Path) -> None:
    (case,) = (
        case for case in raced.logits() if str(case) == "8192x128256 bfloat16" and case.question.name == "logits"
    )
    race = raced_in(case, fastkd=fastkd_seconds)
    race["times"]["add out="] = [0.9] * 3
    kept = results.keep(found_of(race), tmp_path)
    (verdict,) = (verdict for result in kept for verdict in result.verdicts() if verdict.met is not None)
    assert verdict.met == met
    assert f"- {'met' if met else 'NOT MET'}: logits, 8192x128256" in summary.text(found_of(race), kept)


def test_a_walk_is_judged_beside_the_default_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = type(sys)("fastkd.kernels.gpu.walks")
    offered.WALKS = ("sweeps", "cluster", "tickets")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, offered.__name__, offered)
    assert walks.available() == ("sweeps", "cluster", "tickets")
    try:
        importlib.reload(raced)
        (case,) = (case for case in raced.logits() if case.rows == 64)
        races = raced_in(case, fastkd=1.0, add=0.1), raced_in(case, "cluster", fastkd_cluster=0.25, add=0.2)
        (result,) = results.keep(found_of(*races[::-1]), tmp_path)
    finally:
        monkeypatch.undo()
        importlib.reload(raced)
    assert result.values == {"fastkd": 1000.0, "add": 100.0, "fastkd cluster": 250.0}
    assert result.ours == "fastkd"
    (verdict,) = (verdict for verdict in result.verdicts() if verdict.met is not None)
    assert (verdict.bar.ours, verdict.measured, verdict.met) == ("fastkd cluster", 4.0, True)
    assert not any("tickets" in bar.ours for bar in result.bars)


def test_a_race_with_what_compiles_replaces_the_one_without(tmp_path: pathlib.Path) -> None:
    turns = raced.turns(raced.HIDDEN)
    assert [turn.compiling for turn in turns] == sorted(turn.compiling for turn in turns)
    (case,) = {turn.case for turn in turns if turn.compiling and turn.case.question.name == "projections"}
    races = raced_in(case, fastkd=1.0, eager=2.0), raced_in(case, fastkd=1.5, eager=2.5, compile=3.0)
    (result,) = results.keep(found_of(*races), tmp_path)
    assert result.values == {"fastkd": 1500.0, "eager": 2500.0, "compile": 3000.0}


def test_without_a_gpu_nothing_but_a_dry_run_is_made(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU; --dry makes" in done.stderr
    assert not any(tmp_path.iterdir())


def test_without_walks_there_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastkd.kernels.gpu.walks", None)
    assert walks.available() == ("sweeps",)


# --- the README -------------------------------------------------------------------------------------------------


def headlined() -> list[Any]:
    asked = {(headline.question, headline.case) for headline in compared.ON_GPUS}
    return [case for case in (*raced.logits(), *raced.HIDDEN) if (case.question.name, str(case)) in asked]


def test_every_headline_of_a_gpu_is_raced() -> None:
    assert len(headlined()) == len(compared.ON_GPUS)
    memory = {(case.question.name, str(case)) for case in (raced.LOGITS_MEMORY, raced.HIDDEN_MEMORY)}
    assert {(each.memory, each.case) for each in compared.ON_GPUS if each.memory} == memory


def test_the_readme_has_a_gpus_rows_once_it_was_visited(tmp_path: pathlib.Path) -> None:
    """Numbers of nobody, in a folder that is thrown away."""
    races = (raced_in(case, fastkd=0.002, eager=0.03, trl=0.005) for case in headlined())
    results.keep(found_of(*races), tmp_path / "bench" / "results" / "imagined")
    text = readme.updated(
        re.sub(r"<!-- bench/results.*?end -->", "", (_ROOT / "README.md").read_text(), flags=re.S), tmp_path
    )
    assert "No GPU has run" not in text
    for headline in compared.ON_GPUS:
        assert f"| {headline.label} | 2 ms | 15× |" in text
    assert "Measured on Imagined GPU, torch 3, 2030-01-01. [Report](bench/results/imagined/report.md)" in text


def test_the_readme_says_what_is_proved_without_a_gpu() -> None:
    text = (_ROOT / "README.md").read_text()
    assert readme.updated(text, _ROOT) == text
    makefile = (_ROOT / "Makefile").read_text()
    for version in re.findall(r"^(?:OLDEST|NEWEST)_TRITON := (\S+)$", makefile, re.MULTILINE):
        assert version in readme._WITHOUT_A_GPU
    static = (_ROOT / "tools" / "machine_code" / "static.md").read_text()
    assert re.search(r"^0 of \d+ kernels miss one\.$", static, re.MULTILINE), (
        "a kernel spills, and the README denies it"
    )


# --- the launch table -------------------------------------------------------------------------------------------


def test_a_setting_of_the_launch_table_is_what_is_compiled() -> None:
    (case,) = launch_table.cases(small=True)
    given = launch_table.arguments(Cpu(), case, 16)
    setting = launch_table.Setting(threads=256, vectors=1, registers=96)
    with compiled(TARGETS["sm_90"]) as found:
        with launch_table.shaped(setting):
            kernels.kd_rows(*given)
        kernels.kd_rows(*given)
    shaped, usual = found
    assert (threads(shaped), shaped.metadata.maxnreg) == (256, 96)
    assert (threads(usual), usual.metadata.maxnreg) == (128, 255)


@pytest.mark.parametrize("setting", launch_table.settings()[::5], ids=str)
def test_a_loss_is_right_in_every_shape(setting: launch_table.Setting) -> None:
    case = launch_table.Case("forward_kl", 2, 2500, torch.float32, torch.float32)
    given = launch_table.arguments(Cpu(), case, 2)
    with interpreted(), launch_table.shaped(setting):
        soft, hard = kernels.kd_rows(*given)
    outcomes = []
    for dtype in (torch.float64, torch.float32):
        grad = torch.empty(2, case.vocab, dtype=dtype)
        wide = given._replace(student=given.student.to(dtype), teacher=given.teacher.to(dtype), grad=grad)
        outcomes.append((*reference.kd_rows(*wide), grad))
    truth, eager = outcomes
    compare.assert_value(soft, truth[0], eager[0])
    compare.assert_value(hard, truth[1], eager[1])
    compare.assert_gradient(given.grad, eager[2], truth[2])


# --- the device that is not there -------------------------------------------------------------------------------


def test_the_twin_has_all_that_the_device_has() -> None:
    public = {name for name in vars(Cuda) if not name.startswith("_")}
    assert public <= set(vars(Device))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """On CPU tensors, with streams, events and graphs that only note what is asked of them."""
    device = object.__new__(Cuda)
    device.kind = "cpu"
    device.generator = torch.Generator()
    device._other = torch.zeros(4, dtype=torch.int32)
    asked = mock.MagicMock()
    for name in ("Stream", "stream", "current_stream", "Event", "CUDAGraph", "graph", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(asked, name))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", asked.set_sync_debug_mode)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    device.asked = asked  # type: ignore[attr-defined]
    return device


def test_a_time_is_taken_between_events_behind_a_busy_stream(cuda: Any) -> None:
    cuda.asked.Event.return_value.elapsed_time.return_value = 2.0
    assert cuda.seconds(lambda: cuda.asked.run()) == pytest.approx(2e-3)
    order = [name for name, _, _ in cuda.asked.mock_calls]
    wanted = ["_sleep", "Event().record", "run", "Event().record", "Event().synchronize", "Event().elapsed_time"]
    assert [name for name in order if name in wanted] == wanted


def test_a_graph_that_computes_nothing_is_seen(cuda: Any) -> None:
    """What was captured is emptied before the replay."""
    (found,) = cuda.replayed(lambda: (torch.ones(3),))
    assert not found.any()
    with pytest.raises(AssertionError, match="not the same bits"):
        check_calls._same((found,), (torch.ones(3),))


def test_what_the_device_is_asked_for_is_undone(cuda: Any) -> None:
    with pytest.raises(RuntimeError, match="waits"), cuda.no_synchronisation():
        raise RuntimeError("waits")
    assert [call.args for call in cuda.asked.set_sync_debug_mode.mock_calls] == [("error",), ("default",)]
    with mock.patch.object(torch, "mm"), cuda.disturbed():
        pass
    cuda.asked.Stream().synchronize.assert_called_once_with()
    assert cuda.elsewhere(lambda: (mock.MagicMock(),))
    assert cuda.rows_that_fit(64, 100) == 8
    assert cuda.poisoned(RuntimeError("CUDA error: an illegal memory access"))
    assert not cuda.poisoned(AssertionError("off"))


def test_a_poisoned_device_ends_the_process(cuda: Any) -> None:
    visit = Visit(cuda, _Said(), float("inf"))  # type: ignore[arg-type]
    with visit.check("wrong"):
        raise AssertionError("off")
    with pytest.raises(RuntimeError, match="CUDA error"), visit.check("lost"):
        raise RuntimeError("CUDA error: an illegal memory access")
    assert [facts["ok"] for _, facts in visit.findings.said] == [False, False]


def test_what_nsight_compute_prints_is_read() -> None:
    from bench.gpu import profiles

    columns = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    lines = [
        ("0", "void at::native::fill<int>", "dram__bytes_read.sum", "Gbyte", "9"),
        ("1", "dense_kernel", "gpu__time_duration.sum", "usecond", "1,234.5"),
        ("1", "dense_kernel", "dram__bytes_read.sum", "Mbyte", "2,100.5"),
    ]
    output = "==PROF== text\n" + "\n".join(",".join(f'"{x}"' for x in line) for line in (columns, *lines))
    (values,) = profiles._launches(output)
    assert profiles._bytes(values, "dram__bytes_read.sum") == pytest.approx(2100.5e6)
    assert json.dumps(values)
