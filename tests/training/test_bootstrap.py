"""Intervals hold a known truth as often as they say, and are exact where the draws can be counted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastkd.training import bootstrap
from fastkd.training.bootstrap import LEVEL, RESAMPLES, interval, resampled_means
from fastkd.training.evaluation import Measures, WindowSums
from fastkd.training.judge import CE_ONLY, STUDENT, TEACHER, differences


def test_resamples_of_two_windows_are_the_ones_that_can_be_counted():
    """(1 of 1 token, 9 of 3): 1, 3 or, from both, 10 ÷ 4. A mean of the windows' means would have 2 in the middle."""
    means = resampled_means(torch.tensor([[1.0, 0.0], [9.0, 3.0]]), torch.tensor([1.0, 3.0]), seed=0)
    assert means.shape == (RESAMPLES, 2)
    values, counts = means[:, 0].unique(return_counts=True)
    assert values.tolist() == [1.0, 2.5, 3.0]
    assert (counts / RESAMPLES).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    assert set(means[:, 1].tolist()) == {0.0, 0.75, 1.0}
    assert torch.equal(means[:, 0] == 2.5, means[:, 1] == 0.75)  # the columns are drawn together
    assert interval(means[:, 0]) == [1.0, 3.0]


def test_an_interval_is_the_middle_of_the_values():
    assert interval(torch.arange(1001.0).flip(0)) == pytest.approx([25, 975])
    assert interval(torch.full((7,), 2.5)) == [2.5, 2.5]


def test_a_seed_decides_the_draws_however_many_are_made_at_a_time(monkeypatch):
    sums, tokens = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)), torch.full((30,), 7.0)
    first = resampled_means(sums, tokens, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(resampled_means(sums, tokens, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(resampled_means(sums, tokens, seed=4), first)
    monkeypatch.setattr(bootstrap, "_DRAWN", 30 * 64)
    assert torch.equal(resampled_means(sums, tokens, seed=3), first)
    monkeypatch.setattr(bootstrap, "_DRAWN", 1)  # less than one resample's windows
    assert resampled_means(sums, tokens, seed=3).shape == first.shape


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Windows of 10 to 49 tokens, evenly. The loss per token grows with the window's tokens, so that a mean of the
    windows' means would be 0.23 nats too low; and each window has an exponential share of its own.
    """
    generator = torch.Generator().manual_seed(0)
    trials, windows = 200, 40
    truth = math.exp(0.5 + 0.05 * (29.5**2 + (40**2 - 1) / 12) / 29.5)
    inside = 0
    for seed in range(trials):
        tokens = torch.randint(10, 50, (windows,), generator=generator).double()
        own = -torch.rand(windows, generator=generator, dtype=torch.float64).log()
        sums = tokens * (0.5 * own + 0.05 * tokens)
        lower, upper = interval(resampled_means(sums[:, None], tokens, seed)[:, 0].exp())
        inside += lower <= truth <= upper
        assert upper - lower < truth  # no use in an interval that holds everything
    spread = math.sqrt(LEVEL * (1 - LEVEL) / trials)
    assert LEVEL - 0.03 - 2 * spread <= inside / trials <= LEVEL + 2 * spread  # of 40 skewed windows it is a bit narrow


def contender(name, loss, kl):
    tokens = torch.tensor([10.0, 20.0, 30.0, 40.0])
    sums = WindowSums(tokens, loss * tokens, kl * tokens)
    mean = ((loss * tokens).sum() / tokens.sum()).item()
    found = Measures(mean, 0.1, [[1.0, 0.5, 0.5]], sums, ((kl * tokens).sum() / tokens.sum()).item())
    return SimpleNamespace(name=name, held_out=found)


def test_a_difference_is_of_the_same_windows():
    """A student that is better by the same amount on every window is so in every draw, however windows differ."""
    loss, kl = torch.tensor([1.0, 4.0, 2.0, 6.0]), torch.tensor([0.5, 2.0, 0.25, 1.0])
    student, alone = contender(STUDENT, loss, kl), contender(CE_ONLY, loss + 0.5, kl + 0.125)
    teacher = contender(TEACHER, loss - 1, torch.zeros(4))
    found = differences([teacher, student, alone], seed=0)
    assert list(found) == [TEACHER, CE_ONLY]
    assert found[CE_ONLY]["kl"]["difference"] == pytest.approx(-0.125)
    assert found[CE_ONLY]["kl"]["interval"] == pytest.approx([-0.125, -0.125])
    assert found[TEACHER]["kl"]["interval"][0] < found[TEACHER]["kl"]["difference"] == student.held_out.kl
    perplexities = student.held_out.perplexity, alone.held_out.perplexity
    lower, upper = found[CE_ONLY]["perplexity"]["interval"]
    assert lower <= found[CE_ONLY]["perplexity"]["difference"] == perplexities[0] - perplexities[1] <= upper < 0


def test_one_window_has_no_interval():
    def one(name):
        sums = WindowSums(torch.tensor([9.0]), torch.tensor([27.0]), torch.tensor([1.0]))
        return SimpleNamespace(name=name, held_out=Measures(3.0, 0.1, [[1.0, 0.5, 0.5]], sums, 1 / 9))

    found = differences([one(TEACHER), one(STUDENT)], seed=0)
    assert found[TEACHER]["perplexity"] == {"difference": 0.0, "interval": None}
