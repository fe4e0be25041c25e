"""Sources that have every column of a row: tensors of logits, and `Projection`, which computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import arguments, gathered

__all__ = ["LogProbabilities", "Projection", "check_logits", "check_not_empty"]


def check_logits(logits: object, name: str = "logits", least: int = 1) -> None:
    """Raise TypeError or ValueError for anything but a floating tensor `[..., vocab]` of `least` columns or more."""
    arguments.floating(name, logits)
    assert isinstance(logits, Tensor)
    if logits.dim() == 0 or logits.shape[-1] < least:
        positive = " with vocab > 0" if least else ""
        raise ValueError(f"{name} must have shape [..., vocab]{positive}, got {tuple(logits.shape)}")


def check_not_empty(source: Projection, name: str) -> None:
    """Raise ValueError for a head without rows, which only a `VocabShard` may have."""
    if source.weight.shape[0] == 0:
        raise ValueError(
            f"{name} weight must have shape [vocab, hidden] with vocab > 0, got {tuple(source.weight.shape)}: a head "
            "without rows is one rank's, in a fastkd.VocabShard"
        )


class LogProbabilities(Tensor):
    """Log-probabilities `[..., V]` in the place of a teacher's logits, as a dense cache keeps them.

    A tensor like any other. Losses with a softmax take it as logits: adding a constant to a row does not change them. A
    loss on raw logits refuses it. `tensor.as_subclass(LogProbabilities)` makes one.
    """


@dataclass(frozen=True, eq=False)
class Projection:
    """Logits as the product of hidden states and an output head: `z = logit_scale·(hidden·weightᵀ + bias)`.

    With a softcap, z is replaced by `softcap·tanh(z / softcap)`. Pass one wherever a loss takes logits; gradients
    flow to `hidden`, `weight` and `bias`, in their dtypes, where these require them.

    Args:
        hidden: hidden states `[..., H]`, fp32 / bf16 / fp16 (float64 on the reference backend).
        weight: output head `[V, H]`, as in `nn.Linear(H, V).weight`; its dtype may differ from that of `hidden`. V may
            be 0 within a `VocabShard`.
        bias: `[V]` or None.
        softcap: bound of the logits' absolute value (Gemma 2, Gemma Team 2024), or None.
        logit_scale: factor of the logits (Cohere's Command models).

    The product is accumulated in fp32 and its fp32 result is used, whatever the operands' dtypes: rounding logits to
    16 bits ruins the distillation gradient of a student close to its teacher.

    weight and bias may be DTensors beside a plain `hidden`: parameters of data-parallel ranks, each with tokens of its
    own, `Shard(0)` along at most one dimension of the mesh and `Replicate()` along the others. A loss gathers them
    once. Its backward reduces the gradient once, to the mean over all ranks of the mesh, which is what FSDP2 leaves in
    `.grad` by default, in the parameter's dtype. Each rank must make the same calls.

    Raises TypeError or ValueError for operands that do not fit together, for other placements, and for a weight that
    ZeRO-3 has emptied. A loss raises ValueError where FSDP2 has freed the weight since.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        arguments.floating("Projection hidden", self.hidden, placed=True)
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None or name != "bias":
                if not gathered.is_in_parts(self.hidden):
                    tensor = gathered.checked_part(f"Projection {name}", tensor)
                arguments.floating(f"Projection {name}", tensor, placed=True)
        if self.weight.dim() != 2 or self.weight.shape[1] == 0:
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
        head = self.whole()
        wide = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        bias = None if head.bias is None else head.bias.to(wide)
        z = self.logit_scale * torch.nn.functional.linear(self.hidden.to(wide), head.weight.to(wide), bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def whole(self) -> Projection:
        """The same logits with all rows of the head on this rank; a collective call where they are in parts."""
        if gathered.is_in_parts(self.hidden):  # then the vocabulary is spread, and the head stays where it is
            return self
        weight = gathered.whole("Projection weight", self.weight)
        bias = None if self.bias is None else gathered.whole("Projection bias", self.bias)
        if weight is self.weight and bias is self.bias:
            return self
        return Projection(self.hidden, weight, bias, self.softcap, self.logit_scale)

    def detach(self) -> Projection:
        """The same logits without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Projection(self.hidden.detach(), self.weight.detach(), bias, self.softcap, self.logit_scale)
