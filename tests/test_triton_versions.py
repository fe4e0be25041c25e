"""Every kernel compiles with the Triton that is installed, and `backends()` names one that is out of range.

`make triton-versions` runs this file with the oldest and the newest Triton that the package supports.
"""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

from fastkd import backend
from fastkd.kernels import gpu
from tools.machine_code import static
from tools.machine_code.offline import TARGETS, compiled, resources

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

#: Of Triton, where it is not the one of all other tests.
VERSION = os.environ.get("TRITON_TEST_VERSION")

#: Beside `static.CASES`: stages and a sparse teacher for each way through a kernel, since each divergence's functions
#: are compiled in whole rows.
BESIDE = [
    *(static.stage(name, stage) for name in ("reverse_kl", "mse") for stage in ("statistics", "gradient")),
    *(static.stage(name, stage) for name in ("tvd", static.MIXES[0]) for stage in ("statistics", "terms", "gradient")),
    *(static.sparse(name, "ghost", 12) for name in ("reverse_kl", "jsd", static.MIXES[0])),
]
#: A version breaks on what is written, seldom on the GPU that it is compiled for: so AMD gets some of it. With the
#: version of the other tests the cases are compiled by `test_triton_compiled` and `test_triton_sparse`.
BUILDS = [
    *(("sm_90", case) for case in BESIDE),
    *(("sm_90", case) for case in static.CASES if VERSION),
    *(("gfx942", case) for case in static.CASES[::4] if VERSION),
]


@pytest.mark.parametrize(("target", "case"), [pytest.param(*build, id=f"{build[0]}-{build[1]}") for build in BUILDS])
def test_every_kernel_compiles(target: str, case: static.Case) -> None:
    with compiled(TARGETS[target]) as kernels:
        case.launch(50257)
    assert kernels
    assert all(kernel.asm["ttgir"] for kernel in kernels)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_kernels_beside_the_loss_compile(target: str) -> None:
    """Every argument that may be absent, and the numbers that Triton makes constants: one row, sequences of one.

    Each shape with each divisor, each of both with labels and without.
    """
    scale, labels, weights = torch.ones(6), torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.float64)
    shapes, divisors = ((6, 1, 9), (2, 3, 9), (1, 9)), (None, 3.0, torch.ones(1))
    with compiled(TARGETS[target]) as kernels:
        for index, (shape, divisor) in enumerate(itertools.product(shapes, divisors)):
            student = torch.empty(shape)
            rows = student.shape[:-1].numel()
            if index % 2:
                gpu.row_scales(student, None, None, divisor, -100, False, True)
            else:
                gpu.row_scales(student, labels[:rows], weights[:rows], divisor, -100, student.dim() > 2, False)
        for rows in (6, 1):
            gpu.weighted_total(scale[:rows], scale[:rows], scale[:rows], scale[:rows], 1.0, 0.5)
            gpu.weighted_total(scale[:rows], scale[:rows], None, scale[:rows], 1.0, 0.5)
    assert len(kernels) == 13
    assert all(resources(kernel).spills == 0 for kernel in kernels)


def test_the_version_asked_for_is_the_one_tested() -> None:
    assert triton.__version__ == (VERSION or triton.__version__)
    found = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    assert backend._OLDEST_TRITON <= found <= backend._NEWEST_TRITON


def test_a_folder_of_that_name_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Python imports as a package where none is installed."""
    monkeypatch.delattr(triton, "__version__")
    status = backend._triton_status()
    assert not status.available
    assert "is a folder of that name" in status.detail


@pytest.mark.parametrize(
    ("version", "available", "said"),
    [
        ("3.4.0", False, r"3\.4\.0 is older than 3\.5.*install PyTorch 2\.9"),
        ("3.5.1", True, r"^triton 3\.5\.1$"),
        ("3.7.1+git1234", True, r"^triton 3\.7\.1\+git1234$"),
        ("3.10.0", True, r"3\.10\.0, newer than 3\.9"),
    ],
)
def test_a_version_out_of_range_is_named(
    version: str, available: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status = backend._triton_status()
    assert status.available == available
    assert re.search(said, status.detail)
