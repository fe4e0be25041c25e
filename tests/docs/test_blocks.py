"""Every Python block of the README and of the site runs when it is pasted into a fresh interpreter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: What a block may need beyond the test extra.
OPTIONAL = ("liger_kernel", "torchtune", "trl")


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, found in enumerate(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE), 1):
            line = text.count("\n", 0, found.start()) + 2
            yield pytest.param(page, line, found[1], id=f"{page.relative_to(ROOT)}-{number}")


@pytest.mark.parametrize(("page", "line", "source"), list(blocks()))
def test_block(page, line, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a block writes
    torch.manual_seed(0)
    code = compile("\n" * (line - 1) + source, str(page), "exec")  # a failure names the line of the page
    for package in OPTIONAL:
        if re.search(rf"^\s*(from|import) {package}\b", source, re.MULTILINE):
            pytest.importorskip(package, exc_type=ImportError)
    exec(code, {"__name__": "__main__"})


def test_there_are_blocks():
    assert len(list(blocks())) > 15


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
