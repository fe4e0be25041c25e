"""One visit to a GPU: is fastkd right there, and how fast is it?

    make gpu                                      everything, in at most 6 minutes
    python -m bench.gpu --steps facts,calls       some of it
    python -m bench.gpu --dry                     the same code on small CPU tensors, for a machine without a GPU

It needs a checkout, torch and triton: no install, no network, no pytest, no C++ build (Triton itself starts a C
compiler). Peers are raced where they can be imported. Start it in the root of the checkout.

Every step runs in processes of its own, each with a time limit, and writes what it finds when it finds it. So a step
that fails, hangs or poisons its CUDA context costs only what it had not written yet. Correctness comes first: steps of
one stage run side by side, since compiling is most of their time. Steps that time have the GPU to themselves.

What is written:

    OUT/findings/*.jsonl       every finding, one JSON object a line
    OUT/logs/*.log             what the processes printed
    OUT/summary.md             what came of it, which is printed too
    bench/results/<gpu>/       results.json, which `python -m bench.report` makes reports and the README's rows from
                               (a dry run: OUT/results/)

The exit status is 0 if every step ran to its end and every check that was made passed. A bar that is not met is
reported and does not count. A check that the time did not suffice for is counted in the summary; a step that could not
even begin is a failure.

Times are of the device: events on a stream that is kept busy before them, so that launching is not in them. L2 is
flushed and inputs are drawn anew before each turn; contenders take turns; medians are kept.

`steps` says what there is to do, `conductor` starts the processes, `child` is what they run. `device` is the GPU and
its twin on the CPU, which lets a dry run execute the same code.
"""

from bench.gpu import checkout

checkout.make_importable()
