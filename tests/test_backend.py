"""Which backend runs, and what happens where the native one cannot."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd import divergences, reference
from fastkd.backend import select
from fastkd.kernels import cpu
from fastkd.kernels.cpu import interface, library


def test_status_of_every_backend() -> None:
    status = fastkd.backends()
    assert set(status) == {"cpu", "triton", "reference"}
    assert status["reference"].available
    assert status["cpu"].available, status["cpu"].detail  # this suite is about the native kernels
    if not torch.cuda.is_available():
        assert not status["triton"].available
        assert "GPU" in status["triton"].detail or "triton" in status["triton"].detail


def test_automatic_choice_and_forcing() -> None:
    x = torch.ones(1, 3)
    assert select(x) is cpu
    assert select(x.double()) is reference
    with fastkd.use_backend("reference"):
        assert select(x) is reference
        with fastkd.use_backend("cpu"):
            assert select(x) is cpu
        assert select(x) is reference
    assert select(x) is cpu
    fastkd.use_backend("reference")
    assert select(x) is reference
    fastkd.use_backend(None)
    assert select(x) is cpu


def test_forcing_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'.*cpu, triton, reference"):
        fastkd.use_backend("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'triton' is not available"):
            fastkd.use_backend("triton")
    with fastkd.use_backend("cpu"), pytest.raises(TypeError, match="float64"):
        fastkd.log_softmax(torch.ones(3, dtype=torch.float64))


WITHOUT_LIBRARY = """
import warnings, torch
from fastkd.kernels.cpu import library
library._find = lambda: []
import fastkd
assert not fastkd.backends()["cpu"].available
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        student = torch.randn(4, 50, requires_grad=True)
        fastkd.KDLoss()(student, torch.randn(4, 50), torch.zeros(4, dtype=torch.long)).backward()
        assert student.grad.abs().sum() > 0
print(len(caught), str(caught[0].message))
"""


def test_missing_library_warns_once_and_the_reference_takes_over() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=True)
    count, message = result.stdout.split(" ", 1)
    assert count == "1"
    assert "'cpu' backend is not available" in message
    assert "reinstall" in message


def test_foreign_library_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "libfastkd.so").write_bytes(b"not a library")
    found, detail = library._open([tmp_path / "libfastkd.so"])
    assert found is None
    assert "cannot be loaded" in detail


@dataclasses.dataclass(frozen=True)
class Newer(fastkd.divergences.Divergence):
    """What a later version of the package may have."""

    name = "newer"


class _WiderCall(ctypes.Structure):
    _fields_ = (*interface.KDRows._fields_, ("more", ctypes.c_int64))


@pytest.mark.parametrize(
    ("of", "name", "value", "reason"),
    [
        (library, "_ABI", 10**6, "has interface version"),
        (divergences.TABLE, "newer", Newer, "does not know the divergence newer"),
        (interface.ENTRIES, "fastkd_newer", (None, ()), "lacks fastkd_newer"),
        (interface.STRUCTURES, "KDRows", _WiderCall, "takes KDRows of"),
    ],
)
def test_a_library_older_than_the_package_is_not_available(
    of: object, name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(of, dict):
        monkeypatch.setitem(of, name, value)
    else:
        monkeypatch.setattr(of, name, value)
    monkeypatch.setattr(library, "_load", lambda: library._open(library._find()))
    available, detail = library.status()
    assert not available, detail
    assert reason in detail
    assert str(library._find()[0]) in detail
    assert "reinstall fastkd" in detail


def test_the_library_may_be_named(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", "import fastkd; print(*fastkd.backends()['cpu'])"]
    for place, expected in ((library._find()[0], "True native C++"), (tmp_path / "none.so", "False ")):
        environment = {**os.environ, "FASTKD_LIBRARY": str(place)}
        status = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert status.startswith(expected)
    assert str(tmp_path / "none.so") in status


def test_native_library_is_free_of_torch() -> None:
    path = library._find()[0]
    linked = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    assert "libgomp" in linked
    assert "torch" not in linked.replace("torch/lib/libgomp", "").replace("torch.libs/libgomp", "")


def test_one_openmp_runtime() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    student = torch.randn(64, 3000)
    fastkd.log_softmax(student)
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    maps = {line.split()[-1] for line in lines if "libgomp" in line}
    assert len(maps) == 1, maps
