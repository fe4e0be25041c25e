"""The operators: every schema and fake, and the dispatch to a backend. Their gradients are in `autograd`.

Opaque operators in the namespace `fastkd`. They are defined and implemented through `torch.library`, so that
`torch.compile` sees one node each and never looks inside; the backend is chosen when the operator runs.

- `kd_loss`          a scalar loss; its gradients are computed in the forward pass, while the logits are in cache
- `kd_loss_`         the same, the gradient written over the student's logits
- `kd_loss_per_row`  one loss per row; its backward recomputes, since each row meets its own upstream gradient

- `row_scales`: what each row's terms are multiplied by
- `sum_of_ranks`: of a gradient that each rank has a part of
- `log_softmax` and its backward, `row_statistics`. The first two of rows whose columns are on the ranks of a group, or
  here (an empty `group`)

A loss takes logits or hidden states with an output head, for student and teacher (see `Call`).

Row scalars are `[rows]`, rows being the collapsed leading dimensions. The loss of a row is
`soft_weight·soft_scale·divergence + hard_weight·hard_scale·cross_entropy`: masks, token weights and divisors are all
in the two scales, and a row whose scale is 0 is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastkd import arguments
from fastkd.backend import select
from fastkd.call import SCHEMA, Call
from fastkd.divergences import of_spec
from fastkd.kernels.cpu.library import advise_huge_pages
from fastkd.projection.columns import columns_of, in_chunks, over_ranks, with_room_for_state
from fastkd.projection.loop import from_hidden_states
from fastkd.projection.sides import Gradients
from fastkd.projection.teachers import rows_at_hand
from fastkd.ranks import normaliser_of_ranks, sum_of_ranks
from fastkd.reference import weighted_rows
from fastkd.rows import NOTHING, STATE_BYTES, Wants, addressable, kept_dtype, row_dtype

__all__ = ["IMPLEMENTATIONS", "library"]

library = torch.library.Library("fastkd", "DEF")
library.define(
    f"kd_loss(Tensor student, {SCHEMA}, bool[] wants) "
    "-> (Tensor loss, Tensor soft, Tensor hard, Tensor grad, Tensor grad_weight, Tensor grad_bias, Tensor factor)"
)
library.define(f"kd_loss_(Tensor(a!) student, {SCHEMA}) -> (Tensor loss, Tensor soft, Tensor hard, Tensor factor)")
library.define(
    f"kd_loss_per_row(Tensor student, {SCHEMA}) "
    "-> (Tensor rows, Tensor soft, Tensor hard, Tensor row_state, Tensor picked)"
)
library.define(
    "row_scales(Tensor student, Tensor? labels, Tensor? weights, Tensor? num_items, float? number, str reduction, "
    "int ignore_index, bool shift, bool mask_soft) -> (Tensor scales, Tensor moved)"
)
library.define("sum_of_ranks(Tensor values, str group) -> Tensor")
library.define("log_softmax(Tensor logits, float temperature, str group='') -> (Tensor out, Tensor normaliser)")
library.define(
    "log_softmax_backward(Tensor upstream, Tensor logits, Tensor normaliser, float temperature, str group='') -> Tensor"
)
library.define(
    "row_statistics(Tensor logits, Tensor? labels, float temperature) "
    "-> (Tensor log_sum_exp, Tensor entropy, Tensor argmax, Tensor label_logprob, Tensor normaliser)"
)


def _empty_like_rows(student: Tensor) -> Tensor:
    """An uninitialised contiguous `[..., V]`; on CPUs backed by huge pages, since first touch is the largest cost."""
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    advise_huge_pages(out)
    return out


def _zeros_like_rows(student: Tensor) -> Tensor:
    """Contiguous zeros `[..., V]`; `zeros_like` would keep a stride between columns."""
    return torch.zeros(student.shape, dtype=student.dtype, device=student.device)


# --- the loss ---------------------------------------------------------------------------------------------------


def _check_labels(labels: Tensor | None, hard_scale: Tensor | None, vocab_size: int) -> None:
    """ValueError for a label that would be read out of bounds. On GPUs only with FASTKD_DEBUG=1: it synchronises."""
    if labels is None or hard_scale is None:
        return
    if not arguments.is_checked(labels):
        return
    wrong = torch.where(labels.clamp(0, vocab_size - 1) == labels, 0.0, hard_scale)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels contains {int(labels[row])} (token {row} of {labels.numel()}), outside [0, {vocab_size}) and "
            "not ignore_index; mark positions to skip with ignore_index"
        )


def _compute(call: Call, grad: Tensor | None, wants: Wants) -> tuple[Tensor, Tensor, Gradients]:
    """Run the backend. `grad`, for a student that is a tensor, may be that tensor."""
    _check_labels(call.labels, call.hard_scale, call.vocab_size)
    if in_chunks(call):
        return from_hidden_states(call, grad, wants)
    student = addressable(call.student)
    teacher = rows_at_hand(call.teacher_source(), call)
    if isinstance(teacher, Tensor):
        teacher = addressable(teacher)
    row = (call.labels, call.soft_scale, call.hard_scale)
    if call.student_cut:
        soft, hard = over_ranks(call, student, teacher, *row, grad)
    else:
        soft, hard = select(student).kd_rows(student, teacher, *row, call.spec, grad)
    return soft, hard, Gradients()


def _weighted(call: Call, soft: Tensor, hard: Tensor) -> tuple[Any, ...]:
    """The arguments of `Backend.weighted_total`."""
    return soft, hard, call.soft_scale, call.hard_scale, call.soft_weight, call.hard_weight


def _in_range(call: Call) -> tuple[Call, Tensor | None]:
    """The call with gradients times a power of two, and this factor; None where no gradient is rounded to fp16.

    fp16 ends at 6e-8, and a mean over many tokens puts the gradients of logits below it. Loss scaling is no help: it
    comes with the upstream gradient, after the rounding. At its other end, 65504, large weights do the same. The factor
    brings the largest weight of a row to between 8 and 16. The backward divides by it and multiplies by the upstream.
    """
    scales = [scale for scale in (call.soft_scale, call.hard_scale) if scale is not None]
    if not _rounds_to_fp16(call) or not scales or scales[0].numel() == 0:
        return call, None
    weight = torch.zeros_like(scales[0])
    if call.soft_scale is not None:
        weight = weight + call.soft_scale.abs() * (call.soft_weight * _reach(call))
    if call.hard_scale is not None:
        weight = weight + call.hard_scale.abs() * call.hard_weight
    _, exponent = torch.frexp(weight.max())
    one = torch.ones_like(scales[0][0])
    factor = torch.ldexp(one, 4 - exponent.to(one.dtype))  # of an int, the power would have torch's default dtype
    soft_scale, hard_scale = (None if x is None else x * factor for x in (call.soft_scale, call.hard_scale))
    return call._replace(soft_scale=soft_scale, hard_scale=hard_scale), factor


def _reach(call: Call) -> float:
    """The factor of the soft weight at which no gradient of fp16 logits, which differ by 131008 at most, overflows.

    A cross-entropy's is 1, a bounded divergence's not much more. Raw differences are multiplied by 2/V. Of the others
    reverse KL reaches furthest: q(1 − q) ≤ ¼ times a difference of log-ratios, 131008·(1/T + 1/T_teacher), over T;
    AlphaBeta with a negative parameter has no bound. A mix reaches as far as its parts together.
    """
    divergence = of_spec(call.divergence, call.parameters)
    if not divergence.tempered:
        return max(1.0, 64 / call.vocab_size)
    furthest = max(1.0, 8 * (1 / call.temperature + 1 / call.teacher_temperature))
    return sum(weight * (1.0 if part.bounded else furthest) for part, weight in divergence.parts) / call.temperature


def _rounds_to_fp16(call: Call) -> bool:
    if call.student_weight is None:
        return call.student.dtype == torch.float16
    tensors = call.student, call.student_weight, call.student_bias
    return call.autocast == torch.float16 or any(x is not None and x.dtype == torch.float16 for x in tensors)


def _kd_loss(*arguments: Any) -> tuple[Tensor | None, ...]:
    *fields, wants_ = arguments
    call, wants = Call(*fields), Wants(*wants_)
    grad = None
    if call.student_weight is None and wants.hidden:
        grad = _zeros_like_rows(call.student) if in_chunks(call) else _empty_like_rows(call.student)
    scaled, factor = _in_range(call)
    soft, hard, gradients = _compute(scaled, grad, wants)
    loss = select(soft).weighted_total(*_weighted(call, soft, hard))
    return loss, soft, hard, gradients.student if grad is None else grad, gradients.weight, gradients.bias, factor


def _kd_loss_in_place(*arguments: Any) -> tuple[Tensor | None, ...]:
    call = Call(*arguments)
    scaled, factor = _in_range(call)
    soft, hard, _ = _compute(scaled, call.student, Wants(True, False, False))
    if in_chunks(call):  # the kernels saw neither masked rows nor padding
        scales = [scale != 0 for scale in (call.soft_scale, call.hard_scale) if scale is not None]
        live = sum(scales[1:], scales[0]) if scales else torch.zeros_like(soft, dtype=torch.bool)
        call.student.masked_fill_(~live.view(*call.student.shape[:-1], 1), 0)
        call.student[..., columns_of(call).width :] = 0
    return select(soft).weighted_total(*_weighted(call, soft, hard)), soft, hard, factor


def _kd_loss_per_row(*arguments: Any) -> tuple[Tensor | None, ...]:
    call = with_room_for_state(Call(*arguments))
    soft, hard, _ = _compute(call, None, NOTHING)
    return weighted_rows(*_weighted(call, soft, hard)), soft, hard, call.row_state, call.picked


def _fake_rows(tensor: Tensor) -> Tensor:
    rows = 1
    for size in tensor.shape[:-1]:
        rows = rows * size
    return tensor.new_empty((rows,), dtype=row_dtype(tensor.dtype))


def _fake_factor(call: Call) -> Tensor:
    absent = not _rounds_to_fp16(call) or (call.soft_scale is None and call.hard_scale is None)
    return _fake_rows(call.student).new_empty((0,) if absent else (), dtype=torch.float32)


def _fake_kd_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, wants = arguments
    call = Call(*fields)
    student = call.student
    grad, grad_weight, grad_bias = (
        student.new_empty(0)
        if not wanted or tensor is None
        else tensor.new_empty(
            tensor.shape, dtype=tensor.dtype if call.student_weight is None else kept_dtype(tensor.dtype)
        )
        for tensor, wanted in zip((student, call.student_weight, call.student_bias), wants, strict=True)
    )
    loss, soft, hard, factor = _fake_kd_loss_in_place(*fields)
    return loss, soft, hard, grad, grad_weight, grad_bias, factor


def _fake_kd_loss_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*arguments)
    rows = _fake_rows(call.student)
    return rows.new_empty(()), rows, _fake_rows(call.student), _fake_factor(call)


def _fake_kd_loss_per_row(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    student, rows = call.student, _fake_rows(call.student)
    state = student.new_empty((rows.shape[0], STATE_BYTES) if call.student_cut else (0,), dtype=torch.uint8)
    picks = call.teacher_ids.shape[-1:] if call.student_cut and call.teacher_ids is not None else None
    picked = student.new_empty((0,) if picks is None else (rows.shape[0], *picks), dtype=rows.dtype)
    return rows, _fake_rows(student), _fake_rows(student), state, picked


# --- scales of rows ---------------------------------------------------------------------------------------------


def _row_scales(
    student: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    number: float | None,
    reduction: str,
    ignore_index: int,
    shift: bool,
    mask_soft: bool,
) -> tuple[Tensor, Tensor | None]:
    divisor: float | Tensor | None = number if num_items is None else num_items
    if reduction != "mean":
        divisor = max(student.shape[0], 1) if reduction == "batchmean" else 1.0
    return select(student).row_scales(student, labels, weights, divisor, ignore_index, shift, mask_soft)


def _fake_row_scales(student: Tensor, labels: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    shift, mask_soft = arguments[-2:]
    rows = _fake_rows(student)
    scales = rows.new_empty((1 if mask_soft or labels is None else 2, *rows.shape))
    return scales, rows.new_empty(rows.shape if shift and labels is not None else 0, dtype=torch.int64)


# --- log-softmax and statistics ---------------------------------------------------------------------------------


def _log_softmax(logits: Tensor, temperature: float, group: str = "") -> tuple[Tensor, Tensor]:
    logits = addressable(logits)
    if not group:
        out = _empty_like_rows(logits)
        return out, select(logits).log_softmax(logits, temperature, out)
    given, logits = logits.shape, _one_column_at_least(logits)
    wide = torch.empty(logits.shape, dtype=row_dtype(logits.dtype), device=logits.device)  # rounded once
    own = select(logits).log_softmax(logits, temperature, wide)
    normaliser, apart = normaliser_of_ranks(own, temperature, group)
    # Of columns that are all −inf the backend knows no softmax. In a row that has one they have no part of it.
    none = (own[:, 1] == -math.inf) & normaliser.isfinite().all(-1)
    apart, none = (x.view(*logits.shape[:-1], 1) for x in (apart, none))
    wide.add_(apart).masked_fill_(none, -math.inf)
    return wide[..., : given[-1]].to(logits.dtype), normaliser


def _log_softmax_backward(
    upstream: Tensor, logits: Tensor, normaliser: Tensor, temperature: float, group: str = ""
) -> Tensor:
    logits = addressable(logits)
    grad, upstream = _empty_like_rows(logits), addressable(upstream)
    total = sum_of_ranks(upstream.sum(-1, dtype=normaliser.dtype).flatten(), group) if group else None
    if logits.shape[-1] > 0:
        select(logits).log_softmax_backward(upstream, logits, normaliser, temperature, grad, total)
    return grad


def _row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    logits = _one_column_at_least(addressable(logits))
    return select(logits).row_statistics(logits, labels, temperature)


def _one_column_at_least(logits: Tensor) -> Tensor:
    """What a rank has of rows; without columns as one of −inf, which has no part of a softmax."""
    if logits.shape[-1] > 0:
        return logits
    return torch.full((*logits.shape[:-1], 1), -math.inf, dtype=logits.dtype, device=logits.device)


def _fake_log_softmax(logits: Tensor, temperature: float, group: str = "") -> tuple[Tensor, Tensor]:
    rows = _fake_rows(logits)
    return logits.new_empty(logits.shape), rows.new_empty((rows.shape[0], 2))


def _fake_log_softmax_backward(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    rows = _fake_rows(logits)
    return rows, rows.clone(), rows.to(torch.int64), rows.clone(), rows.new_empty((rows.shape[0], 2))


#: What each operator runs, on every device: the backend is chosen inside. A result that is not wanted is None.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "kd_loss": _kd_loss,
    "kd_loss_": _kd_loss_in_place,
    "kd_loss_per_row": _kd_loss_per_row,
    "row_scales": _row_scales,
    "sum_of_ranks": sum_of_ranks,
    "log_softmax": _log_softmax,
    "log_softmax_backward": _log_softmax_backward,
    "row_statistics": _row_statistics,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "kd_loss": _fake_kd_loss,
    "kd_loss_": _fake_kd_loss_in_place,
    "kd_loss_per_row": _fake_kd_loss_per_row,
    "row_scales": _fake_row_scales,
    "sum_of_ranks": lambda values, group: torch.empty_like(values),
    "log_softmax": _fake_log_softmax,
    "log_softmax_backward": _fake_log_softmax_backward,
    "row_statistics": _fake_row_statistics,
}


def _filled(implementation: Callable[..., Any], absent: tuple[torch.dtype | None, ...]) -> Callable[..., Any]:
    """An implementation as an operator, whose results are all tensors: an absent one is empty.

    `absent` has the dtypes of the results where they are absent; None: the student's.
    """

    def filled(student: Tensor, *others: Any) -> Any:
        results = implementation(student, *others)
        return (*(student.new_empty(0, dtype=d) if x is None else x for x, d in zip(results, absent, strict=True)),)

    return filled


_ABSENT = {
    "kd_loss": (None,) * 6 + (torch.float32,),
    "kd_loss_": (None,) * 3 + (torch.float32,),
    "kd_loss_per_row": (None,) * 3 + (torch.uint8, None),
    "row_scales": (None, torch.int64),
}
for _name, _implementation in IMPLEMENTATIONS.items():
    _operator = _filled(_implementation, _ABSENT[_name]) if _name in _ABSENT else _implementation
    library.impl(_name, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{_name}", _FAKES[_name], lib=library)


def _one_after_another(operator: Any) -> Any:
    """What `torch.vmap` makes of an operator: as its own fallback, which takes no operator with a list of tensors."""

    def mapped(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            operator(*tree_map(lambda x, dim, i=i: x if dim is None else x.select(dim, i), arguments, dims))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return mapped


for _name in ("kd_loss", "kd_loss_per_row"):
    _operator = getattr(torch.ops.fastkd, _name).default
    torch.library.register_vmap(_operator, _one_after_another(_operator), lib=library)

library.impl("row_scales", torch.library.fallthrough_kernel, "Autograd")  # the student is asked for its shape only
