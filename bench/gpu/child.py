"""What a process of a step runs: `python -m bench.gpu.child MODULE FINDINGS --seconds S …`; the conductor starts it."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
import warnings

from bench.gpu import walks
from bench.gpu.device import here
from bench.gpu.findings import Findings
from bench.gpu.visit import Visit

__all__ = ["main"]

_RESERVED = 3.0  # seconds of the limit that ending takes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="its function run(visit) is the step")
    parser.add_argument("findings", type=pathlib.Path)
    parser.add_argument("--step", required=True)
    parser.add_argument("--until", type=float, required=True, help="of time.monotonic(), which processes share")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    findings = Findings(options.findings, step=options.step, walk=walks.here())
    try:
        visit = Visit(here(), findings, options.until - _RESERVED, options.part, options.parts)
        importlib.import_module(options.module).run(visit)
    except Exception as error:
        findings.error(f"step {options.step}", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
