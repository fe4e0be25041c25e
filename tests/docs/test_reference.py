"""The API reference has every public name, and no other."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import fastkd
import fastkd.cache

REFERENCE = Path(__file__).parents[2] / "docs/reference"
PUBLIC = {
    *(f"fastkd.{name}" for name in fastkd.__all__),
    *(f"fastkd.cache.{name}" for name in fastkd.cache.__all__),
    "fastkd.terms.Batch",
    "fastkd.terms.Term",
    "fastkd.training.trainer.Course",
    "fastkd.training.trainer.KDTrainer",
}


def documented():
    hooks = runpy.run_path(str(REFERENCE.parent / "hooks.py"))
    texts = (page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    pages = [text.replace("<!-- divergences -->", hooks["divergences"]()) for text in texts]
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]


def test_every_public_name_once():
    pytest.importorskip("mkdocs")
    assert sorted(documented()) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_it_says_what_it_is(name):
    module, attribute = name.rsplit(".", 1)
    found = getattr(__import__(module, fromlist=[attribute]), attribute)
    assert found.__doc__
    assert not found.__doc__.startswith(f"{attribute}(")  # what dataclasses make where nobody wrote anything
