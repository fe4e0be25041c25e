"""Benchmarks of fastkd against what a user would take instead: one file per question, one way to time.

    pytest bench/ --benchmark-only             everything, with torch's allocator and again with huge pages
    pytest bench/ --benchmark-only --quick     fewer cases and rounds, at most 256 rows, one pass
    pytest bench/ --benchmark-disable --quick  no timing: is every contender right?
    python -m bench.report                     reports, plots and the README's table again, of all machines
    python -m bench.gate                       have ratios become worse than the committed baseline?

The main cases are timed twice, because the first touch of fresh memory dominates eager PyTorch on CPUs: as torch
comes, and in a second pytest with `THP_MEM_ALLOC_ENABLE=1` (huge pages for torch's own tensors). Set the
variable yourself, to 0 or 1, to get that pass alone. Where there is a GPU everything runs there, timed by events, once.

Results land in `results/<machine>/`: `results.json`, and what is made of it, `report.md` and, where matplotlib is
installed, `speedups.png` and `rates.png`; the README's table is written anew too. A run of some questions (`-k
projection`, one file) replaces theirs and keeps the others'; a run of some cases of a question replaces all of it; a
run that is stopped replaces nothing of the pass it was in. Name another place with `--benchmark-json=PATH` (one pass,
no report) to keep what is there.

A contender that computes something wrong fails its test. A bar that is missed does not: the report says
MISSED. Peers that are not installed are no contenders.

`harness` times, weighs, judges and stores, and knows no question; `rivals` are what fastkd is compared with; each
`bench_*.py` asks a question and owns its cases and bars; `questions` finds them; `report` says what came of it. Each
imports only what stands before it in this list. `gpu` is one visit to a GPU, in minutes and without pytest:
`python -m bench.gpu`.
"""
