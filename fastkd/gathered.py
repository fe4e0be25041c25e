"""Output heads that data-parallel ranks keep in parts: gathered once for a call, their gradient reduced once.

Under FSDP2 each rank has tokens of its own and some rows of every parameter, a `DTensor`. A loss needs all rows of the
head for its tokens. So they are gathered before the first product, not again for each chunk of tokens, and freed with
the call. In the backward the gradient of all ranks' tokens is reduced as `fully_shard` does by default: each rank
receives, for its own rows, the *mean* over the ranks.

Nothing here imports `torch.distributed.tensor`: who has a DTensor has done so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_not_freed", "checked_part", "is_in_parts", "whole"]

#: Of one tensor, under the names of torch 2.13 or those before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def is_in_parts(value: object) -> bool:
    """Whether a tensor is a DTensor, which several processes hold."""
    return isinstance(value, Tensor) and type(value) is not Tensor and hasattr(value, "placements")


def checked_part(name: str, value: Any) -> Any:
    """The rows of this rank of a parameter that `whole` can gather; another value as it is.

    Raises ValueError for a DTensor with other placements than `Replicate` and one `Shard(0)`, and for what ZeRO-3 has
    emptied.
    """
    if hasattr(value, "ds_id") and value.numel() == 0:
        raise ValueError(
            f"{name} is empty: ZeRO-3 keeps its {tuple(value.ds_shape)} in parts. fastkd.project(engine, …) takes it "
            "from the model's forward; else compute the loss within the forward of the module that has it"
        )
    if not is_in_parts(value):
        return value
    placements, mesh = value.placements, value.device_mesh
    if not _gatherable(placements):
        raise ValueError(
            f"{name} is a DTensor placed {tuple(placements)}: beside hidden states that are a plain tensor it is taken "
            "as a data-parallel parameter, Shard(0) along at most one dimension of its mesh and Replicate() along the "
            "others. Pass .redistribute(placements=…) or .full_tensor()"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{name} is a DTensor on {mesh}, which this process is not a part of")
    return value.detach().to_local()


def whole(name: str, value: Tensor) -> Tensor:
    """All rows of a parameter, differentiable: the gradient is the mean over the ranks, in the parameter's placement.

    One all-gather, and in the backward one reduce-scatter (none for a frozen parameter); beside them one all-reduce for
    each dimension of the mesh along which the parameter is replicated. The reduction is in the gradient's dtype, which
    is the parameter's, but of fp16 in fp32. A tensor of one process is returned as it is. Raises ValueError if its
    memory was freed.
    """
    if is_in_parts(value):
        found: Tensor = _gathered(value)
        return found
    if not torch.compiler.is_compiling() and type(value) in (Tensor, torch.nn.Parameter):
        check_not_freed(name, value)
    return value


def check_not_freed(name: str, value: Tensor) -> None:
    """Raise ValueError for a tensor without its memory, which FSDP2 takes from what it shards again."""
    if value.numel() and value.layout == torch.strided and not value.is_meta and not value.untyped_storage().nbytes():
        raise ValueError(
            f"{name} {tuple(value.shape)} has been freed: FSDP2 has sharded its unit again since. Compute the loss "
            "before the backward, the reshard() or another forward of the model that the weight is of"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _gathered(value: Tensor) -> Any:
    return _Gather.apply(value)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Tensor:
        ctx.layout = type(value), value.shape, value.stride(), value.device_mesh, value.placements
        part = value.to_local()
        if hasattr(part, "wait"):  # what a slice of a DTensor is, while it is under way
            part = part.wait()
        group = _group(value.device_mesh, value.placements)
        if group is None:
            return part.detach()  # type: ignore[no-any-return]
        rows, ranks = len(value), group.size()
        mine = _padded(part, math.ceil(rows / ranks))
        parts = mine.new_empty(ranks * len(mine), *mine.shape[1:])
        _all_gather(parts, mine, group=group)
        return parts[:rows]  # only the last parts are padded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        kind, shape, stride, mesh, placements = ctx.layout
        reduced = gradient.float() if gradient.dtype == torch.float16 else gradient
        group = _group(mesh, placements)
        if group is not None:
            of_all = _padded(reduced, math.ceil(len(gradient) / group.size()) * group.size())
            reduced = of_all.new_empty(len(of_all) // group.size(), *of_all.shape[1:])
            _reduce_scatter(reduced, of_all, group=group)
            first = group.rank() * len(reduced)
            mine = reduced[: max(0, min(len(gradient) - first, len(reduced)))]
        else:
            mine = reduced = reduced.clone(memory_format=torch.contiguous_format)
        for dim, placement in enumerate(placements):
            if placement.is_replicate() and mesh.size(dim) > 1:
                dist.all_reduce(reduced, group=mesh.get_group(dim))
        mine = mine.div_(mesh.size()).to(gradient.dtype)
        return kind.from_local(mine, mesh, placements, run_check=False, shape=shape, stride=stride)  # type: ignore[no-any-return]


def _gatherable(placements: Any) -> bool:
    """`Shard(0)` at most once, and else `Replicate`; a shard that is strided by another parallelism is neither."""
    names = [type(placement).__name__ for placement in placements]
    return (
        set(names) <= {"Shard", "Replicate"}
        and names.count("Shard") <= 1
        and all(placement.is_replicate() or placement.dim == 0 for placement in placements)
    )


def _group(mesh: Any, placements: Any) -> Any:
    """The ranks that have different rows; None where each has all."""
    for dim, placement in enumerate(placements):
        if placement.is_shard() and mesh.size(dim) > 1:
            return mesh.get_group(dim)
    return None


def _padded(part: Tensor, rows: int) -> Tensor:
    """The first rows of a part of `rows`, which collectives need of every rank."""
    if len(part) == rows:
        return part.contiguous()
    found = part.new_zeros(rows, *part.shape[1:])
    found[: len(part)] = part
    return found
