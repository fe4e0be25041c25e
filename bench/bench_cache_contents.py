"""What is in a cache: how many bytes, and how far a student's gradient turns when it stands in for the teacher."""

from __future__ import annotations

import math
import pathlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

import fastkd.cache
from bench.harness import machine
from bench.harness.question import Case, Question, Section, within
from bench.harness.race import Benchmark, measure
from bench.rivals import teachers
from fastkd import Projection, SparseTargets

SIZE = Question(
    "cache_size",
    Section.CACHES,
    "Files of a finished cache, everything included",
    "The number is k. The least is what k ids and log-probabilities take: 16 bits an id at this vocabulary.",
    unit="bytes per token",
)
GRADIENT = Question(
    "cache_gradient",
    Section.CACHES,
    "Angle between two gradients of the student's head: from a cache, and from the teacher's whole rows (T = 1)",
    "0 degrees is distillation from whole rows. The teacher is SmolLM2-135M on 4096 tokens of IMDB reviews, and the "
    "student is SmolLM2 restricted to its first H principal directions (`hidden H/576`). The number behind a format "
    "is k; `ghost` is what fastkd does with a top-k cache, `renormalize` scales the k probabilities to sum to 1.",
    unit="degrees",
)
CASES = (
    Case(SIZE, 1 << 15, 50257, torch.float32, (within("sampled 12", None, 40), within("topk 64", None, 300))),
    *(
        Case(
            GRADIENT,
            4096,
            teachers.VOCAB,
            torch.float32,
            (
                within("sampled 12", "ghost 64", 1.0),
                within("sampled 64", "ghost 64", 1.0),
                within("ghost 64", "renormalize 64", 1.0),
                within("ghost 12", None),
            ),
            hidden=(directions, teachers.HIDDEN),
        )
        for directions in (16, 64, 256)
    ),
)


def bench_cache_contents(benchmark: Benchmark, case: Case, tmp_path: pathlib.Path) -> None:
    values = {SIZE: _sizes, GRADIENT: _angles}[case.question]
    measure(benchmark, case, lambda: values(case, tmp_path))


def _sizes(case: Case, folder: pathlib.Path) -> dict[str, float]:
    """Bytes per token of whole directories, as the file system counts their content."""
    generator = machine.generator()
    ids = torch.randint(case.vocab, (case.rows // 128, 128), generator=generator)
    states, head = torch.randn(case.vocab, 8, generator=generator), torch.randn(case.vocab, 8, generator=generator)

    def teacher(batch: Any) -> Projection:
        return Projection(states[batch["input_ids"]], head)

    found = {}
    for name, k in (("sampled", 12), ("topk", 64)):
        directory = folder / name
        cache = fastkd.cache.write(teacher, ids.split(8), directory, format=name, k=k)
        assert cache.tokens == ids.numel()
        found[f"{name} {k}"] = sum(path.stat().st_size for path in directory.rglob("*")) / cache.tokens
    return found


def _angles(case: Case, folder: pathlib.Path) -> dict[str, float]:
    """Degrees, per format."""
    assert case.hidden is not None
    teacher, ids = teachers.rows_of(case.rows), teachers.windows(case.rows)
    sequences = [{"input_ids": some, "rows": rows} for some, rows in zip(ids, teacher.hidden, strict=True)]
    batches = [default_collate(sequences[i : i + 8]) for i in range(0, len(sequences), 8)]
    student = _student(teacher, case.hidden[0])
    dense = _gradient(student, teacher)

    def cached(format: Any, k: int) -> SparseTargets:
        cache = fastkd.cache.write(
            lambda batch: replace(teacher, hidden=batch["rows"]), batches, folder / f"{format}-{k}", format=format, k=k
        )
        targets = cache.targets(sequences)
        assert isinstance(targets, SparseTargets)
        return targets

    targets = {f"sampled {k}": cached("sampled", k) for k in (12, 64)}
    targets |= {f"ghost {k}": cached("topk", k) for k in (12, 64)}
    targets["renormalize 64"] = replace(targets["ghost 64"], kind="renormalize", rest=None)
    return {name: _degrees(_gradient(student, sparse), dense) for name, sparse in targets.items()}


def _student(teacher: Projection, directions: int) -> Projection:
    """The teacher restricted to the first principal directions of its hidden states."""
    _, basis = torch.linalg.eigh(teacher.hidden.flatten(0, 1).T @ teacher.hidden.flatten(0, 1))
    basis = basis[:, -directions:]
    return Projection(teacher.hidden @ basis, (teacher.weight @ basis).requires_grad_())


def _gradient(student: Projection, teacher: Projection | SparseTargets) -> Tensor:
    """Of forward KL, w.r.t. the student's head."""
    kd = fastkd.KDLoss(temperature=1.0, soft_weight=1.0, hard_weight=0.0)
    (gradient,) = torch.autograd.grad(kd(student, teacher), student.weight)
    return gradient


def _degrees(actual: Tensor, expected: Tensor) -> float:
    a, b = actual.flatten().double(), expected.flatten().double()
    return math.degrees(math.acos(min(1.0, float(a @ b / (a.norm() * b.norm())))))
