"""The table: names, parameters, limits, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import TABLE, resolve
from fastkd.kernels import cpu
from fastkd.sparse import sparse_rows
from tests import cases
from tests.memory import printed
from tests.sparse_targets import kept


def test_every_row_has_its_eager_function() -> None:
    assert set(TABLE) == set(reference.DIVERGENCES) | {"mse"}


LOSSES = """
import importlib, sys, torch
from fastkd import divergences
from fastkd.kernels import cpu
from fastkd.kernels.cpu import library
if sys.argv[1] == "reversed":
    rows = list(divergences.TABLE.items())[::-1]
    divergences.TABLE.clear()
    divergences.TABLE.update(rows)
    importlib.reload(library)
    importlib.reload(cpu)  # whatever it keeps of the table, it makes anew
from tests import cases
from tests.sparse_targets import kept
from fastkd.sparse import sparse_rows
student, teacher = cases.logits("far", 2, 300)
sparse = sparse_rows(kept(teacher, 5), None, 300, torch.float32)
for name in sorted(divergences.TABLE):
    spec = cases.spec(divergences.TABLE[name](), 300)
    for given in (teacher, sparse) if name != "mse" else (teacher,):
        print(cpu.kd_rows(student, given, None, torch.ones(2), None, spec, None)[0].sum().item())
"""


def test_the_order_of_the_table_means_nothing() -> None:
    in_order, in_reverse = printed(LOSSES, "in order"), printed(LOSSES, "reversed")
    assert len(set(in_order)) == 2 * len(TABLE) - 1, "each divergence has a value of its own"
    assert in_reverse == in_order


def test_the_native_library_refuses_names_it_does_not_know() -> None:
    student, teacher = cases.logits("far", 2, 300)
    spec, scale = cases.spec(fastkd.ForwardKL(), 300), torch.ones(2)
    sparse = sparse_rows(kept(teacher, 5), None, 300, torch.float32)
    for name, given in (("hellinger", teacher), ("", teacher), ("forward", teacher), ("mse", sparse)):
        with pytest.raises(ValueError, match=f"no divergence '{name}'"):
            cpu.kd_rows(student, given, None, scale, None, dataclasses.replace(spec, divergence=name), None)


def test_names_and_objects_resolve_alike() -> None:
    for name, row in TABLE.items():
        assert resolve(name) == row() == resolve(row())


@pytest.mark.parametrize(
    ("divergence", "equals"),
    [
        (fastkd.JSD(beta=0), fastkd.ForwardKL()),
        (fastkd.JSD(beta=1), fastkd.ReverseKL()),
        (fastkd.SkewKL(lam=0), fastkd.ForwardKL()),
        (fastkd.SkewReverseKL(lam=0), fastkd.ReverseKL()),
        (fastkd.SymmetricKL(weight=1), fastkd.ForwardKL()),
        (fastkd.SymmetricKL(weight=0), fastkd.ReverseKL()),
        (fastkd.AlphaBeta(alpha=1, beta=0), fastkd.ForwardKL()),
        (fastkd.AlphaBeta(alpha=0, beta=1), fastkd.ReverseKL()),
    ],
)
def test_limits(divergence: fastkd.divergences.Divergence, equals: fastkd.divergences.Divergence) -> None:
    assert resolve(divergence) == equals


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastkd.JSD(beta=1.5),
        lambda: fastkd.JSD(beta=-0.1),
        lambda: fastkd.SkewKL(lam=1.0),
        lambda: fastkd.SkewReverseKL(lam=-1),
        lambda: fastkd.SymmetricKL(weight=2),
        lambda: fastkd.AlphaBeta(alpha=math.nan),
        lambda: fastkd.AlphaBeta(beta=math.inf),
    ],
)
def test_parameters_out_of_range(make: object) -> None:
    with pytest.raises(ValueError, match=r"beta|lam|weight|alpha"):
        make()  # type: ignore[operator]


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="number"):
        fastkd.JSD(beta="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown divergence 'kl'.*forward_kl"):
        resolve("kl")
    with pytest.raises(TypeError, match="got float"):
        resolve(0.5)  # type: ignore[arg-type]
