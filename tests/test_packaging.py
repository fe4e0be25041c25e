"""The wheel: one for every Python and torch, and no top-level package but fastkd."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
#: CMake's own, without optimization at the end: what is asked is what lies in the wheel, and -O3 takes a minute.
RULE = "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O0 -o <OBJECT> -c <SOURCE>"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(ROOT)]
    subprocess.run(
        [*command, f"--config-settings=cmake.define.CMAKE_CXX_COMPILE_OBJECT={RULE}"], check=True, timeout=300
    )
    (path,) = folder.glob("*.whl")
    return path


def test_tag_and_contents(wheel: pathlib.Path) -> None:
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastkd"}
    for expected in ("fastkd/_lib/libfastkd.so", "fastkd/kernels/gpu/rows.py", "fastkd/losses.py"):
        assert expected in names
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert "Requires-Dist: torch" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_torch_is_no_build_requirement() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in 3.11")
    import tomllib

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [requirement for requirement in build if "torch" in requirement]


def test_kernels_is_not_importable() -> None:
    """A package of that name would be imported by transformers in place of the one it looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import fastkd, importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "None"
