"""The specification, in eager PyTorch: any device, any floating dtype, float64 included.

Tests and benchmarks import this file and judge the kernels by it. A divergence is a function
`(log_p, log_q, parameters) → (term, g)` on `[rows, V]` log-probabilities of teacher and student, where the value
of a row is Σ_v term and `g = ∂term/∂log q`. With G = Σ_v g the gradient w.r.t. the student's logits is
`(g − q·G) / T`, so the skeleton below serves every divergence.

This file is also the backend of last resort: it offers the same functions as the kernels (see `backend.Backend`).
Formulas follow the textbook rather than the kernels, so that the two can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd.divergences import of_spec
from fastkd.rows import RowSpec, SparseRows, row_dtype

__all__ = [
    "DIVERGENCES",
    "kd_rows",
    "log_softmax",
    "log_softmax_backward",
    "mix_rows",
    "row_scales",
    "row_statistics",
    "sample",
    "top_k",
    "weighted_rows",
    "weighted_total",
]

Pair = tuple[Tensor, Tensor]


def _weighted(probability: Tensor, value: Tensor) -> Tensor:
    """probability · value, and 0 where the probability is 0 even if the value there is infinite or NaN."""
    return torch.where(probability == 0, 0.0, probability * value)


def _log_mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight·a + (1−weight)·b) for 0 < weight < 1."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def forward_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    p = log_p.exp()
    return _weighted(p, log_p - log_q), -p


def reverse_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    q = log_q.exp()
    term = _weighted(q, log_q - log_p)
    return term, term + q


def symmetric_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    (weight,) = parameters
    (forward, g_forward), (reverse, g_reverse) = forward_kl(log_p, log_q, ()), reverse_kl(log_p, log_q, ())
    return weight * forward + (1 - weight) * reverse, weight * g_forward + (1 - weight) * g_reverse


def jsd(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    (beta,) = parameters
    p, q, log_m = log_p.exp(), log_q.exp(), _log_mix(log_p, log_q, beta)
    from_student = (1 - beta) * _weighted(q, log_q - log_m)
    return beta * _weighted(p, log_p - log_m) + from_student, from_student


def skew_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    (lam,) = parameters
    p, log_m = log_p.exp(), _log_mix(log_p, log_q, lam)
    return _weighted(p, log_p - log_m), -(1 - lam) * _weighted(p, (log_q - log_m).exp())


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    (lam,) = parameters
    q, log_m = log_q.exp(), _log_mix(log_q, log_p, lam)
    term = _weighted(q, log_q - log_m)
    return term, term + (1 - lam) * _weighted(q, (log_p - log_m).exp())


def tvd(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    p, q = log_p.exp(), log_q.exp()
    return (p - q).abs() / 2, q * torch.sign(q - p) / 2


def squared_hellinger(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    root_q = (log_q / 2).exp()
    distance = root_q - (log_p / 2).exp()
    return distance.square() / 2, root_q * distance / 2


def alpha_beta(log_p: Tensor, log_q: Tensor, parameters: Sequence[float]) -> Pair:
    """Terms d²·exp[s log q, α log p + β log q, s log p], where exp[…] is the divided difference of exp and s = α + β.

    This is Cichocki's formula without its divisions by α, β and s: nothing cancels where one of them is nearly 0.
    """
    alpha, beta = parameters
    ratio = torch.where(log_p == log_q, 0.0, log_q - log_p)  # 0, not NaN, where both are −inf
    distance, rising = ratio.abs(), ratio > 0
    term, slope = torch.empty_like(ratio), torch.empty_like(ratio)
    for side, sign in ((rising, 1), (~rising, -1)):
        # Each exponent as its distance below the first, in units of |d|, and as multiples of log p and log q.
        exponents = [(0.0, 0.0, alpha + beta), (sign * alpha, alpha, beta), (sign * (alpha + beta), alpha + beta, 0.0)]
        larger = min(exponents[:2])[1:]
        (least, *largest), (middle, *_), (most, *_) = sorted(exponents)
        gaps = _spread(distance, middle - least, most - least)
        term = torch.where(side, _weighted(_power(log_p, log_q, largest), gaps), term)
        difference = _weighted(_power(log_p, log_q, larger), _decayed(distance, abs(alpha)))
        slope = torch.where(side, sign * difference, slope)
    return torch.where(ratio == 0, 0.0, term), torch.where(ratio == 0, 0.0, slope)


def _power(log_p: Tensor, log_q: Tensor, exponents: Sequence[float]) -> Tensor:
    """p^a·q^b."""
    a, b = exponents
    return ((a * log_p if a else 0.0) + (b * log_q if b else torch.zeros_like(log_q))).exp()


def _decayed(distance: Tensor, rate: float) -> Tensor:
    """∫₀^distance e^(−rate·x) dx."""
    return -torch.expm1(-rate * distance) / rate if rate else distance


def _spread(distance: Tensor, middle: float, most: float) -> Tensor:
    """distance²·exp[0, −middle·distance, −most·distance] for 0 ≤ middle ≤ most."""
    u, v = (rate * distance if rate else torch.zeros_like(distance) for rate in (middle, most))
    inner = series = torch.zeros_like(distance)
    for k in range(16, -1, -1):
        inner = 1 / math.factorial(k + 2) - u * inner
        series = inner - v * series
    if not most:
        return distance.square() * series
    recurrence = (_decayed(distance, middle) - _weighted((-u).exp(), _decayed(distance, most - middle))) / most
    return torch.where(v < 0.5, distance.square() * series, recurrence)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Sequence[float]], Pair]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        symmetric_kl,
        jsd,
        skew_kl,
        skew_reverse_kl,
        tvd,
        squared_hellinger,
        alpha_beta,
    )
}


def _terms(log_p: Tensor, log_q: Tensor, spec: RowSpec) -> Pair:
    """The function of the divergence, or of each part of a mix: their weighted sum."""
    if spec.divergence in DIVERGENCES:
        return DIVERGENCES[spec.divergence](log_p, log_q, spec.parameters)
    term, slope = torch.zeros_like(log_q), torch.zeros_like(log_q)
    for part, weight in of_spec(spec.divergence, spec.parameters).parts:
        own, g = DIVERGENCES[part.name](log_p, log_q, part.parameters)
        term, slope = term + weight * own, slope + weight * g
    return term, slope


def _wide(logits: Tensor, columns: int | None = None) -> Tensor:
    """`[rows, columns]` in the dtype the arithmetic runs in: fp32, or float64 where the input is."""
    rows = logits[..., :columns].reshape(-1, logits.shape[-1] if columns is None else columns)
    return rows.to(row_dtype(rows.dtype))


def _divergence_rows(student: Tensor, teacher: Tensor, spec: RowSpec) -> Pair:
    """`[rows]` values and their `[rows, V]` gradient w.r.t. the student's logits."""
    if spec.divergence == "mse":
        difference = torch.where(student == teacher, 0.0, student - teacher)  # 0 where both are −inf
        return difference.square().mean(-1), difference * (2 / spec.vocab_size)
    log_q = torch.log_softmax(_shifted(student, spec.temperature)[0], -1)
    log_p = torch.log_softmax(_shifted(teacher, spec.teacher_temperature)[0], -1)
    term, g = _terms(log_p, log_q, spec)
    return term.sum(-1), (g - log_q.exp() * g.sum(-1, keepdim=True)) / spec.temperature


def _sparse_rows(student: Tensor, teacher: SparseRows, spec: RowSpec) -> Pair:
    """The same beside a sparse teacher: K + 1 categories, the K known tokens and all other columns as one.

    The chain rule goes through the rest's logit, the log-sum-exp of its columns, to each of them.
    """
    z, columns = _shifted(student, spec.temperature)[0], student.shape[-1]
    here = (teacher.ids >= 0) & (teacher.ids < columns)  # rows that do not count may hold anything
    ids = torch.where(here, teacher.ids, 0)
    kept = torch.zeros_like(z).scatter_add_(-1, ids, here.to(z.dtype)) > 0
    others = z.masked_fill(kept, -math.inf)
    rest = torch.logsumexp(others, -1, keepdim=True)
    picked = torch.where(here, z.gather(-1, ids), -math.inf)
    log_q = torch.log_softmax(torch.cat((picked, rest), -1), -1)
    log_p = torch.cat((teacher.logprobs, teacher.rest[:, None]), -1)
    term, g = _terms(log_p, log_q, spec)
    slope = (g - log_q.exp() * g.sum(-1, keepdim=True)) / spec.temperature
    share = torch.where(rest == -math.inf, 0.0, (others - rest).exp())
    gradient = share * slope[:, -1:]
    gradient.scatter_add_(-1, ids, torch.where(here, slope[:, :-1], 0.0))
    return term.sum(-1) + teacher.offset, gradient


def _label_log_probabilities(log_q: Tensor, labels: Tensor) -> Tensor:
    """`[rows]` log q[label]; NaN where the label is outside the vocabulary."""
    inside = (labels >= 0) & (labels < log_q.shape[-1])
    picked = log_q.gather(-1, torch.where(inside, labels, 0)[:, None])[:, 0]
    return torch.where(inside, picked, math.nan)


def _cross_entropy_rows(student: Tensor, labels: Tensor) -> Pair:
    log_q = torch.log_softmax(student, -1)
    loss = -_label_log_probabilities(log_q, labels)
    gradient = log_q.exp()
    inside = (labels >= 0) & (labels < student.shape[-1])
    gradient.scatter_add_(-1, torch.where(inside, labels, 0)[:, None], -inside[:, None].to(gradient.dtype))
    return loss, gradient + torch.where(inside, 0.0, math.nan)[:, None].to(gradient.dtype)


def kd_rows(
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `backend.Backend.kd_rows`."""
    logits = _wide(student, spec.vocab_size)
    soft = hard = logits.new_zeros(logits.shape[0])
    gradient = torch.zeros_like(logits) if grad is not None else None
    if soft_scale is not None and teacher is not None:
        if isinstance(teacher, SparseRows):
            value, slope = _sparse_rows(logits, teacher, spec)
        else:
            value, slope = _divergence_rows(logits, _wide(teacher, spec.vocab_size), spec)
        soft = torch.where(soft_scale == 0, 0.0, value)
        if gradient is not None:
            gradient += _scaled(slope, spec.soft_weight * soft_scale)
    if hard_scale is not None and labels is not None:
        value, slope = _cross_entropy_rows(logits, labels)
        hard = torch.where(hard_scale == 0, 0.0, value)
        if gradient is not None:
            gradient += _scaled(slope, spec.hard_weight * hard_scale)
    if grad is not None and gradient is not None:
        grad[..., : spec.vocab_size].copy_(gradient.view(*grad.shape[:-1], spec.vocab_size))
        grad[..., spec.vocab_size :].zero_()
    return soft, hard


def mix_rows(
    teachers: Sequence[Tensor], weights: Sequence[float], temperature: float, scale: Tensor | None, out: Tensor
) -> None:
    """See `backend.Backend.mix_rows`."""
    log_p = torch.full_like(out, -math.inf)
    for teacher, weight in zip(teachers, weights, strict=True):
        own = torch.log_softmax(_shifted(teacher.to(out.dtype), temperature)[0], -1)
        log_p = torch.logaddexp(log_p, own + math.log(weight))
    out.copy_(temperature * log_p)


def row_scales(
    student: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    divisor: float | Tensor | None,
    ignore_index: int,
    shift: bool,
    mask_soft: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `backend.Backend.row_scales`."""
    dtype = row_dtype(student.dtype)
    ones = torch.ones(student.shape[:-1], dtype=dtype, device=student.device)
    every = ones if weights is None else weights.to(dtype)
    if shift:
        every = _moved_left(every, 0.0)
        labels = None if labels is None else _moved_left(labels, ignore_index)
    masked = every if labels is None else torch.where(labels == ignore_index, 0.0, every)
    scales = (masked,) if mask_soft or labels is None else (every, masked)
    rows = torch.stack([_divided(scale.reshape(-1), divisor) for scale in scales])
    return rows, labels.reshape(-1) if shift and labels is not None else None


def _moved_left(tokens: Tensor, fill: float) -> Tensor:
    """tokens `[..., S]` moved one place towards the front, the freed last place filled."""
    return torch.nn.functional.pad(tokens[..., 1:], (0, min(tokens.shape[-1], 1)), value=fill)


def _divided(scale: Tensor, divisor: float | Tensor | None) -> Tensor:
    if divisor is None:
        divisor = scale.sum()
    if isinstance(divisor, Tensor):
        divisor = divisor.to(scale.device, scale.dtype, non_blocking=True)
        return torch.where(divisor == 0, 0.0, scale / divisor)
    return scale / divisor if divisor != 0 else torch.zeros_like(scale)


def weighted_total(
    soft: Tensor,
    hard: Tensor,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    soft_weight: float,
    hard_weight: float,
) -> Tensor:
    """See `backend.Backend.weighted_total`."""
    return weighted_rows(soft, hard, soft_scale, hard_scale, soft_weight, hard_weight).sum()


def weighted_rows(
    soft: Tensor,
    hard: Tensor,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    soft_weight: float,
    hard_weight: float,
) -> Tensor:
    """soft_weight·soft_scale·soft + hard_weight·hard_scale·hard, `[rows]`; a term is absent without scale or weight."""
    rows: Tensor | None = None
    if soft_scale is not None and soft_weight != 0:
        rows = soft_weight * soft_scale * soft
    if hard_scale is not None and hard_weight != 0:
        hard = hard_weight * hard_scale * hard
        rows = hard if rows is None else rows + hard
    return torch.zeros_like(soft) if rows is None else rows


def _scaled(slope: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale[:, None] == 0, 0.0, slope * scale[:, None])


def _shifted(logits: Tensor, temperature: float) -> Pair:
    """`[rows, V]` (logits − max) / T and the `[rows]` maxima: a large offset is gone before anything rounds."""
    rows = _wide(logits)
    largest = rows.amax(-1, keepdim=True)
    finite = torch.where(largest == -math.inf, 0.0, largest)
    return (rows - finite) / temperature, finite[:, 0]


def row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    """See `backend.Backend.row_statistics`."""
    shifted, largest = _shifted(logits, temperature)
    log_q = torch.log_softmax(shifted, -1)
    entropy = -_weighted(log_q.exp(), log_q).sum(-1)
    no_label = torch.full_like(largest, math.nan)
    picked = no_label if labels is None else _label_log_probabilities(log_q, labels)
    log_total = torch.logsumexp(shifted, -1)
    normaliser = _normaliser(largest, log_total)
    return log_total + largest / temperature, entropy, shifted.argmax(-1), picked, normaliser


def log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """See `backend.Backend.log_softmax`."""
    shifted, largest = _shifted(logits, temperature)
    out.copy_(torch.log_softmax(shifted, -1).view(out.shape))
    return _normaliser(largest, torch.logsumexp(shifted, -1))


def _normaliser(largest: Tensor, log_total: Tensor) -> Tensor:
    """As of `Backend.log_softmax`, from what `_shifted` says."""
    largest = torch.where(log_total == -math.inf, -math.inf, largest)
    return torch.stack((largest, log_total / math.log(2)), -1)


def log_softmax_backward(
    upstream: Tensor,
    logits: Tensor,
    normaliser: Tensor,
    temperature: float,
    grad: Tensor,
    total: Tensor | None = None,
) -> None:
    """See `backend.Backend.log_softmax_backward`. Normalises whole rows again: a normaliser may be rounded."""
    above, (shifted, largest) = _wide(upstream), _shifted(logits, temperature)
    if total is None:
        q, total = torch.softmax(shifted, -1), above.sum(-1)
    else:
        beside = (largest - normaliser[:, 0]) / temperature - normaliser[:, 1] * math.log(2)
        q = (shifted + beside[:, None]).exp()
    grad.copy_(((above - q * total[:, None]) / temperature).view(grad.shape))


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `backend.Backend.top_k`."""
    log_p = torch.log_softmax(_shifted(logits, temperature)[0], -1)
    logprobs, ids = log_p.topk(min(k, log_p.shape[-1]), -1)
    rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
    return *_in_order(ids, logprobs, k), torch.where(log_p[:, 0].isnan(), math.nan, rest)


def sample(logits: Tensor, k: int, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `backend.Backend.sample`."""
    log_p = torch.log_softmax(_shifted(logits, temperature)[0], -1)
    p = log_p.exp()
    top, ids = p.topk(min(k, p.shape[-1]), -1)
    # above[h]: the mass of all but the h likeliest, summed from the least.
    rest = p.scatter(-1, ids, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    above = torch.cat((top.double(), rest), -1).flip(-1).cumsum(-1).flip(-1)
    places = torch.arange(top.shape[-1] + 1, dtype=torch.int64, device=top.device)
    draws = k - places
    heads = (top * draws[:-1] >= above[:, :-1]).cumprod(-1).sum(-1, keepdim=True)
    step = above.gather(-1, heads) / draws[heads].clamp(min=1)

    is_head = torch.zeros_like(p).scatter(-1, ids, (places[:-1] < heads).to(p.dtype))
    reached = torch.where(is_head == 1, 0.0, p).cumsum(-1, dtype=torch.float64)
    # The number of positions (uniform + j)·step below the running sum goes up by one where a token is drawn.
    passed = (draws[heads] * reached / reached[:, -1:] - uniforms[:, None]).ceil().clamp(min=0)
    passed = torch.where(reached == reached[:, -1:], draws[heads], passed.nan_to_num(0.0))  # all, however rounded
    drawn = (passed.diff(dim=-1, prepend=torch.zeros_like(passed[:, :1])) > 0) & (reached > 0)
    weights = torch.where(is_head == 1, log_p, torch.where(drawn, step.log().to(p.dtype), -math.inf))
    kept, ids = weights.topk(top.shape[-1], -1)
    entropy = -_weighted(p, log_p).sum(-1)
    broken = log_p[:, :1].isnan()
    return *_in_order(ids, torch.where(broken, math.nan, kept), k), entropy


def _in_order(ids: Tensor, values: Tensor, k: int) -> Pair:
    """The `[rows, k]` tokens by ascending id, those of value −inf as id 0 at the end; NaN rows have ids 0."""
    missing, broken = values == -math.inf, values.isnan()
    order = torch.where(missing, torch.iinfo(torch.int64).max, ids).argsort(-1)
    ids, values = torch.where(missing | broken, 0, ids).gather(-1, order), values.gather(-1, order)
    padding = (0, k - ids.shape[-1])
    pad = torch.nn.functional.pad
    return pad(ids, padding), pad(values, padding, value=-math.inf)
