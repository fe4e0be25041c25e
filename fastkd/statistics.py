"""Row statistics and log-softmax beside the loss, from the same kernels: no probability tensor is formed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import agreement, arguments, gradients, placed, sources
from fastkd.agreement import layout_of
from fastkd.projection.loop import logit_chunks
from fastkd.ranks import statistics_of_ranks
from fastkd.rows import row_dtype
from fastkd.sources import Projection, Source, VocabShard

__all__ = ["RowStatistics", "log_softmax", "row_statistics"]


class RowStatistics(NamedTuple):
    """Per row of logits, each of the leading shape."""

    log_sum_exp: Tensor  # log Σ exp(logits / T)
    entropy: Tensor  # of softmax(logits / T), in nats (divide by ln 2 for bits)
    argmax: Tensor  # int64, the first of equal maxima
    label_logprob: Tensor  # log-probability of the label; NaN without labels and where a label is no token id


def log_softmax(logits: Tensor | VocabShard, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, fused and differentiable.

    Args:
        logits: `[..., V]`, fp32 / bf16 / fp16 (float64 on the reference backend); fp32 inside, rounded once. Or a
            `VocabShard` of such logits, or a DTensor that is `Shard(-1)`: then ranks exchange two numbers of each row,
            and in the backward one.
        temperature: T in [1e-30, 1e6].

    Returns:
        The same shape and dtype; of a `VocabShard` this rank's columns, of a DTensor one like it.
        Raises TypeError / ValueError for a wrong dtype, shape or temperature, and NotImplementedError in forward mode
        (`torch.func.jvp`).
    """
    given: Any = logits
    logits = placed.here(logits, "log_softmax")
    return placed.like(given, agreement.together((logits,), _log_softmax, logits, temperature))


def _log_softmax(logits: Any, temperature: float) -> Tensor:
    own, group = (logits.source, logits.group) if isinstance(logits, VocabShard) else (logits, "")
    sources.check_logits(own, least=0 if group else 1)
    assert isinstance(own, Tensor)
    arguments.holds_values("logits", own)
    gradients.refuse_forward_mode(own)
    temperature = arguments.temperature("temperature", temperature)
    _check_alike(logits, None, temperature)
    out: Tensor = torch.ops.fastkd.log_softmax(own, temperature, group)[0]
    return out


def row_statistics(source: Source, labels: Tensor | None = None, temperature: float = 1.0) -> RowStatistics:
    """Log-sum-exp, entropy, arg-max and the label's log-probability of every row, in one read of the logits.

    Args:
        source: logits `[..., V]`, fp32 / bf16 / fp16 (float64 on the reference backend), or a `Projection`, whose
            logits are computed a chunk at a time. Or a `VocabShard` of either, or DTensors as `KDLoss` takes them: then
            ranks exchange five numbers of each row, and all have the same result.
        labels: token ids `[...]`, or None. Ids outside [0, V), such as −100, read NaN.
        temperature: T in [1e-30, 1e6].

    Returns:
        `RowStatistics`, fp32 (arg-max int64) of the leading shape, without gradient.
        Perplexity is `exp(-label_logprob.nanmean())`. Raises TypeError / ValueError as `log_softmax` does.
    """
    source, labels = placed.here(source, "row_statistics"), placed.beside(labels, "labels")
    return agreement.together((source,), _row_statistics, source, labels, temperature)  # type: ignore[no-any-return]


def _row_statistics(source: Any, labels: Tensor | None, temperature: float) -> RowStatistics:
    sources.check(source, None, labels, None, None)
    gradients.refuse_forward_mode(source)
    temperature = arguments.temperature("temperature", temperature)
    flat = None if labels is None else labels.to(torch.int64).reshape(-1)
    _check_alike(source, flat, temperature)
    own = source.source if isinstance(source, VocabShard) else source
    at = None if flat is None or not isinstance(source, VocabShard) else flat - source.first
    if isinstance(own, Projection):
        rows = _of_projection(own, flat if at is None else at, temperature)
    else:
        rows = torch.ops.fastkd.row_statistics(own.detach(), flat if at is None else at, temperature)
    if isinstance(source, VocabShard):
        layout = layout_of(source.group, source.first, own.shape[-1], source.vocab_size, own.device)
        rows = statistics_of_ranks(rows, flat, temperature, layout)
    return RowStatistics(*(row.reshape(source.shape[:-1]) for row in rows[:4]))


def _check_alike(source: Source, labels: Tensor | None, temperature: float) -> None:
    """ValueError, on all ranks, where they were given other columns, rows, labels or temperatures."""
    placed.check_cut(source)
    if not isinstance(source, VocabShard) or not arguments.is_checked(sources.tensors(source)[0]):
        return
    layout = layout_of(source.group, source.first, source.source.shape[-1], source.vocab_size, source.device)
    same = {
        "number of rows": source.shape[:-1].numel(),
        "dtype": row_dtype(source.dtype),
        "temperature": temperature,
        "labels (by checksum)": agreement.checksum(labels),
    }
    agreement.agreed([layout], source.device, same)


def _of_projection(source: Projection, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    found = [
        torch.ops.fastkd.row_statistics(logits, None if labels is None else labels[rows], temperature)
        for rows, logits in logit_chunks(source, source.shape[-1])
    ]
    if not found:
        none = torch.empty(0, 1, dtype=source.dtype, device=source.device)
        return tuple(torch.ops.fastkd.row_statistics(none, labels, temperature))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
