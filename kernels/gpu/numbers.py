"""The scalars of a launch, from the numbers of a loss."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.divergences import LOG2E, Divergence, exp
from fastkd.rows import RowSpec


class Numbers(NamedTuple):
    """Scalars of a launch."""

    student_inverse: float  # 1 / T
    teacher_inverse: float
    student_scale: float  # log2(e) / T, rounded once
    teacher_scale: float
    soft_weight: float  # divided by what the gradient is divided by
    hard_weight: float
    a: float
    b: float  # as a, or of a row: see `with_ratio`


@triton.jit
def with_ratio(numbers, top_d):
    """The numbers with e^top_d for b, kept to where neither it nor its inverse is more than large."""
    return Numbers(
        numbers.student_inverse,
        numbers.teacher_inverse,
        numbers.student_scale,
        numbers.teacher_scale,
        numbers.soft_weight,
        numbers.hard_weight,
        numbers.a,
        exp(tl.minimum(tl.maximum(top_d, -60.0), 60.0)),
    )


def numbers_for(spec: RowSpec, divergence: Divergence) -> Numbers:
    a, b = (*spec.parameters, 0.0, 0.0)[:2]
    return Numbers(
        student_inverse=1 / spec.temperature,
        teacher_inverse=1 / spec.teacher_temperature,
        student_scale=LOG2E.value / spec.temperature,
        teacher_scale=LOG2E.value / spec.teacher_temperature,
        soft_weight=spec.soft_weight / (spec.vocab_size if divergence.sweeps == "raw" else spec.temperature),
        hard_weight=spec.hard_weight,
        a=a,
        b=b,
    )


def hard_power(spec: RowSpec) -> int:
    """The power of a tempered e^(z/T) that the cross-entropy's e^z is, which saves an exponential; 0: none is cheap."""
    return int(spec.temperature) if spec.temperature in (1, 2) else 0
