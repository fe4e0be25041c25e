"""A loss on logits in main memory by one native call, which checks values, scales rows, and adds them up.

Small losses take as long as Python and torch need around the kernel, so this way has little of either. It takes the
calls that training loops make, in forms that it knows: what a call looks like besides its values is checked once and
kept, laid out for the library (`_template`). Whatever else comes, it leaves alone: `loss` then returns None, and the
general way computes the same bits, or raises the error. So nothing here raises, and nothing is done before it is known
that all can be done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import backend
from fastkd.autograd import differentiates_once, scale_on_host, watched
from fastkd.kernels.cpu import at_once as native
from fastkd.kernels.cpu.at_once import Template, TensorForm
from fastkd.kernels.cpu.library import advise_huge_pages
from fastkd.rows import RowSpec

__all__ = ["Settings", "loss"]

_DTYPES = (torch.float32, torch.bfloat16)  # of the student; fp16 needs a look at the weights first (`ops._in_range`)
_OWN = (Tensor, torch.nn.Parameter)  # types of tensors
_COUNTS = (torch.int64, torch.int32, torch.float32, torch.float64)  # dtypes of their number
_KEPT = 256  # forms of calls that a loss remembers
_LARGEST = 1e300  # of their numbers
#: What packs saved tensors, which may come back with other strides than a template says. Private: else assumed.
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_UNKNOWN = Template(b"", ())  # in the place of the template of a form that was not met yet


class Settings(Protocol):
    """What is asked of a `KDLoss`, whose arguments most of it are. `templates` is for this file to keep things in."""

    soft_weight: float
    hard_weight: float
    ignore_index: int
    shift: bool
    mask_soft: bool
    vocab_size: int | None
    inplace: bool
    return_parts: bool
    templates: dict[Any, Template | None]

    @property
    def reduction(self) -> str: ...

    def row_spec(self, vocab_size: int) -> RowSpec: ...


def loss(
    kd: Settings,
    student: Any,
    teacher: Any,
    labels: Any,
    weights: Any,
    num_items: Any,
) -> Tensor | None:
    """What `KDLoss.forward` returns for these arguments, whatever they are, or None. Settings have been checked."""
    given = (student, teacher, labels, weights)
    grad_enabled = torch.is_grad_enabled()
    if (
        student is None
        or watched((*given, num_items))
        or forward_ad._current_level >= 0
        or backend.forced() not in (None, "cpu")
    ):
        return None
    forms: list[Any] = []
    for x in given:
        if x is None:
            forms.append(None)
        elif type(x) not in _OWN or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
            return None
        elif not forms or not grad_enabled or not x.requires_grad:  # only the student, the first, may ask for one
            forms.append((x.dtype, x.shape, x.stride()))
        else:
            return None
    key = (*forms, num_items is None)
    template = kd.templates.get(key, _UNKNOWN)
    if template is _UNKNOWN:
        template = _remembered(kd, key)
    if template is None:
        return None
    divisor = float(student.shape[0]) if kd.reduction == "batchmean" else 1.0
    if num_items is not None:
        if isinstance(num_items, Tensor):
            if num_items.dim() or not num_items.is_cpu or num_items.requires_grad or num_items.dtype not in _COUNTS:
                return None
            num_items = num_items.item()
        if type(num_items) not in (int, float) or not 0 <= num_items <= _LARGEST:
            return None
        divisor = float(num_items)

    wanted = grad_enabled and student.requires_grad
    if wanted and kd.inplace:
        if _hooks(False) is not None or not _writable(student, given[1:]):
            return None
        total: Tensor = student.new_empty((), dtype=torch.float32)
        if not _computed(template, given, divisor, None, student, total):
            return None
        total = _InPlace.apply(student, (total,))  # type: ignore[no-untyped-call]
        return total
    if kd.reduction != "none":
        grad = _gradient_of(student) if wanted else None
        total = student.new_empty((), dtype=torch.float32)
        if not _computed(template, given, divisor, None, grad, total):
            return None
        if wanted:
            total = _Total.apply(student, (total, grad))  # type: ignore[no-untyped-call]
        return total
    if any(x is not None and x.is_inference() for x in given) or (wanted and _hooks(False) is not None):
        return None
    values: Tensor = student.new_empty(student.shape[:-1], dtype=torch.float32)
    if not _computed(template, given, divisor, None, None, values):
        return None
    if wanted:
        values = _PerRow.apply(student, (values, given, template, divisor))  # type: ignore[no-untyped-call]
    return values[..., :-1] if kd.shift else values


def _remembered(kd: Settings, key: Any) -> Template | None:
    student, teacher, labels, weights = (form and TensorForm(*form) for form in key[:-1])
    if len(kd.templates) >= _KEPT:
        kd.templates.clear()
    template = kd.templates[key] = _template(kd, student, teacher, labels, weights, counted=key[-1])
    return template


def _template(
    kd: Settings,
    student: TensorForm,
    teacher: TensorForm | None,
    labels: TensorForm | None,
    weights: TensorForm | None,
    counted: bool,
) -> Template | None:
    """All of a call but its values, as the library takes it; None where the call is none of those it knows."""
    if not student.shape or (teacher is not None and not teacher.shape):
        return None  # no columns
    if student.dtype not in _DTYPES or 0 in student.shape or backend.automatic(student.dtype, "cpu") != "cpu":
        return None
    leading, width = student.shape[:-1], student.shape[-1]
    teacher_width = width if teacher is None else teacher.shape[-1]
    vocab_size = width if kd.vocab_size is None else int(kd.vocab_size)
    known = (
        not kd.return_parts
        and (not kd.inplace or student.is_contiguous)
        and len(leading) >= (bool(kd.shift) or kd.reduction == "batchmean")
        and (kd.soft_weight == 0 if teacher is None else teacher.shape[:-1] == leading)
        and (teacher_width == width if kd.vocab_size is None else vocab_size <= min(width, teacher_width))
        and (kd.hard_weight == 0 if labels is None else labels.dtype == torch.int64)
        and (weights is None or weights.dtype == torch.float32)
        and all(form is None or (form.shape == leading and form.is_contiguous) for form in (labels, weights))
        and (counted or kd.reduction == "mean")
    )
    if not known:
        return None
    template: Template | None = native.template(
        student,
        teacher,
        kd.row_spec(vocab_size),
        soft=teacher is not None and float(kd.soft_weight) > 0,
        hard=labels is not None and float(kd.hard_weight) > 0,
        shift=bool(kd.shift),
        ignore_index=int(kd.ignore_index),
        mask_soft=bool(kd.mask_soft) or labels is None,
        counted=counted and kd.reduction == "mean",
        total=kd.reduction != "none",
    )
    return template


def _writable(student: Tensor, others: Iterable[Tensor | None]) -> bool:
    """Whether the others' memory lies before or behind the student's. `gradients.check_writable` looks closer."""
    start = student.data_ptr()
    end = start + student.nbytes
    return all(x is None or x.data_ptr() >= end or x.data_ptr() + _reach(x) <= start for x in others)


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _gradient_of(student: Tensor) -> Tensor:
    grad = student.new_empty(student.shape)  # contiguous
    advise_huge_pages(grad)
    return grad


def _computed(
    template: Template,
    given: tuple[Tensor | None, ...],
    divisor: float,
    upstream: Tensor | None,
    grad: Tensor | None,
    out: Tensor | None,
) -> bool:
    """Run the library: whether it has computed. If not, it has written nothing."""
    pointers = [None if x is None else x.data_ptr() for x in (*given, upstream, grad, out)]
    done: bool = native.kd_loss(template, *pointers, divisor)
    return done


class _Total(torch.autograd.Function):
    """A scalar, whose gradient is there."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, computed: tuple[Tensor, Tensor]) -> Tensor:
        total, grad = computed
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @differentiates_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return scale_on_host(grad, upstream), None


class _InPlace(torch.autograd.Function):
    """A scalar, whose gradient is where the student's logits were."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, computed: tuple[Tensor]) -> Tensor:
        # Whatever autograd saved of these logits is gone: a backward that would read it must raise.
        torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(student)
        (total,) = computed  # an argument that is returned would be a view of itself
        return total

    @staticmethod
    @differentiates_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (student,) = ctx.saved_tensors
        return scale_on_host(student.detach(), upstream), None


class _PerRow(torch.autograd.Function):
    """One loss per row; computed again, with the upstream gradients in the rows' scales."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, computed: tuple[Tensor, tuple[Tensor | None, ...], Template, float]
    ) -> Tensor:
        values, given, *ctx.call = computed
        ctx.save_for_backward(*given)
        return values

    @staticmethod
    @differentiates_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        given = ctx.saved_tensors
        template, divisor = ctx.call
        grad = _gradient_of(given[0])
        if not _computed(template, given, divisor, upstream.contiguous(), grad, None):
            raise RuntimeError("a loss cannot be computed again: no memory is left, or its labels or weights changed")
        return grad, None
