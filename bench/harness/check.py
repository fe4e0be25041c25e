"""Is a contender right? Judged before it is timed, by the float64 reference, on the inputs it is timed on.

The reference runs in slabs of rows that stay in a core's cache: float64 copies of a whole case would take minutes, and
not fit beside the contenders. Its results are kept in fp32, whose rounding (6e-8) is far below the limits here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import machine
from fastkd import reference
from fastkd.divergences import Divergence
from fastkd.rows import RowSpec

__all__ = [
    "ARITHMETIC_BF16",
    "BOTH",
    "FP32",
    "HARD",
    "OTHER_OBJECTIVE",
    "ROUNDED",
    "SOFT",
    "Batch",
    "Objective",
    "Truth",
    "error",
    "kd_rows",
    "kd_truth",
    "slabs",
    "verified",
]

#: Relative L2 errors a contender may have: fp32 arithmetic on fp32 inputs (measured: 4e-8 … 8e-6),
FP32 = 5e-5
#: fp32 arithmetic rounded once to bf16 (measured: 1e-3 … 2e-3),
ROUNDED = 1e-2
#: and arithmetic in bf16 throughout, as the textbook recipe does on bf16 logits (measured: 3e-3) and on bf16 hidden
#: states, whose logits it rounds (measured: 1e-2).
ARITHMETIC_BF16 = 3e-2
#: Where a peer's precision is its own affair, which is reported: further off it computes something else. Without one of
#: the terms, T² or ½ the gradient is at least 0.28 off here (measured), by rounding peers are 0.02.
OTHER_OBJECTIVE = 0.1

_SLAB = 2**18 if machine.DEVICE.type == "cpu" else 2**24  # elements: on a GPU, few launches count


class Objective(NamedTuple):
    """What is minimised: soft · T² · divergence(teacher, student) + hard · cross-entropy, mean over rows."""

    soft: float
    hard: float


BOTH, SOFT, HARD = Objective(0.5, 0.5), Objective(1, 0), Objective(0, 1)


class Truth(NamedTuple):
    loss: float
    gradient: Tensor  # [N, V]


@dataclass
class Batch:
    """Random inputs of one case. `student` is a leaf that takes gradients."""

    student: Tensor
    teacher: Tensor
    labels: Tensor

    @classmethod
    def random(cls, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Batch:
        """Unrelated rows, peaked enough that both terms carry the gradient: a lost one cannot pass for rounding."""
        generator = machine.generator(seed)

        def logits() -> Tensor:
            return torch.randn(rows, vocab, generator=generator).mul_(6).to(dtype)

        labels = torch.randint(vocab, (rows,), generator=generator)
        return cls(logits().requires_grad_(), logits(), labels)


def slabs(rows: int, columns: int) -> Iterator[slice]:
    """Rows that together have at most `_SLAB` elements, or one row."""
    size = max(1, _SLAB // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖₂ / ‖truth‖₂ in float64; infinite where anything is not finite."""
    assert actual.shape == truth.shape, f"shapes {tuple(actual.shape)} and {tuple(truth.shape)}"
    difference = size = 0.0
    for slab in slabs(len(truth), truth[0].numel()):
        expected = truth[slab].double()
        difference += (actual[slab].detach().double() - expected).square().sum().item()
        size += expected.square().sum().item()
    relative = float((difference / size) ** 0.5) if size else difference
    return relative if relative == relative else float("inf")


def kd_truth(batch: Batch, divergence: Divergence, temperature: float) -> Truth:
    """Of ½·T²·divergence + ½·cross-entropy."""
    return kd_rows(batch.student.detach(), batch.teacher, batch.labels, divergence, temperature)


def kd_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    divergence: Divergence,
    temperature: float,
    objective: Objective = BOTH,
    *,
    of: int | None = None,
    kept: torch.dtype = torch.float32,
) -> Truth:
    """The loss, mean over rows, and the gradient of the student's logits, in float64 and the gradient then `kept`.

    Where these rows are a part of a batch, it has `of` rows.
    """
    rows, vocab = student.shape
    t2 = temperature**2 if divergence.tempered else 1.0
    weights = objective.soft * t2, objective.hard
    spec = RowSpec(divergence.name, divergence.parameters, temperature, temperature, *weights, vocab)
    loss, gradient = 0.0, torch.empty(student.shape, dtype=kept)
    for slab in slabs(rows, vocab):
        logits, above = student[slab].double(), None if teacher is None else teacher[slab].double()
        scale = torch.full((len(logits),), 1 / (of or rows), dtype=torch.float64)
        slope = torch.empty_like(logits)
        soft, hard = reference.kd_rows(logits, above, labels[slab], scale, scale, spec, slope)
        loss += ((spec.soft_weight * soft + spec.hard_weight * hard) * scale).sum().item()
        gradient[slab] = slope
    return Truth(loss, gradient)


def verified(
    name: str, value: object, loss: float, gradients: list[tuple[Tensor | None, Tensor]], limit: float
) -> float:
    """The largest relative gradient error of a contender; AssertionError where that or its loss is off by too much.

    `gradients` are (actual, truth).
    """
    assert isinstance(value, Tensor)
    off = abs(value.item() - loss) / abs(loss)
    assert off <= limit, f"{name}: loss {value.item():.9g}, but the float64 reference says {loss:.9g}"
    errors = []
    for actual, truth in gradients:
        assert actual is not None, f"{name}: a gradient is missing"
        errors.append(error(actual, truth))
    assert max(errors) <= limit, f"{name}: relative gradient error {max(errors):.1e} > {limit:.0e}"
    return max(errors)
