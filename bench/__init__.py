"""Benchmarks of fastkd against what a user would take instead: one file per question, one way to time.

    pytest bench/ --benchmark-only             everything, with torch's allocator and again with huge pages
    pytest bench/ --benchmark-only --quick     fewer cases and rounds, at most 256 rows, one pass
    pytest bench/ --benchmark-disable --quick  no timing: is every contender right?
    python -m bench.report                     tables and plots again, from the stored JSON
    python -m bench.gate                       have ratios become worse than the committed baseline?
    python -m bench.static                     the Triton kernels compiled, read and estimated, without a GPU

What the README quotes is timed twice, because the first touch of fresh memory dominates eager PyTorch on CPUs: as torch
comes, and in a second pytest with `THP_MEM_ALLOC_ENABLE=1` (huge pages for torch's own tensors). Set the
variable yourself, to 0 or 1, to get that pass alone. Where there is a GPU everything runs there, timed by events, once.

Results land in `results/<machine>/`: the JSON of pytest-benchmark per question and allocator, `report.md`, and plots
where matplotlib is installed; the README's tables are written anew from what is stored. A run of some
questions (`-k projections`, one file) replaces theirs and keeps the others'; a run of some cases of a question
replaces all of it; a run that is stopped replaces nothing of the pass it was in. Name another place with
`--benchmark-json=PATH` (one pass, no report) to keep what is there.

A contender that computes something wrong fails its test. A bar that is missed does not: the report says
MISSED. Peers that are not installed are no contenders.

`names` → `questions` → `cases` → `shapes` say what is asked; `check` judges; `rivals`, `peers`, `contenders`,
`projections`, `sparse`, `training` are who competes; `race` times and `peak` weighs them; `store` → `measured` →
`report`, `plots`, `readme` say what came of it.
"""
