"""Where a row of logits comes from, and whether the sources of one call fit together.

A source is a tensor of logits `[..., V]` or a `Projection`, whose logits are computed a chunk at a time and never
formed as a whole; a teacher may also be `SparseTargets`, what a cache kept of each of its rows, or a `Mixture` of
several teachers. `check` raises before any work, quoting the offending value. `parts` takes a source apart into the
arguments of an operator, which are tensors and numbers, and `of_parts` puts it together again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastkd import arguments
from fastkd.itemized import Itemized, itemized
from fastkd.mixture import Mixture
from fastkd.projected import LogProbabilities, Projection, check_logits, check_not_empty
from fastkd.shards import VocabShard

__all__ = [
    "LogProbabilities",
    "Mixture",
    "Projection",
    "Source",
    "SparseKind",
    "SparseTargets",
    "Teacher",
    "VocabShard",
    "check",
    "check_logits",
    "of_parts",
    "parts",
    "tensors",
    "whole",
]

SparseKind = Literal["ghost", "renormalize", "sampled"]


@itemized
@dataclass(frozen=True, eq=False)
class SparseTargets(Itemized):
    """A teacher that keeps K tokens of each row and how likely they are: what a cache stores, or a top-k.

    Pass one wherever a loss takes a teacher. The student's logits, or its projection, stay whole; the loss costs what
    cross-entropy costs. It is a mapping of its tensors (`fastkd.itemized`), so accelerate can send a batch that holds
    one to a device, concatenate, slice and gather it as any other.

    Args:
        ids: token ids `[..., K]`, integers, in any order, none twice in a row.
        logprobs: `[..., K]`, fp32 / bf16 / fp16 (float64 on the reference backend): natural logarithms of the tokens'
            probabilities at `temperature` (of the whole row's softmax) or, for `"sampled"`, of their weights. −inf
            marks an entry that is not there, whatever its id: rows may keep fewer than K.
        kind: what is made of the tokens that were not kept.
            `"ghost"`: they are one more token, on both sides; its mass is 1 minus the others. Any divergence
            with a softmax.
            `"renormalize"`: they have probability 0 and the K others are scaled to sum to 1. Forward KL. Biased: the
            student learns to give them nothing.
            `"sampled"`: the K were drawn at random so that their weights (counts ÷ draws, or importance weights) are
            unbiased estimates of all probabilities, and the loss and its gradient of those of the whole row
            (random-sampling distillation, Anshumann et al. 2025). Forward KL.
        temperature: of the softmax that `logprobs` come from; a loss at another one refuses them.
        rest: `[...]`, `"ghost"` only: log of the mass not kept. None: log(1 − Σ exp(logprobs)), which the rounding of
            `logprobs` makes wrong where nearly everything was kept (nothing is left below 1e-6).
        entropy: `[...]`, `"sampled"` only: the row's entropy in nats, which makes values comparable with those of
            dense forward KL. None: values are cross-entropies, larger by it. Gradients do not depend on it.

    Raises TypeError or ValueError for parts that do not fit together. Ids outside the vocabulary, duplicates, and a
    ghost's probabilities that sum to more than 1 are found when a loss is computed, on GPUs only with
    `FASTKD_DEBUG=1`, since the check would synchronise; an id outside the vocabulary then gives a NaN loss. A NaN among
    `logprobs` reaches the loss.
    """

    ids: Tensor
    logprobs: Tensor
    kind: SparseKind
    temperature: float
    rest: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        arguments.integers("SparseTargets ids", self.ids)
        arguments.floating("SparseTargets logprobs", self.logprobs)
        if self.kind not in get_args(SparseKind):
            raise ValueError(f"SparseTargets kind must be one of {get_args(SparseKind)}, got {self.kind!r}")
        arguments.temperature("SparseTargets temperature", self.temperature)
        if self.ids.dim() == 0 or self.ids.shape[-1] == 0 or self.ids.shape != self.logprobs.shape:
            raise ValueError(
                f"SparseTargets ids and logprobs must have the same shape [..., K] with K > 0, got "
                f"{tuple(self.ids.shape)} and {tuple(self.logprobs.shape)}"
            )
        for name, value, kind in (("rest", self.rest, "ghost"), ("entropy", self.entropy, "sampled")):
            if value is None:
                continue
            arguments.floating(f"SparseTargets {name}", value)
            if self.kind != kind:
                raise ValueError(f"SparseTargets {name} belongs to kind={kind!r}, but kind is {self.kind!r}")
            if value.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"SparseTargets {name} must have the shape {tuple(self.ids.shape[:-1])} beside ids "
                    f"{tuple(self.ids.shape)}, got {tuple(value.shape)}"
                )
        for name, value in (("logprobs", self.logprobs), ("rest", self.rest), ("entropy", self.entropy)):
            if value is not None and value.device != self.ids.device:
                raise ValueError(f"SparseTargets {name} is on {value.device}, but ids is on {self.ids.device}")

    @property
    def shape(self) -> torch.Size:
        """`[..., K]`."""
        return self.ids.shape

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def dtype(self) -> torch.dtype:
        return self.logprobs.dtype

    def dim(self) -> int:
        return self.ids.dim()

    def parts(self, side: str) -> dict[str, Any]:
        """See `sources.parts`. The temperature is an argument of the operator itself."""
        return {f"{side}_{name}": getattr(self, name) for name in ("ids", "logprobs", "kind", "rest", "entropy")}

    @classmethod
    def of_parts(cls, side: str, call: Any) -> SparseTargets | None:
        """See `sources.of_parts`."""
        if getattr(call, f"{side}_ids", None) is None:
            return None
        names = ("ids", "logprobs", "kind", "temperature", "rest", "entropy")
        return cls(*(getattr(call, f"{side}_{name}") for name in names))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTargets:
        """The same on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseTargets:
        """The same in page-locked memory; a DataLoader with `pin_memory=True` calls it."""
        return self._mapped(Tensor.pin_memory)

    def detach(self) -> SparseTargets:
        """The same without gradient; no loss gives a teacher one."""
        return self._mapped(Tensor.detach)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        rest, entropy = (None if part is None else function(part) for part in (self.rest, self.entropy))
        return replace(self, ids=function(self.ids), logprobs=function(self.logprobs), rest=rest, entropy=entropy)


Source = Tensor | Projection | VocabShard
Teacher = Tensor | Projection | VocabShard | SparseTargets | Mixture


def check(
    student: Source,
    teacher: Teacher | None,
    labels: Tensor | None,
    weights: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Validate one call's inputs and return the number of vocabulary columns that count.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or size.
    """
    _check_source("student", student)
    projected = any(isinstance(source, Projection) for source in map(_held, (student, *_members(teacher))))
    arguments.holds_values("student", student)
    if teacher is not None:
        if not isinstance(teacher, SparseTargets):
            _check_source("teacher", teacher)
        _check_beside("teacher", teacher, student, teacher.shape[:-1])
        _check_doubles(student, teacher)
    if labels is not None:
        arguments.integers("labels", labels)
        _check_beside("labels", labels, student, labels.shape, may_be_on_cpu=projected)
    if weights is not None:
        arguments.tensor("weights", weights)
        _check_beside("weights", weights, student, weights.shape, may_be_on_cpu=projected)
        arguments.check_counts("weights", weights)
    return _vocab_size(student, teacher, vocab_size)


#: The sources that are no tensor.
_Composed = type[VocabShard] | type[Projection] | type[SparseTargets] | type[Mixture]
_COMPOSED: tuple[_Composed, ...] = (VocabShard, Projection, SparseTargets, Mixture)  # a shard may hold a projection


def parts(side: str, source: Teacher | None) -> dict[str, Any]:
    """A source as arguments of an operator: fields of `call.Call` → tensors and numbers.

    `side` is `"student"` or `"teacher"`. Logits are the field of that name; other sources say their fields.
    """
    if source is None or isinstance(source, Tensor):
        return {side: source}
    return source.parts(side)


def of_parts(side: str, call: Any) -> Teacher | None:
    """The source that `parts` took apart, or None; `call` has the parts as attributes."""
    for kind in _COMPOSED:
        source = kind.of_parts(side, call)
        if source is not None:
            return source
    logits: Tensor | None = getattr(call, side)
    return logits


def _held(source: object) -> object:
    """What a rank has of a source that is spread, or the source."""
    return source.source if isinstance(source, VocabShard) else source


def whole(source: Any) -> Any:
    """The source with all rows of its output heads on this rank: those that are in parts are gathered."""
    if isinstance(source, Projection):
        return source.whole()
    if isinstance(source, VocabShard):  # all rows of this rank's columns
        own = whole(source.source)
        return source if own is source.source else replace(source, source=own)
    if isinstance(source, Mixture):
        teachers = [whole(teacher) for teacher in source.teachers]
        if any(new is not old for new, old in zip(teachers, source.teachers, strict=True)):
            return Mixture(teachers, source.weights)
    return source


def tensors(source: Teacher) -> list[Tensor]:
    """Every tensor a source is made of."""
    if isinstance(source, Tensor):
        return [source]
    if isinstance(source, Mixture):
        return [tensor for teacher in source.teachers for tensor in tensors(teacher)]
    if isinstance(source, VocabShard):
        return tensors(source.source)
    return [value for value in vars(source).values() if isinstance(value, Tensor)]


def _members(teacher: object) -> tuple[object, ...]:
    """The teachers of a mixture, or the teacher."""
    return tuple(teacher.teachers) if isinstance(teacher, Mixture) else (teacher,)


def _check_source(name: str, source: object) -> None:
    if isinstance(source, VocabShard) or (isinstance(source, Mixture) and name == "teacher"):
        return  # checked itself
    if isinstance(source, Projection):
        return check_not_empty(source, name)
    if not isinstance(source, Tensor):
        also = ", fastkd.SparseTargets or fastkd.Mixture" if name == "teacher" else ""
        arguments.tensor(name, source, also=f" of logits or a fastkd.Projection{also}")
    check_logits(source, f"{name} logits")


def _check_beside(name: str, value: Teacher, student: Source, leading: torch.Size, may_be_on_cpu: bool = False) -> None:
    if leading != student.shape[:-1]:
        raise ValueError(
            f"{name} has leading shape {tuple(leading)}, but the student logits {tuple(student.shape)} "
            f"have {tuple(student.shape[:-1])}"
        )
    if value.device != student.device and not (may_be_on_cpu and value.device.type == "cpu"):
        raise ValueError(f"{name} is on {value.device}, but the student is on {student.device}")


def _check_doubles(student: Source, teacher: Teacher) -> None:
    """TypeError for float64 beside another dtype, but that the reference widens a teacher's logits to the student's."""
    doubles = [source.dtype == torch.float64 for source in (student, teacher)]
    widened = doubles == [True, False] and isinstance(student, Tensor) and isinstance(_held(teacher), Tensor)
    if any(doubles) and not all(doubles) and not widened and not isinstance(teacher, SparseTargets):
        raise TypeError(f"student and teacher must both be float64 or neither, got {student.dtype} and {teacher.dtype}")


def _vocab_size(student: Source, teacher: Teacher | None, vocab_size: int | None) -> int:
    width = student.shape[-1]
    teacher_width = width if teacher is None or isinstance(teacher, SparseTargets) else teacher.shape[-1]
    narrowest = min(width, teacher_width)
    if vocab_size is None:
        if teacher_width != width:
            raise ValueError(
                f"student has {width} vocabulary columns and teacher {teacher_width}; if one is padded, "
                "pass vocab_size=<number of real tokens> so that only the first vocab_size columns count"
            )
        return width
    vocab_size = arguments.integer("vocab_size", vocab_size)
    if not 0 < vocab_size <= narrowest:
        raise ValueError(f"vocab_size={vocab_size} must be in [1, {narrowest}], the narrower of the two sources")
    return vocab_size
