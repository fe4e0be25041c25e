"""Models that FSDP2 has sharded (`fully_shard`): which unit has the head, and how its gradient joins the reduction.

A unit's parameters are whole in its forward. Its gradients are reduced in the backward, by hooks on the outputs and
inputs of that forward. A loss of hidden states and head is computed after it. So two things are missing: the whole
head, which `unit.unshard()` brings back into the memory it had, and the call of the hooks, which `Tied` sees to. Then
the gradient goes to the whole parameter, and FSDP2 reduces it with the unit's own settings: `mp_policy`, the divisor,
`set_requires_gradient_sync`, a mesh with replicas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.gathered import is_in_parts

__all__ = ["Tied", "is_linear", "unit_of"]


def is_linear(head: nn.Module) -> bool:
    """Whether a head is an `nn.Linear` and nothing more, or the `FSDPLinear` that `fully_shard` makes of one."""
    kind = _unit_type()
    return type(head) is nn.Linear or (kind is not None and type(head).__bases__ == (kind, nn.Linear))


def unit_of(model: nn.Module, head: nn.Linear) -> Any:
    """The FSDPModule that shards the head, or None.

    Raises ValueError for a head that is in parts otherwise, as tensor parallelism leaves it.
    """
    kind, found = _unit_type(), None
    if kind is not None:
        for module in model.modules():  # the innermost comes last
            if isinstance(module, kind) and any(inner is head for inner in module.modules()):
                found = module
    weight: Any = head.weight
    if is_in_parts(weight):
        *others, last = weight.placements
        # Dimensions of tensor parallelism come after those of fully_shard.
        if found is None or not last.is_shard() or not all(placement.is_replicate() for placement in others):
            raise ValueError(
                f"the output head's weight is a DTensor placed {tuple(weight.placements)}, which is not how "
                "fully_shard places it: project() takes heads that are whole or sharded by fully_shard alone"
            )
    return found


class Tied(torch.autograd.Function):
    """Hidden states whose backward begins with that of the model's output, by a gradient of zeros.

    FSDP2 starts the reduction of the root's gradients from a hook on the outputs of its forward. A loss of the hidden
    states and the head does not reach that hook: nothing would be reduced, unless a submodule with its own unit is
    trained too.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor, tied: list[bool]) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.tied = tied
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (logits,) = ctx.saved_tensors
        ctx.tied.append(True)
        return gradients[0], torch.zeros_like(logits), None


def _unit_type() -> Any:
    return getattr(getattr(torch.distributed, "fsdp", None), "FSDPModule", None)  # imported where models are sharded
