"""From `SparseTargets` to the rows a backend takes: checked, in order, and the three kinds made one.

A kernel sees K tokens and "the rest", everything else taken as one token, on both sides. What distinguishes the kinds
is the teacher's mass of the rest, which is 0 unless they are `"ghost"`, and a number added to the row's value.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastkd import arguments
from fastkd.backend import Backend
from fastkd.rows import SparseRows
from fastkd.sources import SparseTargets

__all__ = ["sparse_rows"]

#: By how much probabilities may miss a sum of 1 before they are refused: a cache rounds each of them.
_SLACK = 0.05
#: A rest smaller than this is only the rounding of fp32 logarithms; beside a student without a rest it would make the
#: loss infinite.
_NOTHING = 1e-6


def sparse_rows(
    targets: SparseTargets,
    live: Tensor | None,
    vocab_size: int,
    dtype: torch.dtype,
    backend: Backend | None = None,
) -> SparseRows:
    """Check the values of `targets` and lay them out as `rows.SparseRows`, in `dtype`; by `backend` if it can.

    `live` `[rows]` is 0 in rows that do not count, which may hold anything. Raises ValueError, on GPUs only with
    FASTKD_DEBUG=1, quoting the first wrong value.
    """
    if backend is not None and hasattr(backend, "sparse_rows") and arguments.is_checked(targets.ids):
        rows = backend.sparse_rows(targets, live, vocab_size, _SLACK, _NOTHING)
        if rows is not None:
            return cast(SparseRows, rows)
    ids = targets.ids.reshape(-1, targets.shape[-1]).to(torch.int64)
    logprobs = targets.logprobs.reshape(ids.shape).to(dtype)
    checked = arguments.is_checked(ids)
    absent = logprobs == -torch.inf
    ids = torch.where(absent, vocab_size, ids)
    if not checked or not _ascending(ids):
        ids, order = ids.sort(dim=-1)
        logprobs = logprobs.gather(-1, order)
        absent = absent.gather(-1, order)
    outside = (ids < 0) | ((ids >= vocab_size) & ~absent)
    if checked:
        _check_ids(ids, outside, absent, live, vocab_size)

    log_mass = torch.logsumexp(logprobs.double(), -1)  # of tokens however unlikely
    rest, offset = torch.full_like(logprobs[:, 0], -torch.inf), torch.zeros_like(logprobs[:, 0])
    log_total = log_mass
    if targets.kind == "ghost":
        if targets.rest is None:
            mass = log_mass.exp()
            rest = torch.log1p(-torch.where(mass > 1 - _NOTHING, 1.0, mass)).to(dtype)
        else:
            rest = targets.rest.reshape(-1).to(dtype)
            log_total = torch.logaddexp(log_mass, rest.double())
        if checked:
            _check_total(log_total.exp(), live, exactly=targets.rest is not None)
    if targets.kind == "renormalize" or targets.rest is not None:
        log_total = torch.where(log_total == -torch.inf, 0.0, log_total).to(dtype)
        logprobs, rest = logprobs - log_total[:, None], rest - log_total
    if targets.kind == "sampled":
        offset = -torch.where(absent, 0.0, logprobs.exp() * logprobs).sum(-1)
        if targets.entropy is not None:
            offset = offset - targets.entropy.reshape(-1).to(dtype)
    if not checked:  # a stray id is never read, and never hidden
        offset = torch.where(outside.any(-1), torch.nan, offset)
        ids = torch.where(outside, vocab_size, ids)
    return SparseRows(ids.contiguous(), logprobs.contiguous(), rest, offset, torch.zeros_like(logprobs))


def _ascending(ids: Tensor) -> bool:
    """Whether every row is in order, its absent entries last; equal neighbours are for `_check_ids`."""
    return bool((ids[:, 1:] >= ids[:, :-1]).all())


def _check_ids(ids: Tensor, outside: Tensor, absent: Tensor, live: Tensor | None, vocab_size: int) -> None:
    twice = torch.zeros_like(absent)
    twice[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & ~absent[:, 1:]
    for wrong, reason in ((outside, f"outside [0, {vocab_size})"), (twice, "twice")):
        if live is not None:
            wrong = wrong & (live != 0)[:, None]
        if wrong.any():
            row, entry = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"SparseTargets ids contains {int(ids[row, entry])} {reason} (token {row} of {len(ids)}); entries "
                "that are not there are marked by a logprob of -inf"
            )


def _check_total(total: Tensor, live: Tensor | None, exactly: bool) -> None:
    wrong = (total > 1 + _SLACK) | (exactly & (total < 1 - _SLACK))
    if live is not None:
        wrong = wrong & (live != 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"SparseTargets probabilities of token {row} of {len(total)} sum to {float(total[row]):.4g}, not to "
            f"{'1' if exactly else 'at most 1'}: logprobs must be those of the whole row's softmax"
        )
