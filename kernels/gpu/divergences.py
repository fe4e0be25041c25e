"""Divergences on the GPU: for each a pair of scalar functions and a row in `DIVERGENCES`.

A pair is `term(p, q, gap, log_p, log_q, d, a, b)`, whose sum over the vocabulary is the divergence, and `slope` of the
same arguments, the derivative of the term with respect to log q. p is the teacher's probability, q the student's,
gap = q − p, d = log q − log p (±inf where one probability is 0; where both are, NaN or 0, and log p = log q = 0), a and
b the divergence's parameters; everything fp32. Where `about_top`, b means something else: see `Divergence`.

The student-logit gradient is `(slope − q·Σ slope) / temperature`. A multiple of q added to every slope does not change
it. That freedom is used to make slopes vanish where p = q, so that nothing cancels between nearly equal rows.

The Kullback-Leibler family has `close(forward, reverse, a, b) → (value, Σ slope)` in place of a term: both directions
follow from sums that need no normaliser, which saves one sweep over the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.gpu.elementary import LN2, exp, expm1, log2, log_near_one, reciprocal, weighted

# --- what several divergences are made of -----------------------------------------------------------------------


@triton.jit
def bounded(d):
    """d between ±80, where e^d is a number and nothing beside 1; something between them where d is NaN.

    That is where both probabilities are 0. Another NaN is one of p and q too.
    """
    return tl.clamp(d, -80.0, 80.0)


@triton.jit
def probability_gap(p, q, d):
    """q − p where the two nearly cancel."""
    d = bounded(d)
    return tl.where(d > 0, -q, p) * expm1(-tl.abs(d))


class Mixture(NamedTuple):
    """m = λp + μq, λ + μ = 1, of tokens of which d is known."""

    d: Any  # bounded
    near: Any  # p ≈ q: log (m / q) is a power series of d, for there a logarithm has few digits
    ratio: Any  # min(p, q) / max(p, q)
    log_share: Any  # log2 (m / max(p, q))


@triton.jit
def mixture(d, lam, mu):
    d = bounded(d)
    ratio = exp(-tl.abs(d))
    share = tl.where(d > 0, lam * ratio + mu, mu * ratio + lam)
    return Mixture(d, tl.abs(d) < 0.5, ratio, log2(share))


@triton.jit
def cumulants(lam, mu):
    """The first eight of a choice between 0 and 1, 1 with probability λ: log (μ + λe^t) = Σ κₙ tⁿ / n!."""
    v = lam * mu
    s = mu - lam
    return (
        lam,
        v,
        v * s,
        v * (1 - 6 * v),
        v * s * (1 - 12 * v),
        v * (1 - v * (30 - 120 * v)),
        v * s * (1 - v * (60 - 360 * v)),
        v * (1 - v * (126 - v * (1680 - 5040 * v))),
    )


@triton.jit
def series(t, c1, c2, c3, c4, c5, c6, c7):
    """Σ cₙ tⁿ / n!"""
    tail = c4 * (1 / 24) + t * (c5 * (1 / 120) + t * (c6 * (1 / 720) + t * (c7 * (1 / 5040))))
    return t * (c1 + t * (c2 * (1 / 2) + t * (c3 * (1 / 6) + t * tail)))


@triton.jit
def log_over_student(m, lam, mu):
    """log (m / q), to 5e-7 of itself near p = q and to 2e-7 elsewhere."""
    k1, k2, k3, k4, k5, k6, k7, _ = cumulants(lam, mu)
    return tl.where(m.near, series(-m.d, k1, k2, k3, k4, k5, k6, k7), m.log_share * LN2 + tl.maximum(-m.d, 0.0))


@triton.jit
def log_over_teacher(m, lam, mu):
    """log (m / p) likewise."""
    k1, k2, k3, k4, k5, k6, k7, _ = cumulants(lam, mu)
    near = series(-m.d, k1, k2, k3, k4, k5, k6, k7) + m.d
    return tl.where(m.near, near, m.log_share * LN2 + tl.maximum(m.d, 0.0))


# --- Kullback-Leibler family ------------------------------------------------------------------------------------


@triton.jit
def forward_kl_term(p, q, gap, log_p, log_q, d, a, b):
    return -weighted(p, d)


@triton.jit
def forward_kl_close(forward, reverse, a, b):
    return forward, 0.0


@triton.jit
def forward_kl_slope(p, q, gap, log_p, log_q, d, a, b):
    return gap


@triton.jit
def reverse_kl_term(p, q, gap, log_p, log_q, d, a, b):
    return weighted(q, d)


@triton.jit
def reverse_kl_close(forward, reverse, a, b):
    return reverse, reverse


@triton.jit
def reverse_kl_slope(p, q, gap, log_p, log_q, d, a, b):
    return weighted(q, d)


@triton.jit
def symmetric_kl_term(p, q, gap, log_p, log_q, d, weight, b):
    return (1 - weight) * weighted(q, d) - weight * weighted(p, d)


@triton.jit
def symmetric_kl_close(forward, reverse, weight, b):
    return weight * forward + (1 - weight) * reverse, (1 - weight) * reverse


@triton.jit
def symmetric_kl_slope(p, q, gap, log_p, log_q, d, weight, b):
    return weight * gap + (1 - weight) * weighted(q, d)


# --- mixtures ---------------------------------------------------------------------------------------------------


@triton.jit
def jsd_term(p, q, gap, log_p, log_q, d, beta, b):
    m = mixture(d, beta, 1 - beta)
    to_student = q * log_over_student(m, beta, 1 - beta)
    return (beta - 1) * to_student - beta * (p * log_over_teacher(m, beta, 1 - beta))


@triton.jit
def jsd_slope(p, q, gap, log_p, log_q, d, beta, b):
    return (beta - 1) * (q * log_over_student(mixture(d, beta, 1 - beta), beta, 1 - beta))


@triton.jit
def skew_kl_term(p, q, gap, log_p, log_q, d, lam, ratio):
    return -p * log_over_teacher(mixture(d, lam, 1 - lam), lam, 1 - lam)


@triton.jit
def skew_kl_slope(p, q, gap, log_p, log_q, d, lam, ratio):
    """With w = p / m, m the mixture: (1 − λ)·q·(w_top − w), w_top − w being (1 − λ)·w_top·(q − ratio·p) / m.

    In rows that are nearly equal, w is near 1 throughout. Where the student is sure of a token that the teacher is not
    sure of, w is near 0 at the student's top. Only the constant w_top keeps the digits of both.
    """
    scale = (1 - lam) * (1 - lam) / (lam + (1 - lam) * ratio)
    # q − ratio·p cancels, too, where p and q are equal and their rows' sums are not.
    gap = probability_gap(ratio * p, q, d - log_near_one(ratio, ratio - 1))
    return scale * gap * (q * reciprocal(tl.maximum(lam * p + (1 - lam) * q, 1e-37)))


@triton.jit
def skew_reverse_kl_term(p, q, gap, log_p, log_q, d, lam, b):
    return -q * log_over_student(mixture(d, 1 - lam, lam), 1 - lam, lam)


@triton.jit
def skew_reverse_kl_slope(p, q, gap, log_p, log_q, d, lam, b):
    """q·(λ·(p − m) / m − log (m / q)), both of which fall from (1 − λ)·d: near p = q their series are one."""
    mu = lam
    lam = 1 - lam
    m = mixture(d, lam, mu)
    _, k2, k3, k4, k5, k6, k7, k8 = cumulants(lam, mu)
    near = series(-m.d, -lam * lam, k3 - k2, k4 - k3, k5 - k4, k6 - k5, k7 - k6, k8 - k7)
    gap_share = (1 - m.ratio) * tl.exp2(-m.log_share)  # |p − q| / m
    gap_share = tl.where(m.d > 0, -gap_share, gap_share)
    far = lam * mu * gap_share - (m.log_share * LN2 + tl.maximum(-m.d, 0.0))
    return q * tl.where(m.near, near, far)


# --- others -----------------------------------------------------------------------------------------------------


@triton.jit
def tvd_term(p, q, gap, log_p, log_q, d, a, b):
    return -0.5 * tl.maximum(p, q) * expm1(-tl.abs(bounded(d)))


@triton.jit
def tvd_slope(p, q, gap, log_p, log_q, d, a, b):
    return 0.5 * tl.where(d > 0, q, tl.where(d < 0, -q, 0.0))


@triton.jit
def squared_hellinger_term(p, q, gap, log_p, log_q, d, a, b):
    root = expm1(-0.5 * tl.abs(bounded(d)))
    return 0.5 * tl.maximum(p, q) * root * root


@triton.jit
def squared_hellinger_slope(p, q, gap, log_p, log_q, d, a, b):
    return q * (-0.5 * expm1(-0.5 * bounded(d)))


# With s = α + β the α-β term is d² exp[s·log q, α·log p + β·log q, s·log p] and its slope d exp[s·log q, α·log p +
# β·log q], where exp[…] is the divided difference of exp. The three lie 0, α·d and s·d below the first: no difference
# of powers is divided by a parameter, so α, β and s may be 0, or nearly 0, without loss.


@triton.jit
def inverse(rate):
    return tl.where(rate < 1e-30, 0.0, 1 / rate)


@triton.jit
def decline(rate, inverse_rate, size):
    """(1 − e^(−rate·size)) / rate, and `size` where the rate is 0."""
    return tl.where(inverse_rate == 0, size, expm1(-rate * size) * -inverse_rate)


@triton.jit
def alpha_beta_gap(log_p, log_q, d):
    """d, and 0 where both probabilities are 0. Another NaN stays: the logarithms' larger one may not show it."""
    return tl.where(log_p + log_q == 0, 0.0, d)


@triton.jit
def alpha_beta_larger(log_p, log_q, alpha, beta):
    """The larger of the first two exponents."""
    return tl.maximum(weighted(alpha + beta, log_q), weighted(alpha, log_p) + weighted(beta, log_q))


@triton.jit
def alpha_beta_term(p, q, gap, log_p, log_q, d, alpha, beta):
    d = alpha_beta_gap(log_p, log_q, d)
    total = alpha + beta
    x, y, z = tl.abs(alpha), tl.abs(beta), tl.abs(total)  # the rates of the exponents' three distances
    span = tl.maximum(tl.maximum(x, y), z)
    outer_total = z == span
    outer_alpha = (x == span) & (z < span)
    # From the largest exponent to the next and then to the last, if the first of the outermost two is the largest;
    # otherwise the other way round.
    first = tl.where(outer_alpha, z, x)
    second = tl.where(outer_total | outer_alpha, y, z)
    falling = tl.where(outer_total, total, tl.where(outer_alpha, alpha, beta)) * d > 0
    next = tl.where(falling, first, second)
    last = tl.where(falling, second, first)
    inverse_next = tl.where(falling, inverse(first), inverse(second))
    inverse_last = tl.where(falling, inverse(second), inverse(first))

    size = tl.abs(d)
    u = weighted(next, size)
    v = weighted(span, size)
    far = decline(next, inverse_next, size) - weighted(exp(-u), decline(last, inverse_last, size))
    # The same where that cancels: Σ (−1)^k h_k(u, v) / (k + 2)!, with h_k the sum of all products of k of the two.
    inner = 0.0
    series = 0.0
    coefficient = 1 / 5040
    for k in tl.static_range(5, -1, -1):
        inner = coefficient - u * inner
        series = inner - v * series
        coefficient *= k + 2
    largest = tl.maximum(alpha_beta_larger(log_p, log_q, alpha, beta), weighted(total, log_p))
    return weighted(exp(largest), tl.where(v < 0.25, size * size * series, far * inverse(span)))


@triton.jit
def alpha_beta_slope(p, q, gap, log_p, log_q, d, alpha, beta):
    d = alpha_beta_gap(log_p, log_q, d)
    larger = alpha_beta_larger(log_p, log_q, alpha, beta)
    rate = tl.abs(alpha)
    slope = weighted(exp(larger), decline(rate, inverse(rate), tl.abs(d)))
    return tl.where(d < 0, -slope, slope)


@triton.jit
def mse_term(p, q, gap, log_p, log_q, d, a, b):
    return d * d


@triton.jit
def mse_slope(p, q, gap, log_p, log_q, d, a, b):
    return 2 * d


@dataclass(frozen=True)
class Divergence:
    """A pair, and which sweeps the kernels must make for it.

    `sweeps` is "closed" (`term` is a `close`; `forward` and `reverse` say which sums it uses), "normalised" (both
    softmaxes must be known before the term) or "raw" (d is the difference of logits; there is no softmax). Where
    `about_top`, b is not a parameter but the ratio q / p of the student's likeliest token. `vectors` is an argument of
    `launch.block_for`: what a thread computes at once must fit into its registers. `beside` is the term of a closed
    divergence in a mix with others.
    """

    term: Any
    slope: Any
    sweeps: str = "normalised"
    forward: bool = False
    reverse: bool = False
    about_top: bool = False
    vectors: int = 2
    beside: Any = None

    @property
    def in_mix(self) -> Any:
        """The term, where this is a part of a mix whose sweeps are "normalised"."""
        return self.beside or self.term


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl_close, forward_kl_slope, "closed", forward=True, beside=forward_kl_term),
    "reverse_kl": Divergence(reverse_kl_close, reverse_kl_slope, "closed", reverse=True, beside=reverse_kl_term),
    "symmetric_kl": Divergence(
        symmetric_kl_close, symmetric_kl_slope, "closed", forward=True, reverse=True, beside=symmetric_kl_term
    ),
    "jsd": Divergence(jsd_term, jsd_slope),
    "skew_kl": Divergence(skew_kl_term, skew_kl_slope, about_top=True, vectors=1),
    "skew_reverse_kl": Divergence(skew_reverse_kl_term, skew_reverse_kl_slope),
    "tvd": Divergence(tvd_term, tvd_slope),
    "squared_hellinger": Divergence(squared_hellinger_term, squared_hellinger_slope),
    "alpha_beta": Divergence(alpha_beta_term, alpha_beta_slope, vectors=1),
    "mse": Divergence(mse_term, mse_slope, "raw"),
}
