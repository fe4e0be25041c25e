"""Row statistics and log-softmax beside the loss, from the same kernels: no probability tensor is formed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import sources
from fastkd.divergences import ForwardKL
from fastkd.heads import Head, autocast_dtype
from fastkd.plan import NOTHING, padded, plan_for
from fastkd.sources import Projection, Source

__all__ = ["RowStatistics", "log_softmax", "row_statistics"]


class RowStatistics(NamedTuple):
    """Per row of logits, each of the leading shape."""

    log_sum_exp: Tensor  # log Σ exp(logits / T)
    entropy: Tensor  # of softmax(logits / T), in nats (divide by ln 2 for bits)
    argmax: Tensor  # int64, the first of equal maxima
    label_logprob: Tensor  # log-probability of the label; NaN without labels and where a label is no token id


def _check_temperature(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    return float(temperature)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, fused and differentiable.

    Args:
        logits: `[..., V]`, fp32 / bf16 / fp16 (float64 on the reference backend); fp32 inside, rounded once.
        temperature: any T > 0.

    Returns:
        The same shape and dtype. Raises TypeError / ValueError for a wrong dtype, shape or temperature.
    """
    sources.check_logits(logits)
    out: Tensor = torch.ops.fastkd.log_softmax(logits, _check_temperature(temperature))[0]
    return out


def row_statistics(source: Source, labels: Tensor | None = None, temperature: float = 1.0) -> RowStatistics:
    """Log-sum-exp, entropy, arg-max and the label's log-probability of every row, in one read of the logits.

    Args:
        source: logits `[..., V]`, fp32 / bf16 / fp16 (float64 on the reference backend), or a `Projection`, whose
            logits are computed a chunk at a time.
        labels: token ids `[...]`, or None. Ids outside [0, V), such as −100, read NaN.
        temperature: any T > 0.

    Returns:
        `RowStatistics`, fp32 (arg-max int64) of the leading shape, without gradient.
        Perplexity is `exp(-label_logprob.nanmean())`. Raises TypeError / ValueError as `log_softmax` does.
    """
    sources.check(source, None, labels, None, None)
    temperature = _check_temperature(temperature)
    flat = None if labels is None else labels.to(torch.int64).reshape(-1)
    if isinstance(source, Projection):
        rows = _of_projection(source.detach(), flat, temperature)
    else:
        rows = torch.ops.fastkd.row_statistics(source.detach(), flat, temperature)
    return RowStatistics(*(row.reshape(source.shape[:-1]) for row in rows))


def _of_projection(source: Projection, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    count, device = source.shape[:-1].numel(), source.device
    autocast = autocast_dtype(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        head = Head(source, source.shape[-1], autocast, NOTHING)
        chunk = plan_for(
            max(count, 1),
            source.shape[-1],
            head.side,
            None,
            NOTHING,
            ForwardKL(),
            device,
            memory_budget=None,
            tiles_allowed=False,
        ).chunk
        buffer = torch.empty(min(chunk, count), padded(source.shape[-1]), dtype=head.result, device=device)
        found = []
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            head.start(rows, None)
            logits = head.logits(slice(0, source.shape[-1]), buffer[: rows.stop - start, : source.shape[-1]])
            found.append(torch.ops.fastkd.row_statistics(logits, None if labels is None else labels[rows], temperature))
        if not found:
            return tuple(torch.ops.fastkd.row_statistics(buffer[:, :1], labels, temperature))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
