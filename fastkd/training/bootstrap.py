"""How far a mean over held-out text may be off: percentile bootstrap over windows.

Tokens of one window depend on each other, so whole windows are drawn. A resample's mean per token is the ratio of two
sums, of the values and of the tokens: windows that are longer count for more, as they do in the mean itself. The same
seed draws the same windows for every model, so the models of a difference are compared on the same text.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVEL", "RESAMPLES", "interval", "resampled_means"]

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN = 2**20  # windows drawn at a time, which bounds the memory


def resampled_means(sums: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """float64 `[RESAMPLES, k]`: means per token of k values, each over as many windows drawn with replacement.

    Args:
        sums: `[windows, k]`, each value's sum over the tokens of a window. On the CPU.
        tokens: `[windows]`, tokens of each window.
        seed: decides which windows are drawn; with their number, nothing else does.
    """
    sums, tokens = sums.double(), tokens.double()
    windows = len(tokens)
    generator = torch.Generator("cpu").manual_seed(seed)
    found = []
    at_a_time = max(1, _DRAWN // windows)
    for start in range(0, RESAMPLES, at_a_time):
        shape = min(at_a_time, RESAMPLES - start), windows
        drawn = torch.randint(windows, shape, generator=generator, dtype=torch.int64, device="cpu")
        found.append(sums[drawn].sum(1) / tokens[drawn].sum(1, keepdim=True))
    return torch.cat(found)


def interval(values: Tensor) -> list[float]:
    """[lower, upper] end of the middle `LEVEL` of `values`, those of a statistic in all resamples."""
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")
    lower, upper = values.double().quantile(ends).tolist()
    return [lower, upper]
