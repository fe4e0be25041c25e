"""The operators: every schema, fake and autograd formula, and the dispatch to a backend.

Five opaque operators in the namespace `fastkd`. They are defined and implemented through `torch.library`, so that
`torch.compile` sees one node each and never looks inside; the backend is chosen when the operator runs.

- `kd_loss`   a scalar loss; its gradient is computed in the forward pass, while the logits are in cache
- `kd_loss_`  the same, the gradient written over the student's logits
- `kd_rows`   one loss per row; its backward recomputes, since each row meets its own upstream gradient
- `log_softmax`, `row_statistics`

Row scalars are `[rows]`, rows being the collapsed leading dimensions. The loss of a row is
`soft_weight·soft_scale·divergence + hard_weight·hard_scale·cross_entropy`: masks, token weights and divisors are all
in the two scales, and a row whose scale is 0 is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _native
from fastkd.backend import RowSpec, select

__all__ = ["RowLayout", "row_layout"]

_LOSS_ARGUMENTS = (
    "Tensor? teacher, Tensor? labels, Tensor? soft_scale, Tensor? hard_scale, str divergence, float[] parameters, "
    "float temperature, float teacher_temperature, float soft_weight, float hard_weight, int vocab_size"
)

_library = torch.library.Library("fastkd", "DEF")
_library.define(
    f"kd_loss(Tensor student, {_LOSS_ARGUMENTS}, bool want_grad) "
    "-> (Tensor loss, Tensor soft, Tensor hard, Tensor grad)"
)
_library.define(f"kd_loss_(Tensor(a!) student, {_LOSS_ARGUMENTS}) -> (Tensor loss, Tensor soft, Tensor hard)")
_library.define(f"kd_rows(Tensor student, {_LOSS_ARGUMENTS}) -> (Tensor rows, Tensor soft, Tensor hard)")
_library.define("log_softmax(Tensor logits, float temperature) -> (Tensor out, Tensor normaliser)")
_library.define("log_softmax_backward(Tensor upstream, Tensor logits, Tensor normaliser, float temperature) -> Tensor")
_library.define(
    "row_statistics(Tensor logits, Tensor? labels, float temperature) "
    "-> (Tensor log_sum_exp, Tensor entropy, Tensor argmax, Tensor label_logprob)"
)


# --- how rows lie in memory -------------------------------------------------------------------------------------


class RowLayout(NamedTuple):
    """Row i starts at element `(i // inner)·outer_stride + (i % inner)·inner_stride`."""

    rows: int
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(tensor: Tensor) -> RowLayout | None:
    """The rows of `[..., V]` as at most two strides, or None where that cannot express them (then copy)."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first, mergeable neighbours merged
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner, inner_stride = levels[-1] if levels else (1, tensor.shape[-1])
    outer, outer_stride = levels[0] if len(levels) == 2 else (1, 0)
    return RowLayout(outer * inner, inner, outer_stride, inner_stride)


def _addressable(tensor: Tensor) -> Tensor:
    return tensor if row_layout(tensor) is not None else tensor.contiguous()


def _empty_like_rows(student: Tensor) -> Tensor:
    """An uninitialised contiguous `[..., V]`; on CPUs backed by huge pages, since first touch is the largest cost."""
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _native.advise_huge_pages(out)
    return out


# --- the loss ---------------------------------------------------------------------------------------------------


def _check_labels(labels: Tensor | None, hard_scale: Tensor | None, vocab_size: int) -> None:
    """ValueError for a label that would be read out of bounds. On GPUs only with FASTKD_DEBUG=1: it synchronises."""
    if labels is None or hard_scale is None:
        return
    if labels.device.type != "cpu" and os.environ.get("FASTKD_DEBUG") != "1":
        return
    wrong = ((labels < 0) | (labels >= vocab_size)) & (hard_scale != 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels contains {int(labels[row])} (token {row} of {labels.numel()}), outside [0, {vocab_size}) and "
            "not ignore_index; mark positions to skip with ignore_index"
        )


def _compute(student: Tensor, grad: Tensor | None, arguments: Sequence[Any]) -> tuple[Tensor, Tensor, RowSpec]:
    """Run the backend. `arguments` are those of `_LOSS_ARGUMENTS`, in their order."""
    teacher, labels, soft_scale, hard_scale, divergence, parameters, *numbers = arguments
    spec = RowSpec(divergence, tuple(parameters), *numbers)
    _check_labels(labels, hard_scale, spec.vocab_size)
    if teacher is not None:
        teacher = _addressable(teacher)
    soft, hard = select(student).kd_rows(student, teacher, labels, soft_scale, hard_scale, spec, grad)
    return soft, hard, spec


def _weighted_rows(
    soft: Tensor, hard: Tensor, soft_scale: Tensor | None, hard_scale: Tensor | None, spec: RowSpec
) -> Tensor:
    rows = torch.zeros_like(soft)
    if soft_scale is not None and spec.soft_weight != 0:
        rows = rows + spec.soft_weight * soft_scale * soft
    if hard_scale is not None and spec.hard_weight != 0:
        rows = rows + spec.hard_weight * hard_scale * hard
    return rows


def _kd_loss(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments_, want_grad = arguments
    student = _addressable(student)
    grad = _empty_like_rows(student) if want_grad else None
    soft, hard, spec = _compute(student, grad, arguments_)
    loss = _weighted_rows(soft, hard, arguments_[2], arguments_[3], spec).sum()
    return loss, soft, hard, student.new_empty(0) if grad is None else grad


def _kd_loss_in_place(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    soft, hard, spec = _compute(student, student, arguments)
    return _weighted_rows(soft, hard, arguments[2], arguments[3], spec).sum(), soft, hard


def _kd_rows(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    soft, hard, spec = _compute(_addressable(student), None, arguments)
    return _weighted_rows(soft, hard, arguments[2], arguments[3], spec), soft, hard


def _row_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake_rows(tensor: Tensor) -> Tensor:
    rows = 1
    for size in tensor.shape[:-1]:
        rows = rows * size
    return tensor.new_empty((rows,), dtype=_row_dtype(tensor))


def _fake_kd_loss(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = student.new_empty(student.shape if arguments[-1] else (0,))
    return _fake_rows(student).new_empty(()), _fake_rows(student), _fake_rows(student), grad


def _fake_kd_loss_in_place(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_rows(student).new_empty(()), _fake_rows(student), _fake_rows(student)


def _fake_kd_rows(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_rows(student), _fake_rows(student), _fake_rows(student)


# --- autograd ---------------------------------------------------------------------------------------------------

_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def refuse_double_backward() -> None:
    """Gradients are computed, not traced: raise rather than return a wrong second derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError("fastkd losses have no double backward: call backward without create_graph=True")


def scale_saved(grad: Tensor, upstream: Tensor) -> Tensor:
    """The gradient saved in the forward pass times the scalar upstream gradient.

    Out of place whenever the graph is kept: scaling the saved tensor would make a second backward silently wrong.
    If the graph is about to be freed nobody else can see the tensor, and no second `[rows, V]` tensor is allocated.
    """
    traced = type(upstream) is not Tensor
    if not traced and upstream.device.type == "cpu" and upstream.item() == 1:
        return grad
    if traced or _keeps_graph():
        return grad * upstream.to(grad.dtype) if grad.dtype == torch.float64 else grad * upstream
    if upstream.device.type == "cpu" or not hasattr(backend := select(grad), "scale_"):
        return grad.mul_(upstream)
    backend.scale_(grad, upstream)  # leaves at once, on the device, where upstream is 1
    return grad


def _setup_kd_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, soft, hard, grad = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(soft, hard, grad)
    ctx.save_for_backward(grad)


def _backward_kd_loss(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    (grad,) = ctx.saved_tensors
    return (None if upstream is None else scale_saved(grad, upstream), *[None] * 12)


def _setup_kd_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, labels, soft_scale, hard_scale, *ctx.spec = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(student, teacher, labels, soft_scale, hard_scale)


def _backward_kd_rows(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    if upstream is None:
        return (None,) * 12
    student, teacher, labels, *scales = ctx.saved_tensors
    scales = [None if scale is None else scale * upstream for scale in scales]
    grad = torch.ops.fastkd.kd_loss(student, teacher, labels, *scales, *ctx.spec, True)[3]
    return (grad, *[None] * 11)


# --- log-softmax and statistics ---------------------------------------------------------------------------------


def _log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = _addressable(logits)
    out = _empty_like_rows(logits)
    return out, select(logits).log_softmax(logits, temperature, out)


def _log_softmax_backward(upstream: Tensor, logits: Tensor, normaliser: Tensor, temperature: float) -> Tensor:
    logits = _addressable(logits)
    grad = _empty_like_rows(logits)
    select(logits).log_softmax_backward(_addressable(upstream), logits, normaliser, temperature, grad)
    return grad


def _setup_log_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.temperature = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _backward_log_softmax(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    refuse_double_backward()
    if upstream is None:
        return None, None
    return torch.ops.fastkd.log_softmax_backward(upstream, *ctx.saved_tensors, ctx.temperature), None


def _row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _addressable(logits)
    return select(logits).row_statistics(logits, labels, temperature)


def _fake_log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rows = _fake_rows(logits)
    return logits.new_empty(logits.shape), rows.new_empty((rows.shape[0], 2))


def _fake_log_softmax_backward(upstream: Tensor, logits: Tensor, normaliser: Tensor, temperature: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_row_statistics(
    logits: Tensor, labels: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _fake_rows(logits)
    return rows, rows.clone(), rows.to(torch.int64), rows.clone()


for _name, _implementation, _fake in (
    ("kd_loss", _kd_loss, _fake_kd_loss),
    ("kd_loss_", _kd_loss_in_place, _fake_kd_loss_in_place),
    ("kd_rows", _kd_rows, _fake_kd_rows),
    ("log_softmax", _log_softmax, _fake_log_softmax),
    ("log_softmax_backward", _log_softmax_backward, _fake_log_softmax_backward),
    ("row_statistics", _row_statistics, _fake_row_statistics),
):
    # One implementation for every device: the backend is chosen inside.
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{_name}", _fake, lib=_library)

torch.library.register_autograd("fastkd::kd_loss", _backward_kd_loss, setup_context=_setup_kd_loss, lib=_library)
torch.library.register_autograd("fastkd::kd_rows", _backward_kd_rows, setup_context=_setup_kd_rows, lib=_library)
torch.library.register_autograd(
    "fastkd::log_softmax", _backward_log_softmax, setup_context=_setup_log_softmax, lib=_library
)
