"""The table: names, parameters, limits, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import TABLE, of_spec, resolve
from fastkd.kernels import cpu
from fastkd.sparse import sparse_rows
from tests import cases, compare
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
from tests import cases, compare
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
            cpu.kd_rows(student, given, None, scale, None, spec._replace(divergence=name), None)

    spec = cases.spec(cases.MIXES[0], 300)
    for name, numbers in (("+forward_kl+hellinger", 6), ("+mse", 3), ("+forward_kl+tvd", 5), ("+" + "x" * 40, 3)):
        wrong = spec._replace(divergence=name, parameters=(0.5,) * numbers)
        with pytest.raises(ValueError, match="no divergence"):
            cpu.kd_rows(student, teacher, None, scale, None, wrong, None)


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


def test_a_divergence_that_is_set_later_resolves_too() -> None:
    student, teacher = cases.logits("far", 2, 300)
    kd = fastkd.KDLoss(2.0, hard_weight=0.0)
    for given, equals in (("tvd", fastkd.TVD()), (fastkd.JSD(beta=0), fastkd.ForwardKL()), ("tvd:1", fastkd.TVD())):
        kd.divergence = given  # type: ignore[assignment]
        assert kd.divergence == equals
        expected = fastkd.KDLoss(2.0, hard_weight=0.0, divergence=equals)(student, teacher)
        assert torch.equal(kd(student, teacher), expected)
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        kd.divergence = "kl"  # type: ignore[assignment]


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="number"):
        fastkd.JSD(beta="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown divergence 'kl'.*forward_kl"):
        resolve("kl")
    with pytest.raises(TypeError, match="got float"):
        resolve(0.5)  # type: ignore[arg-type]


# --- mixes ------------------------------------------------------------------------------------------------------

_FORWARD, _REVERSE, _TVD = fastkd.ForwardKL(), fastkd.ReverseKL(), fastkd.TVD()


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_a_spec_has_all_of_a_divergence(divergence: fastkd.divergences.Divergence) -> None:
    canonical = divergence.canonical()
    assert of_spec(canonical.name, canonical.parameters) == canonical


@pytest.mark.parametrize("temperature", [2.0, 1.5], ids=["power", "own exponential"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_mix_has_the_gradient_of_its_parts_beyond_one_block(name: str, temperature: float) -> None:
    if not fastkd.backends()[name].available:
        pytest.skip("no native library")
    student, teacher = cases.logits("far", 4, 2500)
    labels = cases.labels(4, 2500, ignored=(1,))
    mix: dict[str | fastkd.divergences.Divergence, float] = {"tvd": 0.25, "jsd": 0.5, "alpha_beta": 0.75}

    def gradient(divergence: str | fastkd.divergences.Divergence, soft: float, hard: float) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        kd = fastkd.KDLoss(temperature, soft_weight=soft, hard_weight=hard, divergence=divergence)
        (grad,) = torch.autograd.grad(kd(leaf, teacher, labels), leaf)
        return grad

    with fastkd.use_backend(name):
        together = gradient(fastkd.Mix(mix), 1.0, 0.5)
        apart = [gradient(part, weight, 0.5 * (i == 0)) for i, (part, weight) in enumerate(mix.items())]
    torch.testing.assert_close(together, sum(apart[1:], apart[0]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("mix", "equals"),
    [
        ("tvd", _TVD),
        ("tvd:1", _TVD),
        ("tvd:0.25+forward_kl:2", fastkd.Mix({_FORWARD: 2, _TVD: 0.25})),
        (" forward_kl : 5e-1 + tvd ", fastkd.Mix({_FORWARD: 0.5, _TVD: 1})),
        (fastkd.Mix({"tvd": 1, "jsd": 0}), _TVD),
        (fastkd.Mix({fastkd.JSD(beta=0): 0.5, "forward_kl": 0.5}), _FORWARD),
        (fastkd.Mix({fastkd.SymmetricKL(0.25): 2, "tvd": 1}), fastkd.Mix({_FORWARD: 0.5, _REVERSE: 1.5, _TVD: 1})),
        (fastkd.Mix({fastkd.Mix({"tvd": 3, _FORWARD: 1}): 0.5, "tvd": 1}), fastkd.Mix({_FORWARD: 0.5, _TVD: 2.5})),
    ],
    ids=str,
)
def test_what_a_mix_equals(mix: str | fastkd.Mix, equals: fastkd.divergences.Divergence) -> None:
    assert resolve(mix) == equals


def test_a_mix_is_what_its_parts_are() -> None:
    bounded, closed = fastkd.Mix({_FORWARD: 1, _TVD: 1}), fastkd.Mix({_FORWARD: 1, _REVERSE: 1})
    assert (bounded.bounded, bounded.normalised, bounded.tempered) == (True, True, True)
    assert (closed.bounded, closed.normalised, closed.tempered) == (False, False, True)
    assert repr(bounded) == "Mix({ForwardKL(): 1.0, TVD(): 1.0})"
    assert "Mix({ForwardKL(): 1.0, TVD(): 1.0})" in repr(fastkd.KDLoss(divergence=bounded))
    assert copy.deepcopy(bounded) == pickle.loads(pickle.dumps(bounded)) == bounded
    assert len({bounded, fastkd.Mix({_FORWARD: 1, _TVD: 1}), closed}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastkd.Mix({}), "needs a part with a weight above 0"),
        (lambda: fastkd.Mix({"tvd": 0}), "needs a part with a weight above 0"),
        (lambda: fastkd.Mix({"tvd": -0.5, "jsd": 1}), r"weight of TVD\(\) must be in \[0, 1e\+30\], got -0.5"),
        (lambda: fastkd.Mix({"tvd": math.inf}), "weight of tvd must be finite, got inf"),
        (lambda: fastkd.Mix({"kl": 1}), "unknown divergence 'kl'"),
        (lambda: fastkd.Mix({"mse": 1, "tvd": 1}), r"MSE\(\) compares raw logits"),
        (lambda: fastkd.Mix({fastkd.JSD(i / 20): 1 for i in range(1, 18)}), "at most 16 parts, got 17"),
        (lambda: resolve("tvd:0.5+kl:0.5"), "unknown divergence 'kl' in 'tvd:0.5"),
        (lambda: resolve("tvd:half"), "weight of tvd in 'tvd:half' must be a number, got 'half'"),
        (lambda: resolve("tvd:0.5+tvd:0.5"), "tvd is twice"),
        (lambda: resolve("tvd:nan"), "weight of tvd must be finite, got nan"),
    ],
)
def test_mixes_that_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_mixes_of_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"takes a mapping .* got list"):
        fastkd.Mix([("tvd", 1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight of tvd must be a number, got str"):
        fastkd.Mix({"tvd": "1"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="got float"):
        fastkd.Mix({0.5: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("mix", cases.MIXES, ids=str)
def test_a_mix_is_the_weighted_sum_of_its_parts(mix: fastkd.Mix, backend: str) -> None:
    """Against a loss of each part as it was given, in float64."""
    student, teacher = cases.logits("far", 6, 700)
    labels = cases.labels(6, 700, ignored=(1,))
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = fastkd.KDLoss(2.0, divergence=mix)(leaf, teacher, labels)
    loss.backward()
    with fastkd.use_backend("reference"):
        truth = fastkd.KDLoss(2.0, soft_weight=0.0)(wide, None, labels)
        for part, weight in mix.parts:
            kd = fastkd.KDLoss(2.0, soft_weight=0.5 * weight, hard_weight=0.0, divergence=part)
            truth = truth + kd(wide, teacher.double(), labels)
    truth.backward()
    compare.assert_value(loss, truth)
    assert leaf.grad is not None
    assert wide.grad is not None
    assert compare.relative_error(leaf.grad, wide.grad) < 1e-6
