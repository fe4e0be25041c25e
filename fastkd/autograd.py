"""How the operators are differentiated and called: what each keeps of its forward, and how gradients come from it.

Each formula is an `autograd.Function` on the operator's Autograd key, which calls the operator again below autograd.
`torch.library.register_autograd` would do the same, but looks every argument up in the schema at every call: for those
of a loss that costs more time on the host than all the rest of it.

The dispatcher itself takes each of the arguments apart and makes it anew, twice on the way to a loss. So the functions
here, which losses call, go through it only where something may watch or change the call (`watched`), and else straight
to what the operator would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastkd.backend import forced, running_on, select
from fastkd.call import Call
from fastkd.gathered import check_not_freed
from fastkd.ops import IMPLEMENTATIONS, library

__all__ = [
    "differentiates_once",
    "held_by_rank",
    "kd_loss",
    "kd_loss_",
    "kd_loss_per_row",
    "read_by_ranks",
    "row_scales",
    "scale_on_host",
    "scale_saved",
    "watched",
]

Compute = Callable[..., Any]

_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


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
    return grad.mul_(upstream) if upstream.device.type != "cpu" else scale_on_host(grad, upstream)


def scale_on_host(grad: Tensor, upstream: Tensor) -> Tensor:
    """`scale_saved` of tensors in main memory, outside of `torch.compile`."""
    if _keeps_graph():
        return grad * upstream
    return grad if upstream.item() == 1 else grad.mul_(upstream)


def differentiates_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients are computed, not traced: raises rather than return a wrong second derivative."""

    def once(ctx: Any, *upstreams: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("fastkd losses have no double backward: call backward without create_graph=True")
        return backward(ctx, *upstreams)

    return once


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
    def forward(
        ctx: Any, compute: Compute, student: Tensor, weight: Tensor | None, bias: Tensor | None, others: Any
    ) -> Any:
        outputs = _below_autograd(compute, (student, weight, bias, *others))
        ctx.wants, ctx.backend = others[-1], forced()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not None))
        ctx.save_for_backward(*outputs[3:])
        return outputs

    @staticmethod
    @differentiates_once
    @_on_its_backend
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *saved, factor = ctx.saved_tensors
        grads = [
            scale_saved(grad, upstream, factor) if wanted and upstream is not None else None
            for grad, wanted in zip(saved, ctx.wants, strict=True)
        ]
        return (None, *grads, None)


class _KDLossPerRow(torch.autograd.Function):
    """`kd_loss_per_row`: computed again, with the upstream gradients in the rows' scales."""

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, student: Tensor, weight: Tensor | None, bias: Tensor | None, others: Any
    ) -> Any:
        call = Call(student, weight, bias, *others)
        outputs = _below_autograd(compute, call)
        ctx.numbers, ctx.backend = call.numbers, forced()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not None))
        state, picked = (None if x is None or x.numel() == 0 else x for x in outputs[3:])
        ctx.save_for_backward(*call._replace(row_state=state, picked=picked).tensors)
        return outputs

    @staticmethod
    @differentiates_once
    @_on_its_backend
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        call = Call.of(ctx.saved_tensors, ctx.numbers)
        for name, weight in (("student", call.student_weight), ("teacher", call.teacher_weight)):
            if weight is not None:
                check_not_freed(f"{name} weight", weight)
        call = call._replace(
            soft_scale=None if call.soft_scale is None else call.soft_scale * upstream,
            hard_scale=None if call.hard_scale is None else call.hard_scale * upstream,
        )
        wants = list(ctx.needs_input_grad[1:4])
        one = upstream.new_ones(())
        *saved, factor = kd_loss(*call, wants)[3:]
        grads = [scale_saved(grad, one, factor) if wanted else None for grad, wanted in zip(saved, wants, strict=True)]
        return (None, *grads, None)


class _InPlace(torch.autograd.Function):
    """`kd_loss_`: a scalar loss whose gradient replaces the student's logits in memory."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, student: Tensor, others: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, soft, hard, factor = compute(student.detach(), *others)
        # Whatever autograd saved of these logits is gone: a backward that would read it must raise.
        wholes = getattr(student.grad_fn, "void_with_it", [])  # the DTensor that it is a rank's part of
        torch.autograd.graph.increment_version([student, *wholes])
        wholes.clear()
        ctx.save_for_backward(student, factor)
        ctx.backend = forced()
        ctx.mark_non_differentiable(soft, hard)
        ctx.set_materialize_grads(False)
        return loss, soft, hard

    @staticmethod
    @differentiates_once
    @_on_its_backend
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        student, factor = ctx.saved_tensors
        upstream = upstreams[0]
        grad = None if upstream is None else scale_saved(student.detach(), upstream, factor)
        return None, grad, None


class _LogSoftmax(torch.autograd.Function):
    """`log_softmax`: the exponentials are computed again from logits and normaliser."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, logits: Tensor, others: Any) -> tuple[Tensor, Tensor]:
        out, normaliser = _below_autograd(compute, (logits, *others))
        ctx.others, ctx.backend = others, forced()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser)
        ctx.save_for_backward(logits, normaliser)
        return out, normaliser

    @staticmethod
    @differentiates_once
    @_on_its_backend
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[None, Tensor | None, None]:
        if upstream is None:
            return None, None, None
        return None, torch.ops.fastkd.log_softmax_backward(upstream, *ctx.saved_tensors, *ctx.others), None


class _ReadByRanks(torch.autograd.Function):
    """The identity, of which several ranks find a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return torch.ops.fastkd.sum_of_ranks(upstream, ctx.group), None


def read_by_ranks(values: Tensor, group: str) -> Tensor:
    """The same values; their gradient is the sum of those of all ranks of the group, which all get it."""
    return _ReadByRanks.apply(values, group)  # type: ignore[no-any-return, no-untyped-call]


class _HeldByRank(torch.autograd.Function):
    """What this rank holds of a DTensor. No view for autograd, which lets nobody write over a view of a DTensor."""

    @staticmethod
    def forward(ctx: Any, logits: Any) -> Tensor:
        ctx.layout = type(logits), logits.device_mesh, logits.placements, logits.shape, logits.stride()
        ctx.void_with_it = [logits]
        ctx.set_materialize_grads(False)
        own = logits.to_local()
        if hasattr(own, "wait"):  # what a collective leaves, while it is under way
            own = own.wait()
        return own.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        if upstream is None:
            return None
        kind, mesh, placements, shape, stride = ctx.layout
        return kind.from_local(upstream, mesh, placements, run_check=False, shape=shape, stride=stride)


def held_by_rank(logits: Any, written: bool) -> Tensor:
    """`logits.to_local()` of a DTensor; where that is `written`, memory that `kd_loss_` may write its gradient to."""
    if not written or torch.compiler.is_compiling() or not (logits.requires_grad and torch.is_grad_enabled()):
        return logits.to_local()  # type: ignore[no-any-return]
    return _HeldByRank.apply(logits)  # type: ignore[no-any-return, no-untyped-call]


def _below_autograd(compute: Compute, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return compute(*arguments)


def _differentiable(name: str, function: type[torch.autograd.Function], leading: int) -> Compute:
    """Differentiate an operator, in its first arguments only, by `function`; returns what calls it.

    `function` is given what computes the operator, these arguments, and the others as one tuple.
    """
    operator = getattr(torch.ops.fastkd, name).default

    def differentiated(compute: Compute, arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:leading]):
            return function.apply(compute, *arguments[:leading], arguments[leading:])
        return _below_autograd(compute, arguments)

    library.impl(name, lambda *arguments: differentiated(operator, arguments), "Autograd")

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if watched(arguments) else differentiated(IMPLEMENTATIONS[name], arguments)

    return call


assert Call._fields[:3] == ("student", "student_weight", "student_bias"), "what has a gradient comes first"
kd_loss = _differentiable("kd_loss", _KDLoss, 3)
kd_loss_per_row = _differentiable("kd_loss_per_row", _KDLossPerRow, 3)
log_softmax = _differentiable("log_softmax", _LogSoftmax, 1)


def kd_loss_(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its two terms; the backward's gradient is in the student's memory already."""
    compute = torch.ops.fastkd.kd_loss_.default if watched((student, *others)) else IMPLEMENTATIONS["kd_loss_"]
    return _InPlace.apply(compute, student, others)  # type: ignore[no-any-return, no-untyped-call]


def row_scales(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """See `Backend.row_scales`; it is not differentiated."""
    if watched(arguments):
        return torch.ops.fastkd.row_scales(*arguments)  # type: ignore[no-any-return]
    return _below_autograd(IMPLEMENTATIONS["row_scales"], arguments)  # type: ignore[no-any-return]


def watched(arguments: Iterable[Any]) -> bool:
    """Whether anything may take part in a call by way of the dispatcher.

    A compiler or tracer, a mode (fake tensors, FLOP counters, a default device), `torch.func`, a profiler, which shows
    operators by name, or a tensor that is not one of torch's own types.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, arguments))
    )


#: Types of arguments that cannot watch: of tensors torch's own, and the others of `Call`.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), int, float, bool, str, list, tuple, torch.dtype})
