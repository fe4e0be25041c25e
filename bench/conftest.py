"""How `pytest bench/` finds, chooses and stores benchmarks; see the package's docstring for what it does."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Generator
from typing import Any

import pytest
import torch

from bench.harness import machine, store
from bench.harness.question import Case, selected
from bench.report import files

_asked: dict[str, str] = {}  # test → its question
_failed: dict[str, list[str]] = {}  # question → tests
_STORED = pytest.StashKey[pathlib.Path | None]()  # the folder of this run's results
_SECOND_PASS = "FASTKD_BENCH_SECOND_PASS"  # set for the pytest that this one starts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer cases and rounds, at most 256 rows per case, one pass")
    parser.addoption("--gated", action="store_true", help="only the questions that bench.gate compares")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    if machine.DEVICE.type == "cuda":
        torch.set_default_device(machine.DEVICE)
    options = config.option
    config.stash[_STORED] = None
    if options.benchmark_disable or options.benchmark_json or options.collectonly:
        return
    folder = machine.results() / "quick" if options.quick else machine.results()
    folder.mkdir(parents=True, exist_ok=True)
    # One document for the whole pass, cut into questions at its end.
    scratch = tempfile.TemporaryDirectory(prefix="fastkd-bench-")
    config.add_cleanup(scratch.cleanup)
    options.benchmark_json = pathlib.Path(scratch.name) / "pass.json"
    config.stash[_STORED] = folder


def _both_passes(config: pytest.Config) -> bool:
    return not config.option.quick and machine.HUGE_PAGES not in os.environ and machine.DEVICE.type == "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        options = metafunc.config.option
        cases = [case for case in selected(metafunc.module.CASES, options.quick) if _is_asked(case, options)]
        metafunc.parametrize("case", cases, ids=[str(case).replace(" ", "-") for case in cases])


def _is_asked(case: Case, options: argparse.Namespace) -> bool:
    return case.question.gated or not options.gated


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files without a case for this pass are no skipped tests."""
    chosen = [item for item in items if isinstance(item, pytest.Function) and _has_case(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _has_case(item: pytest.Function) -> bool:
    return isinstance(item.callspec.params["case"], Case)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.option.quick)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Function) -> None:
    _asked[item.nodeid] = item.callspec.params["case"].question.name


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and report.nodeid in _asked:
        _failed.setdefault(_asked[report.nodeid], []).append(report.nodeid)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Ours, without the host's name and the long list of processor flags."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {"brand_raw": machine.processor()}
    machine_info["bench"] = machine.facts()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """After pytest's own summary: the pass with huge pages, then the report on both."""
    yield
    folder = session.config.stash[_STORED]
    if folder is None:
        return
    if session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return  # stopped halfway: what is stored stays
    written = session.config.option.benchmark_json
    document = json.loads(written.read_text()) if written.exists() else None
    both = _both_passes(session.config)
    store.replace_asked(
        document, _failed, folder, machine.allocator(), machine.ALLOCATORS if both else (machine.allocator(),)
    )
    if both:
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
    if _SECOND_PASS not in os.environ and store.load(folder).passes:
        print(f"\n\n{files.write(folder)}\n\nStored in {folder.relative_to(machine.ROOT)}")
