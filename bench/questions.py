"""All questions, found in the files that ask them: every `bench_*.py` beside this one, by the cases it declares."""

from __future__ import annotations

import importlib
import pathlib

from bench.harness.question import Question, Section

__all__ = ["QUESTIONS"]


def _found() -> list[Question]:
    files = sorted(pathlib.Path(__file__).parent.glob("bench_*.py"))
    modules = [importlib.import_module(f"bench.{path.stem}") for path in files]
    return list(dict.fromkeys(case.question for module in modules for case in module.CASES))


#: Name → question, in the order of the report.
QUESTIONS = {each.name: each for section in Section for each in _found() if each.section == section}
