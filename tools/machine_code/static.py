"""What the Triton kernels are compiled to, on GPUs that need not be there: `python -m tools.machine_code.static`.

Compiles the kernels of its cases for the GPUs of `DEVICES`, prints what its machine code uses and moves and how long
that would take at best, and writes the same to `static.md` beside this file. Nothing is run: times are estimates. The
test suite holds a part of the table to its budgets (`Case.broken`).
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor

from fastkd import SparseTargets
from fastkd.divergences import TABLE, resolve
from fastkd.kernels import gpu
from fastkd.kernels.gpu.launch import SHARING, Block
from fastkd.kernels.gpu.walks import CLUSTER_TRITON
from fastkd.rows import RowSpec, Tile
from fastkd.sparse import sparse_rows
from tools.machine_code.offline import (
    TARGETS,
    Resources,
    Sweep,
    barriers,
    compiled,
    resident,
    resources,
    sweeps,
    thread_blocks,
    threads,
)
from tools.machine_code.roofline import DEVICES, Estimate, estimate

__all__ = [
    "CASES",
    "CLUSTER_CASES",
    "CLUSTER_TARGETS",
    "MIXES",
    "OTHER_VOCABULARIES",
    "TICKET_CASES",
    "VOCABULARIES",
    "Case",
    "Reading",
    "kd",
    "read",
    "sparse",
    "stage",
    "write",
]

VOCABULARIES = (50257, 128256)
#: Of Llama 2, Qwen 2.5 and its largest models, and Qwen 3.5.
OTHER_VOCABULARIES = (32000, 151936, 152064, 248320)
#: `walks` take clusters on these.
CLUSTER_TARGETS = ("sm_90", "sm_100")
_RESULTS = pathlib.Path(__file__).with_name("static.md")
_CLUSTERS = pathlib.Path(__file__).with_name("clusters.md")
#: Of the tensors that are compiled for; `scale_` has no tail where the number of elements is a multiple of 16.
_ROWS = 16
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Of the batch that times are estimated for.
_TOKENS = 8192
#: Columns of `fastkd.plan`'s widest vocabulary tile.
_TILE = 4096


# --- what is compiled -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A kernel and the least it can move: tensors [rows, vocab] that its sweeps read and write, all in all."""

    name: str
    launch: Callable[[int], object]  # on empty tensors of a vocabulary
    reads: int
    writes: int
    logits: torch.dtype = torch.bfloat16
    grad: torch.dtype = torch.bfloat16  # what is written
    entries: int = 0  # tokens of each row that a sparse teacher knows
    walk: str = "sweeps"  # see `fastkd.kernels.gpu.walks`

    def __str__(self) -> str:
        return f"{self.name} {self.dtypes}"

    @property
    def dtypes(self) -> str:
        names = [_SHORT[dtype] for dtype in (self.logits, self.grad)]
        return names[0] if self.logits == self.grad else "→".join(names)

    @property
    def bytes_per_logit(self) -> int:
        return self.reads * self.logits.itemsize + self.writes * self.grad.itemsize

    def broken(self, reading: Reading) -> list[str]:
        """The budgets that a reading misses, in words."""
        moved = reading.estimate.bytes_per_logit
        budgets = {
            f"{reading.resources.spills} spills": reading.resources.spills == 0,
            f"loads of {reading.narrowest} bytes": reading.narrowest == 16,
            f"{moved:g} bytes per logit instead of {self.bytes_per_logit}": moved == self.bytes_per_logit,
        }
        return [words for words, met in budgets.items() if not met]


def _spec(divergence: str, vocab: int) -> RowSpec:
    row = resolve(divergence)
    return RowSpec(row.name, row.parameters, 2.0, 2.0, 2.0, 0.5, vocab)


def kd(
    divergence: str,
    logits: torch.dtype = torch.bfloat16,
    grad: torch.dtype | None = torch.bfloat16,
    walk: str = "sweeps",
) -> Case:
    """`kd_rows` with cross-entropy, T = 2; the value alone without a `grad`."""

    def launch(vocab: int) -> None:
        student, teacher, scale = _logits(vocab, logits), _logits(vocab, logits), torch.ones(_ROWS)
        out = None if grad is None else _logits(vocab, grad)
        gpu.kd_rows(student, teacher, _labels(), scale, scale, _spec(divergence, vocab), out)

    name = ", ".join([divergence, *(["value alone"] if grad is None else []), *([walk] if walk != "sweeps" else [])])
    times = 1 + resolve(divergence).normalised + (grad is not None)
    return Case(name, launch, 2 * times, int(grad is not None), logits, grad or logits, walk=walk)


def stage(divergence: str, stage: Literal["statistics", "terms", "gradient"]) -> Case:
    """One stage of `kd_rows` on the last tile of a vocabulary, in fp32 as products leave it."""

    def launch(vocab: int) -> None:
        width, scale = vocab % _TILE, torch.ones(_ROWS)
        student, teacher = _logits(width, torch.float32), _logits(width, torch.float32)
        grad = _logits(width, torch.bfloat16) if stage == "gradient" else None
        tile = Tile(stage, vocab - width, gpu.tile_state(_ROWS, student.device))
        gpu.kd_rows(student, teacher, _labels(), scale, scale, _spec(divergence, vocab), grad, tile)

    written = stage == "gradient"
    name = f"{divergence}, tile: {stage}"
    return Case(name, launch, 2, int(written), torch.float32, torch.bfloat16 if written else torch.float32)


def sparse(
    divergence: str, kind: Literal["ghost", "sampled"], entries: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """`kd_rows` with cross-entropy beside a sparse teacher. Kernels know of no kinds, only of a number of tokens."""

    def launch(vocab: int) -> None:
        ids = torch.arange(entries).expand(_ROWS, entries)
        targets = SparseTargets(ids, torch.full(ids.shape, -9.0), kind, 2.0)
        rows, student, scale = (
            sparse_rows(targets, None, vocab, torch.float32),
            _logits(vocab, dtype),
            torch.ones(_ROWS),
        )
        gpu.kd_rows(student, rows, _labels(), scale, scale, _spec(divergence, vocab), _logits(vocab, dtype))

    return Case(f"{divergence}, {kind} {entries}", launch, 2, 1, dtype, dtype, entries)


def _logits(vocab: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(_ROWS, vocab, dtype=dtype)


def _labels() -> Tensor:
    return torch.zeros(_ROWS, dtype=torch.int64)


def _row_statistics(vocab: int) -> None:
    gpu.row_statistics(_logits(vocab), _labels(), 1.0)


def _log_softmax(vocab: int) -> None:
    gpu.log_softmax(_logits(vocab), 1.0, _logits(vocab))


def _log_softmax_backward(vocab: int) -> None:
    gpu.log_softmax_backward(_logits(vocab), _logits(vocab), torch.empty(_ROWS, 2), 1.0, _logits(vocab))


def _scale(vocab: int) -> None:
    gpu.scale_(_logits(vocab), torch.ones(()))


#: A mix with a part of the Kullback-Leibler family, and one of many parts with `about_top`.
MIXES = ("forward_kl:0.5+tvd:0.5", "jsd:0.3+reverse_kl:0.5+skew_kl:1.5")
CASES = (
    *(kd(divergence) for divergence in (*TABLE, *MIXES)),
    kd("forward_kl", grad=None),
    kd("forward_kl", torch.float16, torch.float16),
    kd("forward_kl", torch.float32, torch.float32),
    kd("forward_kl", torch.float32, torch.bfloat16),  # a chunk of a projection
    stage("forward_kl", "statistics"),
    stage("forward_kl", "gradient"),
    stage("jsd", "statistics"),
    stage("jsd", "terms"),
    stage("jsd", "gradient"),
    sparse("forward_kl", "ghost", 64),
    sparse("forward_kl", "sampled", 12),
    Case("row_statistics", _row_statistics, 1, 0),
    Case("log_softmax", _log_softmax, 2, 1),
    Case("log_softmax_backward", _log_softmax_backward, 3, 1),  # the upstream gradient twice
    Case("scale_", _scale, 1, 1),
)
TICKET_CASES = (
    *(kd(divergence, walk="tickets") for divergence in (*TABLE, *MIXES)),
    kd("forward_kl", torch.float32, torch.float32, walk="tickets"),
)
CLUSTER_CASES = (
    *(kd(divergence, walk="cluster") for divergence in (*TABLE, *MIXES)),
    kd("forward_kl", torch.float32, torch.float32, walk="cluster"),
)
#: What other vocabularies are compiled for.
_EVERYWHERE = ("forward_kl bf16", "jsd bf16", "forward_kl fp32", "forward_kl, tickets bf16", "forward_kl, cluster bf16")


# --- what it becomes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What one kernel is compiled to."""

    resources: Resources
    sweeps: tuple[Sweep, ...]
    barriers: tuple[int, int]  # of thread blocks, of clusters
    estimate: Estimate

    @property
    def instructions(self) -> float:
        """Per logit, of all sweeps."""
        return sum(sweep.instructions / sweep.columns for sweep in self.sweeps)

    @property
    def narrowest(self) -> int:
        """Bytes of the narrowest load of logits."""
        return min(width for sweep in self.sweeps for width in sweep.load_bytes)


def read(case: Case, target: str, vocab: int) -> Reading:
    with compiled(TARGETS[target]) as kernels, mock.patch.dict(os.environ, FASTKD_WALK=case.walk):
        case.launch(vocab)
    (kernel,) = kernels
    found = tuple(sweeps(kernel))
    # Every thread of a row's program meets every token that a sparse teacher knows.
    inner_iterations = case.entries * threads(kernel) / vocab
    return Reading(
        resources(kernel),
        found,
        barriers(kernel),
        estimate(found, DEVICES[target], vocab, _rows_at_once(kernel), inner_iterations),
    )


def _rows_at_once(kernel: Any) -> float:
    """Rows of a multiprocessor that are between their first and their last sweep."""
    block = next((value for value in kernel.src.constants.values() if isinstance(value, Block)), None)
    if block is None or block.slices == 1:
        return resident(kernel) / thread_blocks(kernel)
    # Between two phases of a slice lie as many as there are programs; one more of each is being read.
    return float(SHARING * block.phases / block.slices)


# --- the table --------------------------------------------------------------------------------------------------

_TRITON = importlib.metadata.version("triton")
_LEGEND = f"""\
# The Triton kernels as compiled, and estimates of their time

**Nothing here was run or measured.** Every number is read off machine code that Triton {_TRITON} compiled for GPUs
that were not there, or is an estimate from it and the GPUs' published rates. Made by
`python -m tools.machine_code.static`; with `--clusters` and Triton 3.8 or newer, of the kernels that run in clusters.

- *moves*: tensors [tokens, V] read + written, all sweeps together. With the dtypes, the budget of *bytes/logit*.
- *spills*: instructions (NVIDIA) or registers and bytes (AMD). *load*: the narrowest load of logits, in bytes.
- *DRAM*: of *bytes/logit*, those that reach DRAM: a later sweep finds in the last-level cache what there is room for of
  the rows in flight. How many these are follows from registers and threads.
- *instr.*: instructions per logit, all sweeps together. *barriers*: instructions that wait for a thread block or,
  after the +, for a cluster.
- *issue*, *exp*: the time to issue these instructions, and that of their special functions, divided by the time to move
  *DRAM* at full bandwidth. Above 1 that unit is the limit and not DRAM. What happens once per row is left out, but for
  the tokens that a sparse teacher knows: each costs every thread a look at a step's columns.
- *estimate, ms*: the longest of the three for {_TOKENS} tokens × V: a roofline, which real kernels do not reach.
- *tile*: one stage over all tiles of the rows, at most {_TILE} columns each.
- *cluster*, *tickets*: with FASTKD_WALK set to this. Clusters need Triton 3.8.
"""
_COLUMNS = {
    "kernel": "left",
    "dtype": "left",
    "moves": "left",
    "registers": "right",
    "spills": "right",
    "load": "right",
    "barriers": "right",
    "instr.": "right",
    "bytes/logit": "right",
    "DRAM": "right",
    "issue": "right",
    "exp": "right",
    "bound by": "left",
    "estimate, ms": "right",
}


def _row(case: Case, reading: Reading, vocab: int) -> tuple[object, ...]:
    blocks, clusters = reading.barriers
    return (
        case.name,
        case.dtypes,
        f"{case.reads} + {case.writes}",
        reading.resources.registers,
        reading.resources.spills,
        reading.narrowest,
        f"{blocks} + {clusters}" if clusters else blocks,
        f"{reading.instructions:.1f}",
        f"{reading.estimate.bytes_per_logit:g}",
        f"{reading.estimate.dram_bytes:.1f}",
        f"{reading.estimate.issue:.2f}",
        f"{reading.estimate.special:.2f}",
        reading.estimate.bound,
        f"{reading.estimate.milliseconds(_TOKENS * vocab):.2f}",
    )


def _report(cases: Sequence[Case], targets: Sequence[str]) -> Iterator[str]:
    yield _LEGEND
    readings = {
        (case, target, vocab): read(case, target, vocab)
        for target in targets
        for vocab in (*VOCABULARIES, *OTHER_VOCABULARIES)
        for case in cases
        if vocab in VOCABULARIES or str(case) in _EVERYWHERE
    }
    missed = [
        f"- {DEVICES[target].name}, V = {vocab}: {case}: {', '.join(broken)}"
        for (case, target, vocab), reading in readings.items()
        if (broken := case.broken(reading))
    ]
    yield "Budgets: no spills, loads of 16 bytes, the least bytes per logit."
    yield f"{len(missed)} of {len(readings)} kernels miss one{':' if missed else '.'}\n"
    yield from (*missed, "") if missed else ()
    yield "## Where DRAM is not the limit: estimates from machine code\n"
    yield "The unit that is, and its time relative to DRAM's; the larger one of both vocabularies.\n"
    limits = [
        (
            case.name,
            case.dtypes,
            *(_limit(readings[case, target, vocab] for vocab in VOCABULARIES) for target in targets),
        )
        for case in cases
    ]
    heads = ("kernel", "dtype", *(DEVICES[target].name for target in targets))
    yield tabulate([row for row in limits if any(row[2:])], heads, tablefmt="pipe")
    for target in targets:
        for vocab in sorted({vocab for _, name, vocab in readings if name == target}):
            yield f"\n## {DEVICES[target].name} ({target}), V = {vocab}: estimates from machine code\n"
            rows = [
                _row(case, reading, vocab) for (case, *where), reading in readings.items() if where == [target, vocab]
            ]
            yield tabulate(rows, list(_COLUMNS), "pipe", disable_numparse=True, colalign=list(_COLUMNS.values()))


def _limit(readings: Iterable[Reading]) -> str:
    worst = max((reading.estimate for reading in readings), key=lambda found: max(found.issue, found.special))
    return "" if worst.bound == "DRAM" else f"{worst.bound} {max(worst.issue, worst.special):.2f}"


def write() -> str:
    """Write `static.md` beside this file; return its text."""
    return _written(_RESULTS, _report((*CASES, *TICKET_CASES), tuple(DEVICES)))


def write_clusters() -> str:
    """Write `clusters.md` beside this file; return its text. Raises RuntimeError with a Triton that has no clusters."""
    if tuple(map(int, _TRITON.split(".")[:2])) < CLUSTER_TRITON:
        raise RuntimeError(f"Triton {_TRITON} cannot compile for clusters: it takes 3.8 or newer")
    return _written(_CLUSTERS, _report(CLUSTER_CASES, CLUSTER_TARGETS))


def _written(path: pathlib.Path, lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    path.write_text(text + "\n")
    return text


if __name__ == "__main__":
    print(write_clusters() if "--clusters" in sys.argv else write())
