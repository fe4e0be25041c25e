"""How `pytest bench/` finds, chooses and stores benchmarks; see the package's docstring for what it does."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest

from bench import machine, report, shapes

#: Peak memory is measured once: it hardly depends on the allocator.
collect_ignore = [] if machine.allocator() == "default" else ["bench_memory.py"]

_failed: list[str] = []
_STORED = pytest.StashKey[pathlib.Path | None]()  # the folder of this run's results
_SECOND_PASS = "FASTKD_BENCH_SECOND_PASS"  # set for the pytest that this one starts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer cases and rounds, at most 256 rows per case")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    options = config.option
    config.stash[_STORED] = None
    if options.benchmark_disable or options.benchmark_json or options.collectonly:
        return
    folder = machine.results() / "quick" if options.quick else machine.results()
    folder.mkdir(parents=True, exist_ok=True)
    options.benchmark_json = str(folder / f"{machine.allocator()}.json")
    config.stash[_STORED] = folder
    # A pass in which everything fails stores nothing: what an earlier run left must not stand in for it.
    for name in report.ALLOCATORS if _both_passes() else (machine.allocator(),):
        (folder / f"{name}.json").unlink(missing_ok=True)


def _both_passes() -> bool:
    return machine.HUGE_PAGES not in os.environ


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = shapes.selected(metafunc.module.CASES, metafunc.config.option.quick)
        metafunc.parametrize("case", cases, ids=[str(case).replace(" ", "-") for case in cases])


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.option.quick)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Ours, without the host's name and the long list of processor flags."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {"brand_raw": machine.cpu()}
    machine_info["bench"] = machine.facts()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    output_json["failed"] = list(_failed)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """After pytest's own summary: the pass with huge pages, then the report on both."""
    yield
    folder = session.config.stash[_STORED]
    if folder is None or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    if _both_passes():
        print("\n\nAgain, with huge pages for torch's tensors:", flush=True)
        invocation = session.config.invocation_params
        second = subprocess.run(
            [sys.executable, "-m", "pytest", *invocation.args],
            cwd=invocation.dir,
            env={**os.environ, machine.HUGE_PAGES: "1", _SECOND_PASS: "1"},
            check=False,
        )
        if second.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if _SECOND_PASS not in os.environ and any(folder.glob("*.json")):
        print(f"\n\n{report.write(folder)}\n\nStored in {folder.relative_to(machine.ROOT)}")
