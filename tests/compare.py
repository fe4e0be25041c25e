"""The only tolerances of the suite, each with its reason. float64 is the judge, fp32 eager the yardstick.

`test_compare.py` proves that each of them can fail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A gradient may err at most this many times as much as fp32 eager does on the same inputs …
FACTOR = 2.0
#: … plus this, relative: where eager happens to be exact, a few roundings of fp32 (6e-8 each) are still allowed.
FLOOR = 1e-6
#: Low-precision inputs: the result is rounded once to 8 (bf16) bits, 0.2 % in the mean, and never more than this.
LOW_PRECISION = 1e-2
#: Absolute, per unit of weight on a row: its probabilities carry 6e-8 of themselves, so a row of one certain token,
#: whose true gradient is the 1e-9 the others hold, cannot be told from a row without gradient.
CERTAIN = 4e-7
#: Loss values in fp32, relative to their own size or, for a difference of near-equal sums, to the sums' rounding.
VALUE = 2e-6
#: The reference against a definition in more digits: in float64, and in fp32 where only rounded logarithms count.
DOUBLE, EAGER = 1e-12, 1e-4
#: Element by element, in roundings (half a unit in the last place) of what an element is computed from, its *size*.
ROUNDINGS = 5


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖₂ / ‖truth‖₂ in float64; the plain norm of the difference where the truth is 0."""
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape, f"shapes {tuple(actual.shape)} and {tuple(truth.shape)}"
    norm = truth.norm().item()
    return (actual - truth).norm().item() / (norm or 1.0)


def assert_gradient(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str = "gradient",
    certain_rows: float = 0.0,
    undecided: Tensor | None = None,
) -> None:
    """The numerics contract. `eager` is the reference at the inputs' precision (fp32 inside), `truth` at float64.

    `certain_rows`, where rows may hold nothing but certain tokens, is the largest weight of a row: T or more. Elements
    that are `undecided` are not looked at.
    """
    if undecided is not None:
        actual = torch.where(undecided, truth.to(actual.dtype), actual)
    ours, theirs = relative_error(actual, truth), relative_error(eager, truth)
    limit = FACTOR * theirs + FLOOR + CERTAIN * certain_rows / (truth.double().norm().item() or 1.0)
    if actual.dtype in (torch.bfloat16, torch.float16):
        limit = min(limit, LOW_PRECISION)
    assert ours <= limit, f"{what}: relative error {ours:.2e} > {limit:.2e} (eager {theirs:.2e})"


def assert_value(actual: Tensor, truth: Tensor, eager: Tensor | None = None, what: str = "value") -> None:
    """Loss values: each within VALUE of the truth, or within twice eager's error where that is larger."""
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape, f"shapes {tuple(actual.shape)} and {tuple(truth.shape)}"
    limit = VALUE * truth.abs().clamp(min=1.0)
    if eager is not None:
        limit = limit + FACTOR * (eager.detach().double() - truth).abs().nan_to_num(0.0).max()
    same = (actual == truth) | (actual.isnan() & truth.isnan())  # infinities too
    wrong = ~(same | ((actual - truth).abs() <= limit))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} off, first {actual[wrong][0]:.9g} != {truth[wrong][0]:.9g}"
    )


def assert_elements(
    actual: Tensor,
    truth: Tensor,
    size: Tensor,
    arithmetic: torch.dtype,
    what: str = "gradient",
    underflow: float = 0.0,
    scaled: float = 1.0,
) -> None:
    """Each element within what rounding explains: of the sums it comes from, computed in `arithmetic`, and of itself.

    `size`, like `truth`, is the sum of the absolute values of what an element is computed from, float64. A result in 16
    bits is rounded when it is stored, and again if it is then `scaled`, by anything but a power of two. `underflow` is
    the largest number that may have been stored as 0.
    """
    actual, limits = actual.detach(), torch.finfo(actual.dtype)
    assert actual.shape == truth.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(truth.shape)}"
    truth = truth.clamp(-limits.max, limits.max)  # beyond that an infinity is right
    smallest = limits.tiny if limits.bits > 16 else limits.tiny * limits.eps
    limit = ROUNDINGS * torch.finfo(arithmetic).eps / 2 * size + smallest + underflow
    if limits.bits == 16:
        limit = limit + _half_unit(truth, limits.eps)
        if math.frexp(scaled)[0] not in (0.5, -0.5):
            limit = limit + abs(scaled) * _half_unit(truth / scaled, limits.eps)
    gap = (actual.double().clamp(-limits.max, limits.max) - truth).abs()
    wrong = ~((gap <= limit) | (truth.isnan() & actual.isnan()))
    if wrong.any():
        worst = int(torch.where(wrong, gap / limit, 0.0).nan_to_num(torch.inf).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)) if truth.dim() else ()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements off, worst {at}: {actual[at].item():.9g} != "
            f"{truth[at].item():.9g}, by {gap[at].item():.3g} where {limit[at].item():.3g} is allowed"
        )


def _half_unit(x: Tensor, eps: float) -> Tensor:
    """Half the distance from x to the next number of a format: what rounding to the nearest may take."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x)[1] - 1) * (eps / 2) * (x != 0)
