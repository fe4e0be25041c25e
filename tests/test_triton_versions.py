"""Every kernel compiles with the Triton that is installed, and `backends()` names one that is out of range.

`make triton-versions` runs this file with the oldest and the newest Triton that the package supports.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from fastkd import backend
from fastkd.divergences import TABLE
from fastkd.kernels import gpu
from tools.machine_code import static
from tools.machine_code.offline import TARGETS, compiled, resources

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

#: What `tools.machine_code.static` reads, and what it leaves out. A version breaks on what is written, seldom on the
#: GPU that it is compiled for: so AMD gets some of it.
BUILDS = [
    *(("sm_90", case) for case in static.CASES),
    *(("gfx942", case) for case in static.CASES[::4]),
    *(("sm_90", static.stage(name, "statistics")) for name in TABLE),
    *(("sm_90", static.stage(name, "gradient")) for name in TABLE),
    *(("sm_90", static.stage(name, "terms")) for name, row in TABLE.items() if row.normalised),
    *(("sm_90", static.sparse(name, "ghost", 12)) for name, row in TABLE.items() if row.tempered),
    *(("sm_90", static.stage(static.MIXES[0], stage)) for stage in ("statistics", "terms", "gradient")),
    *(("sm_90", static.sparse(name, "ghost", 12)) for name in static.MIXES),
]


@pytest.mark.parametrize(("target", "case"), [pytest.param(*build, id=f"{build[0]}-{build[1]}") for build in BUILDS])
def test_every_kernel_compiles(target: str, case: static.Case) -> None:
    with compiled(TARGETS[target]) as kernels:
        case.launch(50257)
    assert kernels
    assert all(kernel.asm["ttgir"] for kernel in kernels)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_kernels_beside_the_loss_compile(target: str) -> None:
    """Every argument that may be absent, and the numbers that Triton makes constants: one row, sequences of one."""
    scale, labels, weights = torch.ones(6), torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.float64)
    with compiled(TARGETS[target]) as kernels:
        for student in (torch.empty(6, 1, 9), torch.empty(2, 3, 9), torch.empty(1, 9)):
            rows = student.shape[:-1].numel()
            y, w = labels[:rows], weights[:rows]
            for divisor in (None, 3.0, torch.ones(1)):
                gpu.row_scales(student, y, w, divisor, -100, student.dim() > 2, False)
                gpu.row_scales(student, None, None, divisor, -100, False, True)
            gpu.weighted_total(scale[:rows], scale[:rows], scale[:rows], scale[:rows], 1.0, 0.5)
            gpu.weighted_total(scale[:rows], scale[:rows], None, scale[:rows], 1.0, 0.5)
    assert len(kernels) == 24
    assert all(resources(kernel).spills == 0 for kernel in kernels)


def test_the_version_asked_for_is_the_one_tested() -> None:
    assert triton.__version__ == os.environ.get("TRITON_TEST_VERSION", triton.__version__)
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
