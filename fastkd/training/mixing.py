"""Windows of several corpora in wanted shares, exact to a window and the same at every call.

    train = mix([reviews, news, code], [0.5, 0.3, 0.2])

For datasets that are read in your own loop, `datasets.interleave_datasets` draws from each with a probability. Here
nothing is left to chance but which windows of a corpus are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fastkd.training.options import InputError, check_weights

__all__ = ["apportioned", "mix", "shares", "without_repeats"]


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Weights as shares of 1. Exact: 0.1 means one tenth, not the binary number next to it."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """`total` windows by weight, each count less than a window from its share (Hamilton's largest remainders)."""
    wanted = [share * total for share in shares(weights)]
    counts = [math.floor(one) for one in wanted]
    nearest = sorted(range(len(wanted)), key=lambda place: (counts[place] - wanted[place], place))
    for place in nearest[: total - sum(counts)]:
        counts[place] += 1
    return counts


def without_repeats(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """The most windows that can be mixed of corpora of these sizes when none is taken twice."""
    return min(math.floor(size / share) for size, share in zip(sizes, shares(weights), strict=True))


def mix(
    windows: Sequence[Tensor],
    weights: Sequence[float],
    total: int | None = None,
    *,
    seed: int = 0,
    repeat: bool = False,
    names: Sequence[str] | None = None,
) -> Tensor:
    """`[total, …]`: windows `[n, …]` of every corpus, in proportion to its weight, of which only the ratios count.

    Which of a corpus are taken is drawn by `seed`, none twice. They are spread evenly: any run of windows from the
    first on has the shares too. `total` is by default the most for which every corpus has enough.

    `repeat` takes the windows of a corpus that has too few as often as needed. Without it, InputError says which
    corpora (by their `names`) have too few. InputError too for weights that are no finite numbers above 0 or not as
    many as there are corpora.
    """
    check_weights(weights, "weights")
    if len(weights) != len(windows):
        raise InputError(f"there are {len(weights)} weights for {len(windows)} corpora: give one for each")
    sizes = [len(one) for one in windows]
    if total is None:
        total = without_repeats(sizes, weights)
    counts = apportioned(total, weights)
    names = names or [f"corpus {number}" for number in range(1, len(windows) + 1)]
    _check_sizes(names, sizes, counts, total, repeat)
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen, places = [], []
    for one, count in zip(windows, counts, strict=True):
        drawn = torch.randperm(len(one), generator=generator, dtype=torch.int64, device="cpu")
        chosen.append(one[drawn.repeat(-(-count // max(len(one), 1)))[:count]])
        places.append((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / max(count, 1))
    return torch.cat(chosen)[torch.cat(places).argsort(stable=True)]


def _check_sizes(names: Sequence[str], sizes: Sequence[int], counts: Sequence[int], total: int, repeat: bool) -> None:
    few = [
        f"{name} has {size:,} windows, but its share of {total:,} is {count:,}"
        for name, size, count in zip(names, sizes, counts, strict=True)
        if size < count and not (repeat and size)
    ]
    if few:
        raise InputError(
            f"too little text for the weights: {'; '.join(few)}. Give it more text or a smaller weight, take less of "
            "the others, or repeat its windows (--mix-repeat)"
        )
