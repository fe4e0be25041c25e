"""Each tolerance of compare.py is able to fail, and for the reason it exists."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests import cases, compare

TRUTH = torch.linspace(-1, 1, 1001, dtype=torch.float64)
EAGER = TRUTH.float()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros_like(EAGER),
        EAGER * (1 + 1e-5),
        EAGER + 1e-5,
        -EAGER,
        EAGER.roll(1),
        EAGER.bfloat16() * 1.02,
        torch.full_like(EAGER, torch.nan),
    ],
    ids=["zero", "scaled", "shifted", "sign", "moved", "low precision, 2 % off", "nan"],
)
def test_gradient_tolerance_fails(wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_gradient(wrong, EAGER, TRUTH)


def test_gradient_tolerance_admits_rounding() -> None:
    compare.assert_gradient(EAGER * (1 + 1e-7), EAGER, TRUTH)
    compare.assert_gradient(EAGER.bfloat16(), EAGER.bfloat16(), TRUTH)


def test_certain_rows_get_an_absolute_rounding_and_no_more() -> None:
    truth = 1e-8 * TRUTH
    compare.assert_gradient((truth + 1e-9).float(), truth.float(), truth, certain_rows=1.0)
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_gradient((truth + 1e-7).float(), truth.float(), truth, certain_rows=1.0)
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_gradient(EAGER + 1e-5, EAGER, TRUTH, certain_rows=1.0)


def test_undecided_elements_alone_are_not_looked_at() -> None:
    wrong = EAGER.clone()
    wrong[0] = 1.0
    undecided = torch.zeros_like(EAGER, dtype=torch.bool)
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_gradient(wrong, EAGER, TRUTH, undecided=undecided)
    undecided[0] = True
    compare.assert_gradient(wrong, EAGER, TRUTH, undecided=undecided)


def test_only_the_total_variation_is_undecided_and_only_where_p_is_q() -> None:
    student, teacher = cases.logits("near_equal", 4, 5003)
    jsd, tvd = (cases.spec(divergence, student.shape[1]) for divergence in (fastkd.JSD(), fastkd.TVD()))
    assert cases.undecided(student, teacher, jsd) is None
    where = cases.undecided(student, teacher, tvd)
    assert where is not None
    assert where.sum() <= 3
    assert cases.undecided(teacher, teacher, tvd).all()  # type: ignore[union-attr]


def test_one_wrong_column_of_a_vocabulary_is_seen() -> None:
    """The label's column alone: a gradient that forgets the one-hot term fails at any vocabulary size."""
    student, teacher = cases.logits("near_equal", 4, 50257)
    gradient = (student - teacher).double()
    forgotten = gradient.clone()
    forgotten[0, 123] = 0
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_gradient(forgotten, gradient.float(), gradient)


@pytest.mark.parametrize("wrong", [0.0, 1.0 + 1e-5, -1.0, float("nan"), float("inf")])
def test_value_tolerance_fails(wrong: float) -> None:
    with pytest.raises(AssertionError, match="value"):
        compare.assert_value(torch.tensor([wrong]), torch.tensor([1.0]))


def test_value_tolerance_compares_infinities_and_nans() -> None:
    special = torch.tensor([float("inf"), float("nan"), 1.0])
    compare.assert_value(special, special.double())
    with pytest.raises(AssertionError):
        compare.assert_value(torch.tensor([float("inf")]), torch.tensor([float("nan")]))


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shapes"):
        compare.assert_gradient(EAGER[:1], EAGER, TRUTH)
