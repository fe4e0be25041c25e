"""Logits whose vocabulary is spread over the ranks of a group: `VocabShard`, what one rank has of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastkd import arguments
from fastkd.projected import Projection, check_logits

__all__ = ["VocabShard"]


@dataclass(frozen=True, eq=False)
class VocabShard:
    """One rank's columns of logits `[..., vocab_size]` that are spread over the ranks of a process group.

    Pass one wherever a loss takes logits, on every rank of the group at the same call, with the same tokens, labels and
    settings. No rank gets another's columns: ranks exchange what each knows of a row, at most ten numbers, and each
    returns the same loss, bit for bit. (The scheme is that of Megatron-LM's vocabulary-parallel cross-entropy,
    Shoeybi et al. 2019, for every divergence.)

    Args:
        source: logits `[..., width]`, or a `Projection` whose weight `[width, H]` and bias are this rank's rows of the
            head and whose hidden states are whole, the same on every rank.
        first: the token id of this rank's first column; it has the ids in [first, first + width).
        vocab_size: columns of all ranks together, of which each is on one rank. Widths may differ, and may be 0.
        group: a `torch.distributed` process group, or its name; None: all processes.
        partial_hidden: a rank's columns give a part of the hidden states' gradient, and the backward adds the parts of
            all ranks up, once. True: it returns this rank's part, for callers who add up themselves (reduce-scatter,
            under sequence parallelism).

    A teacher may be spread in another way than the student, or not at all: a whole one is cut where it is, and one cut
    otherwise is gathered, some rows at a time. Gradients of logits, weight and bias are those of this rank's columns.
    DTensors need none of this: see `KDLoss`.

    Raises TypeError or ValueError for parts that do not fit together, and RuntimeError where `torch.distributed` is not
    initialised. That the ranks' columns make up the vocabulary is checked when a loss is computed, once.
    """

    source: Tensor | Projection
    first: int
    vocab_size: int
    group: Any = None
    partial_hidden: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, Projection):
            arguments.tensor("VocabShard source", self.source, also=" of logits or a fastkd.Projection")
            check_logits(self.source, "VocabShard logits", least=0)
        arguments.integer("VocabShard first", self.first, least=0)
        arguments.integer("VocabShard vocab_size", self.vocab_size, least=1)
        arguments.switch("VocabShard partial_hidden", self.partial_hidden)
        if self.first + self.source.shape[-1] > self.vocab_size:
            raise ValueError(
                f"VocabShard has the columns [{self.first}, {self.first + self.source.shape[-1]}), but vocab_size is "
                f"{self.vocab_size}: first is the token id of this rank's first column, vocab_size that of all ranks"
            )
        object.__setattr__(self, "group", _name_of(self.group))

    @property
    def shape(self) -> torch.Size:
        """`[..., vocab_size]`, of the logits of all ranks."""
        return torch.Size((*self.source.shape[:-1], self.vocab_size))

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def dim(self) -> int:
        return self.source.dim()

    def detach(self) -> VocabShard:
        """The same without gradient."""
        return replace(self, source=self.source.detach())

    def parts(self, side: str) -> dict[str, Any]:
        """See `sources.parts`."""
        source = {side: self.source} if isinstance(self.source, Tensor) else self.source.parts(side)
        return {**source, f"{side}_cut": [self.first, self.vocab_size], f"{side}_group": self.group}

    @classmethod
    def of_parts(cls, side: str, call: Any) -> VocabShard | None:
        """See `sources.of_parts`."""
        cut = getattr(call, f"{side}_cut", None)
        if not cut:
            return None
        first, vocab_size = cut
        source = Projection.of_parts(side, call) or getattr(call, side)
        return cls(source, first, vocab_size, getattr(call, f"{side}_group"))


def _name_of(group: Any) -> str:
    """By which operators find a group: it crosses into them as text."""
    if isinstance(group, str) and torch.compiler.is_compiling():
        return group  # the operator looks it up
    dist = torch.distributed
    if (group is None or isinstance(group, str)) and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("VocabShard needs torch.distributed: call torch.distributed.init_process_group first")
    if isinstance(group, str):
        _check_known(group)
        return group
    if group is None:
        group = dist.group.WORLD
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f"VocabShard group must be a torch.distributed process group, got {type(group).__name__}")
    return name


def _check_known(name: str) -> None:
    """ValueError for a name that no process group has."""
    try:
        torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    except (LookupError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"VocabShard group {name!r} is the name of no process group here: pass the group itself, as "
            "torch.distributed.new_group() or mesh.get_group() returns it, or None for all processes"
        ) from error
