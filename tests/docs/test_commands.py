"""Every `fastkd` command in the documents exists, and so does every option it is given."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from fastkd import cli
from tests.docs.test_blocks import PAGES

LINES = sorted(
    {
        re.sub(r"\s+#.*", "", line)
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for line in re.findall(r"^fastkd .*$", block, re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", LINES)
def test_command(line):
    _, *words = line.split()
    command = words[: 2 if words[0] == "cache" else 1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert not ended.value.code
    for option in re.findall(r"--[a-z-]+", line):
        assert re.search(rf"{option.replace('-', '[-_]')}\b", printed.getvalue()), option


def test_there_are_commands():
    assert len(LINES) > 10
