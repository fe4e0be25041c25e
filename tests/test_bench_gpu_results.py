"""What a visit to a GPU found: bars, walks, results on disk, and the README's rows."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from bench.gpu import (
    profiles,
    raced,
    results,
    summary,
    walks,
)
from bench.gpu.findings import Finding
from bench.harness import store
from bench.report import compared, page, readme

pytest.importorskip("triton")

_ROOT = pathlib.Path(__file__).parent.parent

# --- bars --------------------------------------------------------------------------------------------------------

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


# --- the README --------------------------------------------------------------------------------------------------


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
    folder = tmp_path / "bench" / "results" / "imagined"
    results.keep(found_of(*races), folder)
    assert page.text(store.load(folder)).startswith("# Benchmarks on Imagined GPU\n")
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


# --- Nsight Compute ----------------------------------------------------------------------------------------------


def test_what_nsight_compute_prints_is_read() -> None:
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
