"""What engines exchange and hold at scale, by formula: bytes per rank and optimizer step, from 1 to thousands of ranks.

    python -m bench.scale                             the tables of docs/scale.md
    python -m bench.scale --ranks 8,64 --vocab 262144 --student 8B --teacher 70B
    python -m bench.scale --json                      the same as JSON
    python -m bench.scale --plot docs/images/scale.svg

Nothing runs here but arithmetic. What it counts with is the library's own: how many numbers of a row ranks exchange
(`state_fields`), what a loss holds (`fastkd.plan`), how long a cache's records are. `tests/test_scale.py` compares the
formulas with the bytes that collectives of 2 and 4 processes are given, and with the memory of one rank.
"""
