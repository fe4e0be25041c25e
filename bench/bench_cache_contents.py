"""What is in a cache: how many bytes, and how far a student's gradient turns when it stands in for the teacher."""

from __future__ import annotations

import math
import pathlib
from dataclasses import replace
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastkd.cache
from bench import machine, shapes, teachers
from bench.cases import Case
from bench.race import measure
from fastkd import Projection, SparseTargets

CASES = shapes.CACHE_SIZE + shapes.CACHE_GRADIENT


def bench_cache_contents(benchmark: BenchmarkFixture, case: Case, tmp_path: pathlib.Path) -> None:
    values = {"cache_size": _sizes, "cache_gradient": _angles}[case.question]
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
    batches = [
        {"input_ids": some, "rows": rows} for some, rows in zip(ids.split(8), teacher.hidden.split(8), strict=True)
    ]
    student = _student(teacher, case.hidden[0])
    dense = _gradient(student, teacher)

    def cached(format: Any, k: int) -> SparseTargets:
        cache = fastkd.cache.write(
            lambda batch: replace(teacher, hidden=batch["rows"]), batches, folder / f"{format}-{k}", format=format, k=k
        )
        targets = cache.targets(list(ids))
        assert isinstance(targets, SparseTargets)
        return targets

    targets = {f"sampled {k}": cached("sampled", k) for k in (12, 64)}
    targets |= {f"ghost {k}": cached("topk", k) for k in (12, 64)}
    targets["renormalize 64"] = replace(targets["ghost 64"], kind="renormalize", rest=None)
    return {name: _degrees(_gradient(student, sparse), dense) for name, sparse in targets.items()}


def _student(teacher: Projection, directions: int) -> Projection:
    """The teacher seen through the largest principal directions of its hidden states."""
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
