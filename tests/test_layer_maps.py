"""Which block of the teacher a block of the student learns from."""

from __future__ import annotations

import pytest
import torch

from fastkd.students import parse_layers
from fastkd.terms.layers import LearnedLayers, check_layers, layer_pairs


def test_uniform_spreads_over_the_teacher():
    pairs = dict(layer_pairs("uniform", 32, 80))
    assert (pairs[0], pairs[15], pairs[31]) == (0, 38, 78)
    assert layer_pairs("uniform", 2, 2) == [(0, 0), (1, 1)]
    assert layer_pairs("uniform", 4, 1) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [block for _, block in layer_pairs("uniform", 5, 13)] == parse_layers("uniform:5", 13)


@pytest.mark.parametrize("students", range(1, 14))
@pytest.mark.parametrize("teachers", range(1, 14))
def test_every_map_stays_within_both(students, teachers):
    for layers in ("uniform", "last", "last:1"):
        pairs = layer_pairs(layers, students, teachers)
        assert pairs == sorted(set(pairs))
        assert all(0 <= one < students and 0 <= other < teachers for one, other in pairs)
    assert [one for one, _ in layer_pairs("uniform", students, teachers)] == list(range(students))
    assert layer_pairs("last", students, teachers)[-1] == (students - 1, teachers - 1)


def test_last_is_counted_from_the_end():
    assert layer_pairs("last", 3, 5) == [(0, 2), (1, 3), (2, 4)]
    assert layer_pairs("last:2", 3, 5) == [(1, 3), (2, 4)]
    assert layer_pairs("last:2", 5, 3) == [(3, 1), (4, 2)]


def test_pairs_are_taken_as_they_are():
    assert layer_pairs([[2, 4], (0, 1)], 3, 5) == [(0, 1), (2, 4)]
    assert layer_pairs([[0, 1], [0, 2]], 3, 5) == [(0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[3, 0]], r"names block 3 of the student, which has 3: 0 to 2"),
        ([[0, 0], [1, 5], [2, 7]], r"names block 5, 7 of the teacher, which has 5: 0 to 4"),
        ("last:4", r"layers='last:4', but the student has 3 blocks and the teacher 5"),
        ([[0, 0], [0, 0]], r"the pair \[0, 0\] twice"),
        ("learned", "has no pairs"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, 3, 5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("unifrom", "'unifrom' is no layer map: take uniform, last"),
        ("last:0", "'last:0' is no layer map"),
        ([], "must be the name of a map or a list of pairs"),
        (3, "got 3"),
        ([[0, 1, 2]], r"got \[0, 1, 2\]"),
        (["01"], "got '01'"),
        ([[0, -1]], "must be >= 0, got -1"),
    ],
)
def test_what_is_no_map_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        check_layers(layers)


def test_a_layer_is_a_whole_number():
    with pytest.raises(TypeError, match=r"must be an int, got 1\.5"):
        check_layers([[0, 1.5]])


def test_the_learned_map_begins_as_a_mean_and_sharpens():
    layers = LearnedLayers(2, 4)
    assert torch.equal(layers.shares(1.0), torch.full((2, 4), 0.25))
    layers.scores.data[0] = torch.tensor([0.0, 0.5, 0.2, 0.1])
    shares = [layers.shares(temperature)[0] for temperature in (1.0, 0.5, 0.01)]
    assert all(one.sum().item() == pytest.approx(1) for one in shares)
    assert shares[0][1] < shares[1][1] < shares[2][1]
    assert shares[2][1] > 0.999
