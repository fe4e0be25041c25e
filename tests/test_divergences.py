"""The table: names, parameters, limits, and what is refused."""

from __future__ import annotations

import math

import pytest

import fastkd
from fastkd import reference
from fastkd._native import _CODES
from fastkd.divergences import TABLE, resolve


def test_every_row_has_its_eager_function() -> None:
    assert set(TABLE) == set(reference.DIVERGENCES) | {"mse"}


def test_native_codes_follow_the_table() -> None:
    assert list(_CODES) == list(TABLE)
    assert sorted(_CODES.values()) == list(range(len(TABLE)))


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
