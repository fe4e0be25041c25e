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

from fastkd.kernels.gpu.blocks import edge_columns, leading_row, load_logits, row_beside, steps_of, vector_columns
from fastkd.kernels.gpu.divergences import LOG2E, weighted
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
def _observe(logits, at, span, highest, total, mean, first, scale, vocab_size):
    columns, present = at
    x = load_logits(logits, columns, present, "evict_last")
    new = tl.maximum(highest, lane_max(x))
    total, mean = _moved(highest, new, total, mean, scale)
    z = x - finite(new)[None, :, None]
    e = tl.exp2(z * scale)
    here = tl.where(present & (x == new[None, :, None]), columns + span.head, vocab_size)
    here = tl.min(tl.min(here, 2), 0)
    first = tl.where(new > highest, here, tl.minimum(first, here))
    return new, total + lane_sum(e), mean + lane_sum(weighted(e, z)), first


@triton.jit
def _sweep(logits, span, scale, vocab_size, BLOCK: tl.constexpr):
    """Maximum, Σ e^(z/T), Σ e^(z/T)·z and the first column of the maximum; z = logit − maximum."""
    highest = per_thread(BLOCK) - float("inf")
    total = per_thread(BLOCK)
    mean = per_thread(BLOCK)
    first = per_thread(BLOCK).to(tl.int32) + vocab_size
    if BLOCK.edges:
        highest, total, mean, first = _observe(
            logits, edge_columns(span, BLOCK), span, highest, total, mean, first, scale, vocab_size
        )
    for step in range(steps_of(span, BLOCK)):
        at = vector_columns(step, span, BLOCK)
        highest, total, mean, first = _observe(logits, at, span, highest, total, mean, first, scale, vocab_size)
    top = tl.max(highest, 0)
    total, mean = _moved(highest, top, total, mean, scale)
    first = tl.min(tl.where(highest == top, first, vocab_size), 0)
    return top, tl.sum(total, 0), tl.sum(mean, 0), first


@triton.jit
def _statistics_kernel(
    rows,
    labels,
    log_sum_exps,
    entropies,
    argmaxes,
    label_logprobs,
    inverse,
    scale,
    vocab_size,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    row, span = leading_row(rows, index, vocab_size, BLOCK)
    top, total, mean, first = _sweep(row.vectors, span, scale, vocab_size, BLOCK)
    log_total = tl.log(total)
    tl.store(log_sum_exps + index, top * inverse + log_total)
    tl.store(entropies + index, log_total - mean / total * inverse)
    tl.store(argmaxes + index, tl.where(first < vocab_size, first, 0).to(tl.int64))
    if labels is not None:
        label = tl.load(labels + index)
        inside = (label >= 0) & (label < vocab_size)
        logprob = (tl.load(row.columns + label, inside, other=0.0).to(tl.float32) - top) * inverse - log_total
        tl.store(label_logprobs + index, tl.where(inside, logprob, float("nan")))


def row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of softmax(logits / temperature): log-sum-exp, entropy (nats), arg-max, label log-probability; `[rows]` each.

    All fp32 but the arg-max, int64, which is the first maximum. The last is NaN where a label is outside [0, V).
    """
    count, vocab_size = logits[..., 0].numel(), logits.shape[-1]
    log_sum_exp, entropy, label_logprob = (
        torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    argmax = torch.empty(count, dtype=torch.int64, device=logits.device)
    if labels is None:
        label_logprob.fill_(torch.nan)
    if count > 0:
        block = block_for([logits], vocab_size)
        with device_of(logits):
            _statistics_kernel[(count,)](
                rows_of(logits),
                labels,
                log_sum_exp,
                entropy,
                argmax,
                label_logprob,
                1 / temperature,
                LOG2E.value / temperature,
                vocab_size,
                block,
                **launch_options(block),
            )
    return log_sum_exp, entropy, argmax, label_logprob


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
    top, total, _, _ = _sweep(logits, span, scale, vocab_size, BLOCK)
    log_total = tl.log(total)
    tl.store(normalisers + 2 * index, top)
    tl.store(normalisers + 2 * index + 1, log_total * LOG2E)

    out = row_beside(out_rows, index, span, OUT_ALIGNED, BLOCK).vectors
    steps = steps_of(span, BLOCK)
    for step in range(steps):
        _write_step(out, logits, vector_columns(steps - 1 - step, span, BLOCK), top, log_total, inverse)
    if BLOCK.edges:
        _write_step(out, logits, edge_columns(span, BLOCK), top, log_total, inverse)


def log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Write logits/temperature − log-sum-exp to `out`, in its dtype; return the normaliser, fp32 `[rows, 2]`.

    That is the row's largest logit and log2 of the sum of exponentials relative to it.
    """
    count = logits[..., 0].numel()
    normaliser = torch.empty(count, 2, dtype=torch.float32, device=logits.device)
    if count > 0:
        block = block_for([logits, out], logits.shape[-1])
        with device_of(logits):
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
def _load_pair(upstream, logits, at, normaliser, scale, POLICY: tl.constexpr):
    """Upstream gradient and probability."""
    top, log_total = normaliser
    columns, present = at
    above = tl.load(upstream + columns, present, other=0.0, eviction_policy=POLICY).to(tl.float32)
    x = load_logits(logits, columns, present, POLICY)
    return above, tl.exp2((x - finite(top)) * scale - log_total)


@triton.jit
def _sum_step(upstream, at, POLICY: tl.constexpr):
    columns, present = at
    return lane_sum(tl.load(upstream + columns, present, other=0.0, eviction_policy=POLICY).to(tl.float32))


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

    above = per_thread(BLOCK)
    if BLOCK.edges:
        above = _sum_step(upstream, edge_columns(span, BLOCK), "evict_last")
    steps = steps_of(span, BLOCK)
    for step in range(steps):
        above += _sum_step(upstream, vector_columns(step, span, BLOCK), "evict_last")
    total = tl.sum(above, 0)

    for step in range(steps):
        at = vector_columns(steps - 1 - step, span, BLOCK)
        _backward_step(grad, upstream, logits, at, normaliser, total, inverse, scale)
    if BLOCK.edges:
        _backward_step(grad, upstream, logits, edge_columns(span, BLOCK), normaliser, total, inverse, scale)


def log_softmax_backward(
    upstream: Tensor, logits: Tensor, normaliser: Tensor, temperature: float, grad: Tensor
) -> None:
    """Write (upstream − softmax(logits/T)·Σ upstream) / T to `grad`; `upstream` `[..., V]` like `logits`."""
    count = logits[..., 0].numel()
    if count > 0:
        block = block_for([logits, upstream, grad], logits.shape[-1])
        with device_of(logits):
            _log_softmax_backward_kernel[(count,)](
                rows_of(upstream),
                rows_of(logits),
                rows_of(grad),
                normaliser,
                1 / temperature,
                LOG2E.value / temperature,
                logits.shape[-1],
                co_aligned(upstream, logits, block),
                co_aligned(grad, logits, block),
                block,
                **launch_options(block),
            )
