"""Several teachers as one, mixed in probability space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import arguments
from fastkd.projected import LogProbabilities, Projection, check_logits, check_not_empty

__all__ = ["Mixture"]

#: How far the weights' sum may be from 1. A loss normalises the mixture's rows, so this is no error of the result.
_SUM = 1e-5


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several teachers as one: `p = Σ wᵢ·softmax(zᵢ / T)`, T the loss's temperature for the teacher.

    The probabilities of an ensemble are averaged, not its logits, as for specialists in Hinton et al. (2015). Pass one
    wherever a loss takes a teacher, for any divergence with a softmax. One kernel mixes the rows of some tokens at a
    time, which the loss then reads. So neither probabilities nor, of projections, logits are formed for more tokens.

    Args:
        teachers: one or more, each logits `[..., V]` (fp32 / bf16 / fp16; float64 on the reference backend) or a
            `Projection`, in any combination, of the same leading shape and vocabulary.
        weights: one of each teacher, each ≥ 0, with a sum of 1. None: equal. A teacher of weight 0 is not computed.

    Raises TypeError for teachers of another type (`SparseTargets`, another `Mixture`) and for float64 beside another
    dtype, ValueError for shapes, vocabularies or devices that differ and for weights that are not as above.
    """

    teachers: Sequence[Tensor | Projection]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.teachers, (Tensor, Projection)) or not isinstance(self.teachers, Sequence):
            raise TypeError(f"Mixture teachers must be a sequence of teachers, got {type(self.teachers).__name__}")
        teachers = tuple(_checked(i, teacher) for i, teacher in enumerate(self.teachers))
        if not teachers:
            raise ValueError("Mixture teachers must have at least one teacher, got none")
        for i, teacher in enumerate(teachers[1:], 1):
            _check_beside(i, teacher, teachers[0])
        object.__setattr__(self, "teachers", teachers)
        object.__setattr__(self, "weights", _checked_weights(self.weights, len(teachers)))

    @property
    def shape(self) -> torch.Size:
        """`[..., V]`, of each teacher's logits."""
        return self.teachers[0].shape

    @property
    def device(self) -> torch.device:
        return self.teachers[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first teacher."""
        return self.teachers[0].dtype

    def dim(self) -> int:
        return self.teachers[0].dim()

    def detach(self) -> Mixture:
        """The same without gradient; no loss gives a teacher one."""
        return Mixture([teacher.detach() for teacher in self.teachers], self.weights)

    def pairs(self) -> list[tuple[Tensor | Projection, float]]:
        """Each teacher with its weight."""
        assert self.weights is not None
        return list(zip(self.teachers, self.weights, strict=True))

    def simplified(self) -> Mixture | Tensor | Projection:
        """Without the teachers of weight 0: what a loss computes. One teacher alone is itself."""
        kept = [(teacher, weight) for teacher, weight in self.pairs() if weight > 0]
        if len(kept) == 1:
            return kept[0][0]
        return self if len(kept) == len(self.teachers) else Mixture(*zip(*kept, strict=True))

    def parts(self, side: str) -> dict[str, Any]:
        """See `sources.parts`. Of each teacher logits or hidden states, weight and bias; its weight, and its head."""
        tensors: list[Tensor | None] = []
        numbers: list[float] = []
        for teacher, weight in self.pairs():
            if isinstance(teacher, Projection):
                tensors += [teacher.hidden, teacher.weight, teacher.bias]
                numbers += [weight, float(teacher.softcap or 0), float(teacher.logit_scale)]
            else:
                tensors += [teacher, None, None]
                numbers += [weight, 0.0, 1.0]
        return {f"{side}_mixed": tensors, f"{side}_mixture": numbers}

    @classmethod
    def of_parts(cls, side: str, call: Any) -> Mixture | None:
        """See `sources.of_parts`."""
        tensors, numbers = getattr(call, f"{side}_mixed", None), getattr(call, f"{side}_mixture", None)
        if not tensors or not numbers:
            return None
        teachers: list[Tensor | Projection] = []
        for i in range(0, len(tensors), 3):
            logits, weight, bias = tensors[i : i + 3]
            _, softcap, logit_scale = numbers[i : i + 3]
            teachers.append(
                logits if weight is None else Projection(logits, weight, bias, softcap or None, logit_scale)
            )
        return cls(teachers, numbers[::3])


def _checked(index: int, teacher: Any) -> Tensor | Projection:
    """A teacher, or TypeError."""
    name = f"Mixture teachers[{index}]"
    if isinstance(teacher, Projection):
        check_not_empty(teacher, name)
        return teacher
    if isinstance(teacher, Mixture):
        raise TypeError(f"{name} is a Mixture: pass its teachers, their weights multiplied by its own")
    if not isinstance(teacher, Tensor) and hasattr(teacher, "logprobs"):
        raise TypeError(
            f"{name} is a {type(teacher).__name__}, which keeps some tokens only: a mixture takes whole rows, logits, "
            "a fastkd.Projection, or what a dense cache holds"
        )
    arguments.tensor(name, teacher, also=" of logits or a fastkd.Projection")
    check_logits(teacher, name)
    whole: Tensor = teacher.as_subclass(Tensor) if isinstance(teacher, LogProbabilities) else teacher
    return whole


def _check_beside(index: int, teacher: Tensor | Projection, first: Tensor | Projection) -> None:
    """ValueError or TypeError where a teacher does not fit the first one."""
    name = f"Mixture teachers[{index}]"
    if teacher.shape[-1] != first.shape[-1]:
        raise ValueError(
            f"{name} has a vocabulary of {teacher.shape[-1]} and teachers[0] one of {first.shape[-1]}: teachers are "
            "mixed token by token, so cut padding off the wider one, or take teachers of one tokenizer"
        )
    if teacher.shape[:-1] != first.shape[:-1]:
        raise ValueError(
            f"{name} has leading shape {tuple(teacher.shape[:-1])}, but teachers[0] has {tuple(first.shape[:-1])}"
        )
    if teacher.device != first.device:
        raise ValueError(f"{name} is on {teacher.device}, but teachers[0] is on {first.device}")
    if (teacher.dtype == torch.float64) != (first.dtype == torch.float64):
        raise TypeError(f"Mixture teachers must all be float64 or none, got {first.dtype} and {teacher.dtype}")


def _checked_weights(weights: Any, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1 / count,) * count
    found = tuple(arguments.number(f"Mixture weights[{i}]", weight) for i, weight in enumerate(weights))
    if len(found) != count:
        raise ValueError(f"Mixture has {count} teachers, but weights has {len(found)}: {list(found)}")
    if not math.isclose(math.fsum(found), 1, abs_tol=_SUM):
        raise ValueError(f"Mixture weights must sum to 1, got {list(found)}, whose sum is {math.fsum(found):g}")
    return found
