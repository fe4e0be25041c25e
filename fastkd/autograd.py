"""How the operators are differentiated: what each keeps of its forward, and how gradients are made from it.

Each formula is an `autograd.Function` on the operator's Autograd key, which calls the operator again below autograd.
`torch.library.register_autograd` would do the same, but looks every argument up in the schema at every call: for those
of a loss that costs more time on the host than all the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.backend import forced, running_on, select
from fastkd.call import Call
from fastkd.ops import library

__all__ = ["InPlace", "scale_saved"]

_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _refuse_double_backward() -> None:
    """Gradients are computed, not traced: raise rather than return a wrong second derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError("fastkd losses have no double backward: call backward without create_graph=True")


def scale_saved(grad: Tensor, upstream: Tensor, factor: Tensor | None = None) -> Tensor:
    """The gradient saved in the forward pass, divided by the factor that kept it in range, times the upstream scalar.

    While the graph is kept, the result is a new tensor: scaling the saved one would make a second backward silently
    wrong, and so would handing it out, since the caller may change it. If the graph is about to be freed, the saved
    tensor itself is scaled, and no second tensor of its size is allocated.
    """
    traced = type(upstream) is not Tensor
    if factor is not None and factor.numel() > 0:
        upstream = upstream / factor
    if traced or _keeps_graph():
        return grad * upstream.to(grad.dtype) if grad.dtype == torch.float64 else grad * upstream
    if hasattr(backend := select(grad), "scale_"):
        backend.scale_(grad, upstream)  # leaves at once, on the device, where upstream is 1
        return grad
    return grad if upstream.device.type == "cpu" and upstream.item() == 1 else grad.mul_(upstream)


def _on_its_backend(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward on the backend that its forward ran on: autograd's threads know nothing of the block that chose it.

    A function around it, since `torch.compile` can trace a whole function, but none that it has to leave in a block.
    """

    def on_backend(ctx: Any, *upstreams: Tensor | None) -> Any:
        with running_on(ctx.backend):
            return backward(ctx, *upstreams)

    return on_backend


class _KDLoss(torch.autograd.Function):
    """`kd_loss`: the gradients are there after the forward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor | None, bias: Tensor | None, others: Any) -> Any:
        outputs = _below_autograd(torch.ops.fastkd.kd_loss.default, (student, weight, bias, *others))
        ctx.wants, ctx.backend = others[-1], forced()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*outputs[3:])
        return outputs

    @staticmethod
    @_on_its_backend
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        *saved, factor = ctx.saved_tensors
        grads = [
            scale_saved(grad, upstream, factor) if wanted and upstream is not None else None
            for grad, wanted in zip(saved, ctx.wants, strict=True)
        ]
        return (*grads, None)


class _KDLossPerRow(torch.autograd.Function):
    """`kd_loss_per_row`: computed again, with the upstream gradients in the rows' scales."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor | None, bias: Tensor | None, others: Any) -> Any:
        call = Call(student, weight, bias, *others)
        outputs = _below_autograd(torch.ops.fastkd.kd_loss_per_row.default, call)
        ctx.numbers, ctx.backend = call.numbers, forced()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*call.tensors)
        return outputs

    @staticmethod
    @_on_its_backend
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if upstream is None:
            return None, None, None, None
        call = Call.of(ctx.saved_tensors, ctx.numbers)
        call = call._replace(
            soft_scale=None if call.soft_scale is None else call.soft_scale * upstream,
            hard_scale=None if call.hard_scale is None else call.hard_scale * upstream,
        )
        wants = list(ctx.needs_input_grad[:3])
        one = upstream.new_ones(())
        *saved, factor = torch.ops.fastkd.kd_loss(*call, wants)[3:]
        grads = [scale_saved(grad, one, factor) if wanted else None for grad, wanted in zip(saved, wants, strict=True)]
        return (*grads, None)


class InPlace(torch.autograd.Function):
    """`kd_loss_`: a scalar loss whose gradient replaces the student's logits in memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, soft, hard, factor = torch.ops.fastkd.kd_loss_(student.detach(), *arguments)
        # Whatever autograd saved of these logits is gone: a backward that would read it must raise.
        torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(student, factor)
        ctx.backend = forced()
        ctx.mark_non_differentiable(soft, hard)
        ctx.set_materialize_grads(False)
        return loss, soft, hard

    @staticmethod
    @_on_its_backend
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        student, factor = ctx.saved_tensors
        upstream = upstreams[0]
        grad = None if upstream is None else scale_saved(student.detach(), upstream, factor)
        return grad, *[None] * (len(Call._fields) - 1)


class _LogSoftmax(torch.autograd.Function):
    """`log_softmax`: the exponentials are computed again from logits and normaliser."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, others: Any) -> tuple[Tensor, Tensor]:
        (temperature,) = others
        out, normaliser = _below_autograd(torch.ops.fastkd.log_softmax.default, (logits, temperature))
        ctx.temperature, ctx.backend = temperature, forced()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser)
        ctx.save_for_backward(logits, normaliser)
        return out, normaliser

    @staticmethod
    @_on_its_backend
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        _refuse_double_backward()
        if upstream is None:
            return None, None
        return torch.ops.fastkd.log_softmax_backward(upstream, *ctx.saved_tensors, ctx.temperature), None


def _below_autograd(operator: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _register(name: str, function: type[torch.autograd.Function], differentiable: int) -> None:
    """Differentiate an operator, in its first arguments only, by `function`, which is given the others as one tuple."""
    operator = getattr(torch.ops.fastkd, name).default

    def differentiated(*arguments: Any) -> Any:
        leading, others = arguments[:differentiable], arguments[differentiable:]
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in leading):
            return function.apply(*leading, others)
        return _below_autograd(operator, arguments)

    library.impl(name, differentiated, "Autograd")


assert Call._fields[:3] == ("student", "student_weight", "student_bias"), "what has a gradient comes first"
_register("kd_loss", _KDLoss, 3)
_register("kd_loss_per_row", _KDLossPerRow, 3)
_register("log_softmax", _LogSoftmax, 1)
