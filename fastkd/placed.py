"""DTensors as what a rank has of them, and the gradient of hidden states that several ranks read."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastkd import arguments, autograd
from fastkd.agreement import layout_of
from fastkd.shards import VocabShard
from fastkd.sources import Mixture, Projection, Source, tensors

__all__ = ["beside", "check_cut", "here", "like", "student_here"]


def here(source: Any, name: str, written: bool = False) -> Any:
    """A source with plain tensors in place of DTensors: logits `Shard(-1)` and heads `Shard(0)` become a `VocabShard`.

    ValueError for placements that a loss cannot be right with. `written`: the gradient is to replace logits in memory.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return source
    if isinstance(source, module.DTensor):
        return _logits(source, name, written)
    if isinstance(source, Projection) and isinstance(source.hidden, module.DTensor):
        return _projection(source, name, module)
    if isinstance(source, Mixture) and any(isinstance(x, module.DTensor) for x in tensors(source)):
        return Mixture([here(teacher, name) for teacher in source.teachers], source.weights)
    return source


def check_cut(source: Any) -> None:
    """ValueError, on all ranks, where the columns of a `VocabShard` are not each on one; not looked at on GPUs."""
    if isinstance(source, VocabShard) and arguments.is_checked(tensors(source)[0]):
        held = source.source.shape[-1]
        layout_of(source.group, source.first, held, source.vocab_size, source.device, again=True)


def student_here(source: Source) -> Source:
    """A student whose hidden states get the sum of what all ranks find of their gradient, where they are to."""
    if (
        isinstance(source, VocabShard)
        and isinstance(source.source, Projection)
        and source.source.hidden.requires_grad
        and not source.partial_hidden
    ):
        hidden = autograd.read_by_ranks(source.source.hidden, source.group)
        return replace(source, source=replace(source.source, hidden=hidden), partial_hidden=True)
    return source


def beside(values: Any, name: str) -> Any:
    """Labels, weights or a number of tokens, which every rank has whole."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(values, module.DTensor):
        return values
    if not all(placement.is_replicate() for placement in values.placements):
        raise ValueError(f"{name} has the placements {values.placements}, {_WHOLE.format(name=name)}")
    return values.to_local()


def like(given: Any, own: Tensor) -> Tensor:
    """What a rank has of a result, as a DTensor placed as what was `given`, where that is one."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(given, module.DTensor):
        return own
    return module.DTensor.from_local(  # type: ignore[no-any-return]
        own, given.device_mesh, given.placements, run_check=False, shape=given.shape, stride=given.stride()
    )


_WHOLE = "but every rank needs it whole: pass {name}.redistribute(placements=[Replicate()]), or local tensors"


def _logits(logits: Any, name: str, written: bool) -> Tensor | VocabShard:
    at = _cut_dimension(logits, logits.dim() - 1, f"{name} logits", "Shard(-1), over the vocabulary")
    own = autograd.held_by_rank(logits, written)
    return own if at is None else _shard(own, logits, at, logits.dim() - 1)


def _projection(source: Projection, name: str, module: Any) -> Projection | VocabShard:
    hidden: Any = source.hidden
    weight: Any = source.weight
    bias: Any = source.bias
    for part, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, module.DTensor):
            raise ValueError(
                f"{name} {part} is a plain tensor beside hidden states that are a DTensor: make one of it too, or "
                "pass hidden.to_local() where each rank has tokens of its own"
            )
    at = _cut_dimension(weight, 0, f"{name} weight", "Shard(0), over the vocabulary")
    if bias is not None and _cut_dimension(bias, 0, f"{name} bias", "placed as the weight is") != at:
        raise ValueError(f"{name} bias has the placements {bias.placements} beside a weight with {weight.placements}")
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(f"{name} hidden has the placements {hidden.placements}, {_WHOLE.format(name='hidden')}")
    if hidden.device_mesh != weight.device_mesh:
        raise ValueError(f"{name} hidden is on {hidden.device_mesh}, but its weight on {weight.device_mesh}")
    placements = list(hidden.placements)
    if at is not None:
        placements[at] = module.Partial()
    local = replace(
        source,
        hidden=hidden.to_local(grad_placements=placements),
        weight=weight.to_local(),
        bias=None if bias is None else bias.to_local(),
    )
    return local if at is None else _shard(local, weight, at, 0)


def _cut_dimension(tensor: Any, vocabulary: int, name: str, wanted: str) -> int | None:
    """The dimension of the mesh over which the vocabulary is spread, or None where the tensor is whole."""
    found = None
    for at, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if found is not None or not placement.is_shard() or placement.dim % tensor.dim() != vocabulary:
            raise ValueError(
                f"{name} has the placements {tensor.placements}; a loss takes Replicate() and, once, {wanted}: "
                "redistribute it, or pass the local tensors of a batch that is spread over ranks"
            )
        found = at
    return found


def _shard(local: Tensor | Projection, cut: Any, at: int, dimension: int) -> VocabShard:
    """`cut` is the DTensor whose `dimension` is the vocabulary."""
    mesh, vocab_size = cut.device_mesh, cut.shape[dimension]
    step = -(-vocab_size // mesh.size(at))  # as torch.chunk cuts
    first = min(step * mesh.get_local_rank(at), vocab_size)
    return VocabShard(local, first, vocab_size, mesh.get_group(at), partial_hidden=True)
