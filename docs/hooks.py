"""Text of the site that is elsewhere in the repository: the architecture, the benchmark reports, the divergences.

mkdocs calls these functions by their names (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fastkd.divergences import __all__ as DIVERGENCES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"


def on_config(config: Any) -> Any:
    """List the reports under Benchmarks."""
    (evidence,) = (section["Evidence"] for section in config.nav if "Evidence" in section)
    evidence += [{f"Report: {name}": f"benchmarks/{name}/report.md"} for name in _machines()]
    evidence.append({"Machine code": "benchmarks/static.md"})
    evidence.append({"Machine code of clusters": "benchmarks/clusters.md"})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in `docs/`: pages, and the plots that the reports show."""
    pages = {f"benchmarks/{name}.md": ROOT / f"tools/machine_code/{name}.md" for name in ("static", "clusters")}
    for name in _machines():
        for path in (RESULTS / name / "report.md", *(RESULTS / name).glob("*.png")):
            pages[f"benchmarks/{name}/{path.name}"] = path
    for place, path in pages.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in the architecture, whose links start at the repository's root, and the list of reports; mend reports."""
    if page.file.src_uri == "architecture.md":
        _title, text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n", 1)
        text = text.replace("](tools/machine_code/", "](benchmarks/").replace("](docs/", "](")
        return markdown.replace("<!-- include ARCHITECTURE.md -->", text)
    if page.file.src_uri == "reference/divergences.md":
        return markdown.replace("<!-- divergences -->", divergences())
    if page.file.src_uri.startswith("benchmarks/"):
        # GitHub begins a list below a line of text; here it needs a blank one.
        return re.sub(r"^(?![-|#\s])(.+)\n(?=- )", r"\1\n\n", markdown, flags=re.MULTILINE)
    links = (f"- [{name}](benchmarks/{name}/report.md)" for name in _machines())
    return markdown.replace("<!-- reports -->", "\n".join(links))


def divergences() -> str:
    """What mkdocstrings is asked for: every divergence, and what they have in common."""
    return "\n\n".join(f"::: fastkd.{name}" for name in sorted(DIVERGENCES))


def _machines() -> list[str]:
    return sorted(path.parent.name for path in RESULTS.glob("*/report.md"))
