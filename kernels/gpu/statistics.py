"""Row statistics of logits, and log-softmax with its gradient.

Sums of exponentials are kept relative to a running maximum and per thread, as in `sweeps`. `row_statistics` reads the
logits once, `log_softmax` twice. `log_softmax_backward` reads the upstream gradient twice and the logits once. It is
given the maximum and the sum of each row as two numbers: at an offset of 1e4 their log-sum-exp, as one fp32 number, has
an error of up to 5e-4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.blocks import (
    columns_of,
    edge_columns,
    last_columns,
    leading_row,
    load_logits,
    row_beside,
    whole_columns,
    whole_steps,
)
from fastkd.kernels.gpu.elementary import LOG2E, weighted
from fastkd.kernels.gpu.lanes import finite, lane_max, lane_sum, per_thread
from fastkd.kernels.gpu.launch import block_for, co_aligned, device_of, launch_options, rows_of

# --- statistics -------------------------------------------------------------------------------------------------


@triton.jit
def _moved(old, new, total, mean, scale):
    """Σ e^z and Σ e^z z, of z relative to maximum `old`, made relative to `new`."""
    decay = tl.exp2((old - finite(new)) * scale)
    shift = finite(old) - finite(new)
    return total * decay, tl.where(decay == 0, 0.0, decay * (mean + total * shift))


@triton.jit
def _observe(logits, at, step, found, scale):
    """Per thread: maximum, sums, and the step in which the maximum last rose."""
    highest, total, mean, since = found
    columns, present = at
    x = load_logits(logits, columns, present, "evict_last")
    new = tl.maximum(highest, lane_max(x))
    total, mean = _moved(highest, new, total, mean, scale)
    z = x - finite(new)[None, :, None]
    e = tl.exp2(z * scale)
    return new, total + lane_sum(e), mean + lane_sum(weighted(e, z)), tl.where(new > highest, step, since)


@triton.jit
def _sweep(logits, span, scale, BLOCK: tl.constexpr):
    """Maximum, Σ e^(z/T), Σ e^(z/T)·z with z = logit − maximum; and where `_argmax` has to look."""
    none = per_thread(BLOCK)
    found = (none - float("inf"), none, none, none.to(tl.int32))
    steps = whole_steps(span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        found = _observe(logits, (whole_columns(step, BLOCK), None), step, found, scale)
    found = _observe(logits, last_columns(span, BLOCK), steps, found, scale)
    place = (found[0], found[3])
    if BLOCK.edges:
        found = _observe(logits, edge_columns(span, BLOCK), steps, found, scale)
    highest, total, mean, _ = found
    top = tl.max(highest, 0)
    total, mean = _moved(highest, top, total, mean, scale)
    return top, tl.sum(total, 0), tl.sum(mean, 0), place


@triton.jit
def _first(logits, at, wanted, top, vocab_size):
    """The first of a step's columns, counted from the first vector, that is `top`; `vocab_size` if none is."""
    columns, present = at
    x = load_logits(logits, columns, present & wanted, "evict_first")
    return tl.min(tl.min(tl.min(tl.where(present & (x == top), columns, vocab_size), 2), 1), 0)


@triton.jit
def _argmax(logits, span, top, place, vocab_size, BLOCK: tl.constexpr):
    """The first column of the maximum, `vocab_size` or more if there is none.

    `place`: per thread, the maximum of its vectors and the step in which it was first met. To read that step again in
    the threads that hold the row's maximum costs less than to carry a column along with every maximum.
    """
    highest, since = place
    steps = tl.where(highest == top, since, whole_steps(span, BLOCK) + 1)  # a step without columns
    step = tl.min(steps, 0)
    column = _first(logits, columns_of(step, span, BLOCK), (steps == step)[None, :, None], top, vocab_size)
    if BLOCK.edges:
        column = tl.minimum(column, _first(logits, edge_columns(span, BLOCK), True, top, vocab_size))
    return column + span.head


@triton.jit
def _statistics_kernel(
    rows,
    labels,
    log_sum_exps,
    entropies,
    argmaxes,
    label_logprobs,
    normalisers,
    inverse,
    scale,
    vocab_size,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    row, span = leading_row(rows, index, vocab_size, BLOCK)
    top, total, mean, place = _sweep(row.vectors, span, scale, BLOCK)
    first = _argmax(row.vectors, span, top, place, vocab_size, BLOCK)
    log_total = tl.log(total)
    tl.store(log_sum_exps + index, top * inverse + log_total)
    tl.store(normalisers + 2 * index, top)
    tl.store(normalisers + 2 * index + 1, log_total * LOG2E)
    tl.store(entropies + index, log_total - mean / total * inverse)
    tl.store(argmaxes + index, tl.where(first < vocab_size, first, 0).to(tl.int64))
    if labels is not None:
        label = tl.load(labels + index)
        inside = (label >= 0) & (label < vocab_size)
        logprob = (tl.load(row.columns + label, inside, other=0.0).to(tl.float32) - top) * inverse - log_total
        tl.store(label_logprobs + index, tl.where(inside, logprob, float("nan")))


def row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    """Of softmax(logits / temperature): log-sum-exp, entropy (nats), arg-max, label log-probability; `[rows]` each.

    All fp32 but the arg-max, int64, which is the first maximum. The last is NaN where a label is outside [0, V). Then
    the normaliser, as `log_softmax` returns it.
    """
    count, vocab_size = logits[..., 0].numel(), logits.shape[-1]
    log_sum_exp, entropy, label_logprob = (
        torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    argmax = torch.empty(count, dtype=torch.int64, device=logits.device)
    normaliser = torch.empty(count, 2, dtype=torch.float32, device=logits.device)
    if labels is None:
        label_logprob.fill_(torch.nan)
    if count > 0:
        with device_of(logits):
            block = block_for([logits], vocab_size, busy=True)
            _statistics_kernel[(count,)](
                rows_of(logits),
                labels,
                log_sum_exp,
                entropy,
                argmax,
                label_logprob,
                normaliser,
                1 / temperature,
                LOG2E.value / temperature,
                vocab_size,
                block,
                **launch_options(block, rows=2),
            )
    return log_sum_exp, entropy, argmax, label_logprob, normaliser


# --- log-softmax ------------------------------------------------------------------------------------------------


@triton.jit
def _write_step(out, logits, at, top, log_total, inverse):
    columns, present = at
    x = load_logits(logits, columns, present, "evict_first")
    tl.store(out + columns, (x - top) * inverse - log_total, present)


@triton.jit
def _log_softmax_kernel(
    rows, out_rows, normalisers, inverse, scale, vocab_size, OUT_ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0)
    row, span = leading_row(rows, index, vocab_size, BLOCK)
    logits = row.vectors
    top, total, _, _ = _sweep(logits, span, scale, BLOCK)
    log_total = tl.log(total)
    tl.store(normalisers + 2 * index, top)
    tl.store(normalisers + 2 * index + 1, log_total * LOG2E)

    out = row_beside(out_rows, index, span, OUT_ALIGNED, BLOCK).vectors
    _write_step(out, logits, last_columns(span, BLOCK), top, log_total, inverse)
    steps = whole_steps(span, BLOCK)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        _write_step(out, logits, (whole_columns(steps - 1 - step, BLOCK), None), top, log_total, inverse)
    if BLOCK.edges:
        _write_step(out, logits, edge_columns(span, BLOCK), top, log_total, inverse)


def log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Write logits/temperature − log-sum-exp to `out`, in its dtype; return the normaliser, fp32 `[rows, 2]`.

    That is the row's largest logit and log2 of the sum of exponentials relative to it.
    """
    count = logits[..., 0].numel()
    normaliser = torch.empty(count, 2, dtype=torch.float32, device=logits.device)
    if count > 0:
        with device_of(logits):
            block = block_for([logits, out], logits.shape[-1])
            _log_softmax_kernel[(count,)](
                rows_of(logits),
                rows_of(out),
                normaliser,
                1 / temperature,
                LOG2E.value / temperature,
                logits.shape[-1],
                co_aligned(out, logits, block),
                block,
                **launch_options(block),
            )
    return normaliser


@triton.jit
def _load_upstream(upstream, at, POLICY: tl.constexpr):
    columns, present = at
    if present is None:
        return tl.load(upstream + columns, eviction_policy=POLICY).to(tl.float32)
    else:
        return tl.load(upstream + columns, present, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _load_pair(upstream, logits, at, normaliser, scale, POLICY: tl.constexpr):
    """Upstream gradient and probability."""
    top, log_total = normaliser
    columns, present = at
    above = _load_upstream(upstream, at, POLICY)
    x = load_logits(logits, columns, present, POLICY)
    return above, tl.exp2((x - finite(top)) * scale - log_total)


@triton.jit
def _backward_step(grad, upstream, logits, at, normaliser, total, inverse, scale):
    above, q = _load_pair(upstream, logits, at, normaliser, scale, "evict_first")
    columns, present = at
    tl.store(grad + columns, (above - q * total) * inverse, present)


@triton.jit
def _log_softmax_backward_kernel(
    upstream_rows,
    rows,
    grad_rows,
    normalisers,
    totals,
    inverse,
    scale,
    vocab_size,
    UPSTREAM_ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    normaliser = (tl.load(normalisers + 2 * index), tl.load(normalisers + 2 * index + 1))
    row, span = leading_row(rows, index, vocab_size, BLOCK)
    logits = row.vectors
    upstream = row_beside(upstream_rows, index, span, UPSTREAM_ALIGNED, BLOCK).vectors
    grad = row_beside(grad_rows, index, span, GRAD_ALIGNED, BLOCK).vectors

    steps = whole_steps(span, BLOCK)
    if totals is not None:
        total = tl.load(totals + index)
    else:
        above = per_thread(BLOCK)
        if BLOCK.edges:
            above = lane_sum(_load_upstream(upstream, edge_columns(span, BLOCK), "evict_last"))
        for step in tl.range(0, steps, num_stages=BLOCK.stages):
            above += lane_sum(_load_upstream(upstream, (whole_columns(step, BLOCK), None), "evict_last"))
        above += lane_sum(_load_upstream(upstream, last_columns(span, BLOCK), "evict_last"))
        total = tl.sum(above, 0)

    last = last_columns(span, BLOCK)
    _backward_step(grad, upstream, logits, last, normaliser, total, inverse, scale)
    for step in tl.range(0, steps, num_stages=BLOCK.stages):
        at = (whole_columns(steps - 1 - step, BLOCK), None)
        _backward_step(grad, upstream, logits, at, normaliser, total, inverse, scale)
    if BLOCK.edges:
        _backward_step(grad, upstream, logits, edge_columns(span, BLOCK), normaliser, total, inverse, scale)


def log_softmax_backward(
    upstream: Tensor,
    logits: Tensor,
    normaliser: Tensor,
    temperature: float,
    grad: Tensor,
    total: Tensor | None = None,
) -> None:
    """Write (upstream − softmax(logits/T)·Σ upstream) / T to `grad`; `upstream` `[..., V]` like `logits`.

    `total` is Σ upstream, where the columns here are not all of a row.
    """
    count = logits[..., 0].numel()
    if count > 0:
        with device_of(logits):
            block = block_for([logits, upstream, grad], logits.shape[-1], loaded=2)
            _log_softmax_backward_kernel[(count,)](
                rows_of(upstream),
                rows_of(logits),
                rows_of(grad),
                normaliser.contiguous(),
                total,
                1 / temperature,
                LOG2E.value / temperature,
                logits.shape[-1],
                co_aligned(upstream, logits, block),
                co_aligned(grad, logits, block),
                block,
                **launch_options(block),
            )
