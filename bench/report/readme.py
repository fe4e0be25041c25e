"""The README's blocks of results. One lies between two marks that name the folder of results it is made of; another is
made of every GPU's, or says what is known without one.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping

from bench.harness import store
from bench.harness.results import in_order
from bench.harness.store import Stored
from bench.report import compared

__all__ = ["block", "gpus", "lines", "shown", "update", "updated"]

_BEGIN, _END = "<!-- {}: begin, written by python -m bench.report -->", "<!-- {}: end -->"
_GPUS = "every GPU"  # no folder
#: The versions are those of the Makefile.
_WITHOUT_A_GPU = """\
**No GPU has run or timed the Triton kernels yet.** What is proved with Triton 3.7.1, which PyTorch 2.13 brings:
interpreted on CPU tensors they agree with float64, without a race or an access out of bounds, and compiled for sm_80,
sm_90, sm_100 and gfx942 none spills; with 3.5.1 and 3.9.0 all of them compile, and speeds are
[estimates from machine code](tools/machine_code/static.md)."""
_SETTING = """\
Forward and backward of 1024 tokens × a vocabulary of 50257 (the training step: 4096 × 49152), T = 2; hidden \
sizes are 256 and 768. A ratio such as 23× is how many times as long as fastkd it took. Each race ran with \
torch's default allocator and with huge pages; the table shows the smaller ratio. – means not measured."""
_SETTING_OF_A_GPU = """\
Forward and backward in bf16 of tokens × vocabulary, T = 2. A ratio such as 23× is how many times as long as fastkd it \
took. Times are of the device, with L2 flushed before each. – means not measured."""


def update(readme: pathlib.Path) -> None:
    """Write every block anew, from the folders beside the README."""
    readme.write_text(updated(readme.read_text(), readme.parent))


def updated(text: str, root: pathlib.Path) -> str:
    """A README with every block as the results beside it say."""
    for name in shown(text):
        text = _replaced(text, name, block(root / name))
    return _replaced(text, _GPUS, "\n".join(gpus(root / "bench" / "results")))


def _replaced(text: str, name: str, block: str) -> str:
    begin, end = _BEGIN.format(name), _END.format(name)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{block}\n{end}{after}"


def shown(text: str) -> list[str]:
    """The folders of a README's blocks."""
    return re.findall(_BEGIN.format(r"(\S+)"), text)


def block(folder: pathlib.Path) -> str:
    """Markdown: one table, one picture, and where something else is faster, on other stored machines too."""
    others = {other: store.load(other) for other in sorted(folder.parent.iterdir()) if other != folder}
    found = {other: stored for other, stored in others.items() if stored.passes}
    return "\n".join(lines(folder, store.load(folder), found))


def gpus(results: pathlib.Path) -> Iterator[str]:
    """Markdown, line by line: a table for every GPU, or one sentence where there is none."""
    stored = {folder: store.load(folder) for folder in sorted(results.iterdir())}
    found = {folder: each for folder, each in stored.items() if compared.is_gpu(each)}
    if not found:
        yield _WITHOUT_A_GPU
    for folder, each in found.items():
        yield from compared.table(each)
        yield f"\n{_SETTING_OF_A_GPU} {_measured(each)} [Report]({_path(folder)}/report.md).\n"


def lines(folder: pathlib.Path, stored: Stored, others: Mapping[pathlib.Path, Stored]) -> Iterator[str]:
    """The block, line by line."""
    yield from compared.table(stored)
    yield f"\n![How many times as long as fastkd each takes]({_path(folder)}/speedups.png)\n"
    yield f"{_SETTING} {_measured(stored)}"
    said = "; ".join(
        f"on {compared.machine_of(each)} ([report]({_path(place)}/report.md)): {compared.beaten(each.results)}"
        for place, each in {folder: stored, **others}.items()
    )
    yield f"\nWhat is faster than fastkd: {said}."


def _measured(stored: Stored) -> str:
    days = sorted(each.date[:10] for each in stored.passes)
    when = " to ".join(in_order((days[0], days[-1])))
    return f"Measured on {compared.machine_of(stored)}, torch {stored.passes[0].machine['torch']}, {when}."


def _path(folder: pathlib.Path) -> str:
    return f"bench/results/{folder.name}"
