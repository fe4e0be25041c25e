"""Where a row of logits comes from, and whether the sources of one call fit together.

A source is a tensor of logits `[..., V]` or a `Projection`, whose logits are computed a chunk at a time and never
formed as a whole; a teacher may also be `SparseTargets`, what a cache kept of each of its rows. `check` raises before
any work, quoting the offending value. `parts` takes a source apart into the arguments of an operator, which are
tensors and numbers, and `of_parts` puts it together again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastkd import arguments

__all__ = [
    "LogProbabilities",
    "Projection",
    "Source",
    "SparseKind",
    "SparseTargets",
    "Teacher",
    "check",
    "check_logits",
    "of_parts",
    "parts",
    "tensors",
]


@dataclass(frozen=True, eq=False)
class Projection:
    """Logits as the product of hidden states and an output head: `z = logit_scale·(hidden·weightᵀ + bias)`.

    With a softcap, z is replaced by `softcap·tanh(z / softcap)`. Pass one wherever a loss takes logits; gradients
    flow to `hidden`, `weight` and `bias`, in their dtypes, where these require them.

    Args:
        hidden: hidden states `[..., H]`, fp32 / bf16 / fp16 (float64 on the reference backend).
        weight: output head `[V, H]`, as in `nn.Linear(H, V).weight`; its dtype may differ from that of `hidden`.
        bias: `[V]` or None.
        softcap: bound of the logits' absolute value (Gemma 2, Gemma Team 2024), or None.
        logit_scale: factor of the logits (Cohere's Command models).

    The product is accumulated in fp32 and its fp32 result is used, whatever the operands' dtypes: rounding logits to
    16 bits ruins the distillation gradient of a student close to its teacher.

    Raises TypeError or ValueError for operands that do not fit together.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if tensor is not None or name != "bias":
                arguments.floating(f"Projection {name}", tensor)
        if self.weight.dim() != 2 or 0 in self.weight.shape:
            raise ValueError(f"Projection weight must have shape [vocab, hidden], got {tuple(self.weight.shape)}")
        if self.hidden.dim() == 0 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"Projection hidden {tuple(self.hidden.shape)} must end in the {self.weight.shape[1]} columns of "
                f"weight {tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"Projection bias must have shape [{self.weight.shape[0]}] beside weight {tuple(self.weight.shape)}, "
                f"got {tuple(self.bias.shape)}"
            )
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None and tensor.device != self.hidden.device:
                raise ValueError(f"Projection {name} is on {tensor.device}, but hidden is on {self.hidden.device}")
        doubles = [t.dtype == torch.float64 for t in (self.hidden, self.weight, self.bias) if t is not None]
        if any(doubles) and not all(doubles):
            raise TypeError(
                "Projection hidden, weight and bias must all be float64 or none of them, got "
                f"{self.hidden.dtype}, {self.weight.dtype} and {None if self.bias is None else self.bias.dtype}"
            )
        if self.softcap is not None:
            arguments.number("Projection softcap", self.softcap, above=True)
        arguments.number("Projection logit_scale", self.logit_scale, above=True)

    @property
    def shape(self) -> torch.Size:
        """The shape `[..., V]` its logits would have."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def dim(self) -> int:
        return self.hidden.dim()

    def parts(self, side: str) -> dict[str, Any]:
        """See `sources.parts`."""
        head = [float(self.softcap or 0), float(self.logit_scale)]
        return {side: self.hidden, f"{side}_weight": self.weight, f"{side}_bias": self.bias, f"{side}_head": head}

    @classmethod
    def of_parts(cls, side: str, call: Any) -> Projection | None:
        """See `sources.of_parts`."""
        weight = getattr(call, f"{side}_weight")
        if weight is None:
            return None
        softcap, logit_scale = getattr(call, f"{side}_head")
        return cls(getattr(call, side), weight, getattr(call, f"{side}_bias"), softcap or None, logit_scale)

    def logits(self) -> Tensor:
        """The `[..., V]` tensor that losses avoid, differentiable; rounded as `torch.nn.functional.linear` rounds."""
        wide = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        z = self.logit_scale * torch.nn.functional.linear(self.hidden.to(wide), self.weight.to(wide), bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def detach(self) -> Projection:
        """The same logits without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Projection(self.hidden.detach(), self.weight.detach(), bias, self.softcap, self.logit_scale)


SparseKind = Literal["ghost", "renormalize", "sampled"]


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """A teacher that keeps K tokens of each row and how likely they are: what a cache stores, or a top-k.

    Pass one wherever a loss takes a teacher. The student's logits, or its projection, stay whole; the loss costs what
    cross-entropy costs.

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


class LogProbabilities(Tensor):
    """Log-probabilities `[..., V]` in the place of a teacher's logits, as a dense cache keeps them.

    A tensor like any other. Losses with a softmax take it as logits: adding a constant to a row does not change them. A
    loss on raw logits refuses it. `tensor.as_subclass(LogProbabilities)` makes one.
    """


Source = Tensor | Projection
Teacher = Tensor | Projection | SparseTargets


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
    projected = isinstance(student, Projection) or isinstance(teacher, Projection)
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
_COMPOSED: tuple[type[Projection] | type[SparseTargets], ...] = (Projection, SparseTargets)


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


def tensors(source: Teacher) -> list[Tensor]:
    """Every tensor a source is made of."""
    if isinstance(source, Tensor):
        return [source]
    return [value for value in vars(source).values() if isinstance(value, Tensor)]


def _check_source(name: str, source: object) -> None:
    if isinstance(source, Projection):
        return  # checked itself
    if not isinstance(source, Tensor):
        also = " or fastkd.SparseTargets" if name == "teacher" else ""
        arguments.tensor(name, source, also=f" of logits or a fastkd.Projection{also}")
    check_logits(source, f"{name} logits")


def check_logits(logits: object, name: str = "logits") -> None:
    """Raise TypeError or ValueError for anything but a floating tensor `[..., vocab]`."""
    arguments.floating(name, logits)
    assert isinstance(logits, Tensor)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., vocab] with vocab > 0, got {tuple(logits.shape)}")


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
    widened = doubles == [True, False] and isinstance(student, Tensor) and isinstance(teacher, Tensor)
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
