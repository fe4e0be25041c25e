"""Models that FSDP2 (`fully_shard`) or ZeRO-3 has sharded: where the head is whole, and who reduces its gradient.

A unit's parameters are whole in its forward. Its gradients are reduced in the backward, by hooks on the outputs and
inputs of that forward. A loss of hidden states and head is computed after it. So two things are missing: the whole
head, which `unit.unshard()` brings back into the memory it had, and the call of the hooks, which `tied` sees to. Then
the gradient goes to the whole parameter, and FSDP2 reduces it with the unit's own settings: `mp_policy`, the divisor,
`set_requires_gradient_sync`, a mesh with replicas.

DeepSpeed's ZeRO-3 also makes parameters whole for a module's forward, and empties them after it. What the forward of
the head had is held on to, and its gradient goes to the parameter, where DeepSpeed's own hook reduces it. Parameters of
ZeRO-3 are known by their attributes; DeepSpeed is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.gathered import is_in_parts

__all__ = ["held", "is_emptied", "is_linear", "shape_of", "tied", "unit_of"]


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


def is_emptied(parameter: Tensor) -> bool:
    """Whether ZeRO-3 takes the parameter's memory between uses."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, which ZeRO-3 keeps as an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def held(parameter: Tensor) -> Tensor:
    """A parameter in the forward, for use after it: ZeRO-3 is about to leave the memory to whoever else has it."""
    if not is_emptied(parameter):
        return parameter
    return _Held.apply(parameter)  # type: ignore[no-any-return, no-untyped-call]


class _Held(torch.autograd.Function):
    """The same memory. No view, which would follow the parameter when that is emptied."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def tied(logits: Tensor, passed: list[bool], hidden: Tensor, *head: Tensor | None) -> list[Any]:
    """Hidden states, weight and bias whose backward begins with that of the model's output, by a gradient of zeros.

    FSDP2 starts the reduction of the root's gradients from a hook on the outputs of its forward. A loss of the hidden
    states and the head does not reach that hook: nothing would be reduced, unless a submodule with its own unit is
    trained too. ZeRO-3 makes parameters whole again from such hooks, which their gradients need. `passed` is filled
    when a backward has come through.
    """
    through = [hidden, *(x for x in head if x is not None and x.grad_fn is not None)]  # what ZeRO-3 has emptied
    found = iter(_Tied.apply(logits, passed, *through))  # type: ignore[no-untyped-call]
    return [next(found) if any(x is value for value in through) else x for x in (hidden, *head)]


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, passed: list[bool], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits)
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        ctx.passed.append(True)
        return torch.zeros_like(logits), None, *gradients


def _unit_type() -> Any:
    return getattr(getattr(torch.distributed, "fsdp", None), "FSDPModule", None)  # imported where models are sharded
