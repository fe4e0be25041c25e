"""`python -m bench.gpu`: see the package."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from dataclasses import replace

import bench.gpu
from bench.gpu import findings, results, summary
from bench.gpu.checkout import ROOT
from bench.gpu.conductor import Conductor
from bench.gpu.steps import FACTS, SECONDS, STAGES, selected
from bench.harness import machine

#: Processes at once, at least: as many as a stage has steps and walks, so that each begins on a few cores too.
_LEAST_PROCESSES = 17
#: Many processes at once: threads of all would wait for each other. The little that is computed on the CPU needs one.
_ALWAYS = {"OMP_NUM_THREADS": "1"}
#: No GPU is seen, and nothing is compiled.
_DRY = {"CUDA_VISIBLE_DEVICES": "", "CXX": "none"}


def main() -> int:
    begin = time.monotonic()
    names = [FACTS.name, *(step.name for stage in STAGES for step in stage)]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=bench.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", default=",".join(names), help="of %(default)s; facts come with any (default: all)")
    parser.add_argument("--dry", action="store_true", help="small CPU tensors; no GPU is needed, times mean nothing")
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "runs" / "gpu", help="a folder (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=None, help=f"at once (default: cores, or {_LEAST_PROCESSES})")
    options = parser.parse_args()
    try:
        stages = selected([name for name in options.steps.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    if not options.dry and machine.DEVICE.type != "cuda":
        parser.error("torch sees no GPU; --dry makes the same steps on small CPU tensors")
    found = options.out / "findings"
    for stale in found.glob("*.jsonl"):
        stale.unlink()
    cache = {"TRITON_CACHE_DIR": str(options.out.resolve() / "triton")}
    environment = _ALWAYS | cache | (_DRY if options.dry else {})
    cores = os.cpu_count() or 1
    processes = options.processes or (cores if options.dry else max(cores, _LEAST_PROCESSES))
    conductor = Conductor(options.out, begin + options.seconds, processes, environment)
    conductor.stage((FACTS,))
    first = findings.read(found)
    if any(each["kind"] == "first" for each in first):
        offered = next(tuple(each["walks"]) for each in first if each["kind"] == "facts")
        if options.dry:  # times mean nothing, and need no stage of their own
            stages = [tuple(replace(step, alone=False, processes=1) for stage in stages for step in stage)]
        for stage in stages:
            conductor.stage(stage, offered)
    return _conclude(options.out, options.dry)


def _conclude(out: pathlib.Path, dry: bool) -> int:
    """Write the summary and the results; the exit status."""
    found = findings.read(out / "findings")
    failed = summary.failures(found)
    kept = []
    for facts in (each for each in found if each["kind"] == "facts"):
        folder = (out / "results" if dry or failed else ROOT / "bench" / "results") / facts["folder"]
        kept = results.keep(found, folder)
        if kept:
            print(f"Stored in {folder}; python -m bench.report makes reports and the README's rows of it.")
    told = summary.text(found, kept)
    (out / "summary.md").write_text(told)
    print(told)
    print(f"{len(failed)} failures" if failed else "No failure")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
