"""Divergences on the GPU: for each a pair of scalar functions and a row in `DIVERGENCES`.

A pair is `term(p, q, gap, log_p, log_q, d, a, b)`, whose sum over the vocabulary is the divergence, and `slope` of the
same arguments, the derivative of the term with respect to log q. p is the teacher's probability, q the student's,
gap = q − p, d = log q − log p (0 where both probabilities are 0, ±inf where one is), a and b the divergence's
parameters; everything fp32. Where `about_top`, gap and b mean something else: see `Divergence`.

The student-logit gradient is `(slope − q·Σ slope) / temperature`. A multiple of q added to every slope does not change
it. That freedom is used to make slopes vanish where p = q, so that nothing cancels between nearly equal rows.

The Kullback-Leibler family has `close(forward, reverse, a, b) → (value, Σ slope)` in place of a term: both directions
follow from sums that need no normaliser, which saves one sweep over the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# --- elementary functions ---------------------------------------------------------------------------------------
# From basic operations: libdevice exists neither in Triton's interpreter nor in the same form for AMD.


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """e^x − 1 to about 3e-7 of itself."""
    tail = 0.5 + x * (0.166664466 + x * (0.0416659825 + x * (0.00837764330 + x * 0.00139655964)))
    return tl.where(tl.abs(x) < 0.4, x + x * x * tail, exp(x) - 1)


@triton.jit
def log_near_one(x, x_minus_one):
    """log x of a positive x to about 2e-7 of itself, given x − 1 more accurately than x tells it."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # x = 2^e·m with m in [2/3, 4/3): e, where a float has its exponent
    m = (bits - power).to(tl.float32, bitcast=True)
    f = tl.where(tl.abs(x_minus_one) > 0.3, m - 1, x_minus_one)  # NaN chooses x_minus_one, and stays
    tail = -0.164193973 + f * (0.139209390 + f * (-0.153725162 + f * 0.143740639))
    tail = -0.499999404 + f * (0.333331078 + f * (-0.250075966 + f * (0.200160578 + f * tail)))
    return power.to(tl.float32) * (LN2 / 0x800000) + (f + f * f * tail)


@triton.jit
def weighted(probability, value):
    """probability · value, and 0 where the probability is 0 even if the value is infinite there."""
    return tl.where(probability == 0, 0.0, probability * value)


@triton.jit
def probability_gap(p, q, d):
    """q − p where the two nearly cancel."""
    return tl.where(d > 0, -q, p) * expm1(-tl.abs(d))


@triton.jit
def mixture(d, lam):
    """(λp + (1−λ)q) / max(p, q), in (0, 1]."""
    x = exp(-tl.abs(d))
    return lam * tl.where(d > 0, x, 1.0) + (1 - lam) * tl.where(d > 0, 1.0, x)


@triton.jit
def log_mixture(d, lam):
    return log_near_one(mixture(d, lam), tl.where(d > 0, lam, 1 - lam) * expm1(-tl.abs(d)))


@triton.jit
def mixture_gap(d, lam):
    """(q − p) / (λp + (1−λ)q)."""
    e = expm1(-tl.abs(d)) / mixture(d, lam)
    return tl.where(d > 0, -e, e)


# --- Kullback-Leibler family ------------------------------------------------------------------------------------


@triton.jit
def forward_kl_close(forward, reverse, a, b):
    return forward, 0.0


@triton.jit
def forward_kl_slope(p, q, gap, log_p, log_q, d, a, b):
    return gap


@triton.jit
def reverse_kl_close(forward, reverse, a, b):
    return reverse, reverse


@triton.jit
def reverse_kl_slope(p, q, gap, log_p, log_q, d, a, b):
    return weighted(q, d)


@triton.jit
def symmetric_kl_close(forward, reverse, weight, b):
    return weight * forward + (1 - weight) * reverse, (1 - weight) * reverse


@triton.jit
def symmetric_kl_slope(p, q, gap, log_p, log_q, d, weight, b):
    return weight * gap + (1 - weight) * weighted(q, d)


# --- mixtures ---------------------------------------------------------------------------------------------------


@triton.jit
def jsd_term(p, q, gap, log_p, log_q, d, beta, b):
    shared = log_mixture(d, beta)
    to_teacher = weighted(p, tl.maximum(d, 0.0) + shared)
    to_student = weighted(q, tl.maximum(-d, 0.0) + shared)
    return -beta * to_teacher - (1 - beta) * to_student


@triton.jit
def jsd_slope(p, q, gap, log_p, log_q, d, beta, b):
    return (beta - 1) * weighted(q, tl.maximum(-d, 0.0) + log_mixture(d, beta))


@triton.jit
def skew_kl_term(p, q, gap, log_p, log_q, d, lam, ratio):
    return -weighted(p, tl.maximum(d, 0.0) + log_mixture(d, lam))


@triton.jit
def skew_kl_slope(p, q, gap, log_p, log_q, d, lam, ratio):
    """With w = p / m, m the mixture: (1 − λ)·q·(w_top − w), w_top − w being (1 − λ)·w_top·(q − ratio·p) / m.

    In rows that are nearly equal, w is near 1 throughout. Where the student is sure of a token that the teacher is not
    sure of, w is near 0 at the student's top. Only the constant w_top keeps the digits of both.
    """
    scale = (1 - lam) * (1 - lam) / (lam + (1 - lam) * ratio)
    return scale * gap * (q / tl.maximum(lam * p + (1 - lam) * q, 1e-37))


@triton.jit
def skew_reverse_kl_term(p, q, gap, log_p, log_q, d, lam, b):
    return -weighted(q, tl.maximum(-d, 0.0) + log_mixture(-d, lam))


@triton.jit
def skew_reverse_kl_slope(p, q, gap, log_p, log_q, d, lam, b):
    falling = tl.maximum(-d, 0.0) + log_mixture(-d, lam)
    return weighted(q, lam * (1 - lam) * mixture_gap(-d, lam) - falling)


# --- others -----------------------------------------------------------------------------------------------------


@triton.jit
def tvd_term(p, q, gap, log_p, log_q, d, a, b):
    return -0.5 * tl.maximum(p, q) * expm1(-tl.abs(d))


@triton.jit
def tvd_slope(p, q, gap, log_p, log_q, d, a, b):
    return 0.5 * tl.where(d > 0, q, tl.where(d < 0, -q, 0.0))


@triton.jit
def squared_hellinger_term(p, q, gap, log_p, log_q, d, a, b):
    root = expm1(-0.5 * tl.abs(d))
    return 0.5 * weighted(tl.maximum(p, q), root * root)


@triton.jit
def squared_hellinger_slope(p, q, gap, log_p, log_q, d, a, b):
    return weighted(q, -0.5 * expm1(-0.5 * d))


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
def alpha_beta_larger(log_p, log_q, alpha, beta):
    """The larger of the first two exponents."""
    return tl.maximum(weighted(alpha + beta, log_q), weighted(alpha, log_p) + weighted(beta, log_q))


@triton.jit
def alpha_beta_term(p, q, gap, log_p, log_q, d, alpha, beta):
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
    `about_top`, b is not a parameter but the ratio q / p of the student's likeliest token, and gap = q − b·p. `vectors`
    is an argument of `launch.block_for`: what a thread computes at once must fit into its registers.
    """

    term: Any
    slope: Any
    sweeps: str = "normalised"
    forward: bool = False
    reverse: bool = False
    about_top: bool = False
    vectors: int = 2


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl_close, forward_kl_slope, "closed", forward=True),
    "reverse_kl": Divergence(reverse_kl_close, reverse_kl_slope, "closed", reverse=True),
    "symmetric_kl": Divergence(symmetric_kl_close, symmetric_kl_slope, "closed", forward=True, reverse=True),
    "jsd": Divergence(jsd_term, jsd_slope),
    "skew_kl": Divergence(skew_kl_term, skew_kl_slope, about_top=True, vectors=1),
    "skew_reverse_kl": Divergence(skew_reverse_kl_term, skew_reverse_kl_slope),
    "tvd": Divergence(tvd_term, tvd_slope),
    "squared_hellinger": Divergence(squared_hellinger_term, squared_hellinger_slope),
    "alpha_beta": Divergence(alpha_beta_term, alpha_beta_slope, vectors=1),
    "mse": Divergence(mse_term, mse_slope, "raw"),
}
