// One functor per divergence: from the probabilities of a vector of columns to the term and g = dterm/dlog q.
// The skeleton in rows.h does the rest. fastkd/reference.py holds the definitions these must agree with.
//
// g may differ from the derivative by any multiple of q: (g - q G) does not change. Where the derivative is near a
// multiple of q when p is near q, the functor takes that multiple off, so that what remains does not cancel.
//
// `d = log q - log p` comes from the difference of the logits, so the near-equal rows that training ends in keep
// their relative precision; functors therefore work from d and not from log q and log p.
#pragma once
#include "vector.h"

namespace FASTKD_ISA {

// One vector of columns, natural logarithms. Where a logit is -inf its probability is 0, its logarithm -inf, and d is
// infinite (NaN if both are -inf).
struct Cell {
  vec p, q, log_p, log_q, d;
};

struct Pair {
  vec term, g;
};

// q - p where the two nearly cancel.
inline vec probability_gap(const Cell& c) {
  return select(c.d > 0.f, c.q, -c.p) * -expm1_nonpositive(-abs(c.d));
}

// The Kullback-Leibler family closes in one sweep: its value and gradient are linear in sums the statistics sweep takes.
// The functors are for sparse.h, which has no such sums.
struct ForwardKL {
  static constexpr bool forward = true, reverse = false;
  explicit ForwardKL(const double*) {}
  double weight() const { return 1; }
  Pair operator()(const Cell& c) const { return {keep(c.p != 0.f, -c.p * c.d), probability_gap(c)}; }
};

struct ReverseKL {
  static constexpr bool forward = false, reverse = true;
  explicit ReverseKL(const double*) {}
  double weight() const { return 0; }
  Pair operator()(const Cell& c) const {
    const vec term = keep(c.q != 0.f, c.q * c.d);
    return {term, term};
  }
};

struct SymmetricKL {
  static constexpr bool forward = true, reverse = true;
  double w;
  explicit SymmetricKL(const double* parameters) : w(parameters[0]) {}
  double weight() const { return w; }  // of the forward direction
  Pair operator()(const Cell& c) const {
    const Pair forward_pair = ForwardKL(nullptr)(c), reverse_pair = ReverseKL(nullptr)(c);
    const float a = (float)w, b = (float)(1 - w);
    return {a * forward_pair.term + b * reverse_pair.term, a * forward_pair.g + b * reverse_pair.g};
  }
};

// With share = weight for d > 0 and 1 - weight otherwise: log(weight + (1 - weight) e^d) = max(d, 0) + log_mix(d).
// Left in two parts: no overflow, no difference of infinities, and exact in the limit d -> 0. 0 < weight < 1.
inline vec log_mix(vec d, float weight) {
  const vec share = select(d > 0.f, splat(weight), splat(1.f - weight));
  return log1p_nonpositive(share * expm1_nonpositive(-abs(d)));
}

// (e^d - 1) / (weight + (1 - weight) e^d), likewise.
inline vec mix_ratio(vec d, float weight) {
  const vec less = expm1_nonpositive(-abs(d)), share = select(d > 0.f, splat(weight), splat(1.f - weight));
  return select(d > 0.f, -less, less) / (1.f + share * less);
}

struct JSD {
  float beta;
  explicit JSD(const double* parameters) : beta((float)parameters[0]) {}
  Pair operator()(const Cell& c) const {
    const vec mix = log_mix(c.d, beta);  // m = beta p + (1 - beta) q
    const vec q_over_m = min(c.d, vec{}) - mix, m_over_p = max(c.d, vec{}) + mix;  // logarithms
    const vec g = keep(c.q != 0.f, (1.f - beta) * c.q * q_over_m);
    return {g - keep(c.p != 0.f, beta * c.p * m_over_p), g};
  }
};

struct SkewKL {
  float lam;
  explicit SkewKL(const double* parameters) : lam((float)parameters[0]) {}
  Pair operator()(const Cell& c) const {
    const vec term = keep(c.p != 0.f, -c.p * (max(c.d, vec{}) + log_mix(c.d, lam)));
    // dterm/dlog q = -(1 - lam) p q / m, and q (1 - lam) more: 0 where p = q.
    return {term, keep(c.q != 0.f, (1.f - lam) * (1.f - lam) * c.q * mix_ratio(c.d, lam))};
  }
};

struct SkewReverseKL {
  float lam;
  explicit SkewReverseKL(const double* parameters) : lam((float)parameters[0]) {}
  Pair operator()(const Cell& c) const {
    const vec term = keep(c.q != 0.f, -c.q * (max(-c.d, vec{}) + log_mix(-c.d, lam)));
    // dterm/dlog q = term + (1 - lam) p q / m, and -q (1 - lam) more.
    return {term, term + keep(c.q != 0.f, (1.f - lam) * lam * c.q * mix_ratio(-c.d, lam))};
  }
};

struct TVD {
  explicit TVD(const double*) {}
  Pair operator()(const Cell& c) const {
    // The sign comes from d, which is exact where p and q agree to their last bit.
    const vec g = 0.5f * c.q;
    const ivec sign = bits(c.d) & (int32_t)0x80000000;
    return {0.5f * abs(c.p - c.q), keep(c.d != 0.f, from_bits(bits(g) ^ sign))};
  }
};

// e^a - e^b with a - b given apart and accurately; no overflow unless the difference itself is infinite.
inline vec exp_difference(vec a, vec b, vec a_minus_b) {
  const vec magnitude = -exp(max(a, b)) * expm1_nonpositive(-abs(a_minus_b));
  return select(a_minus_b < 0.f, -magnitude, magnitude);
}

struct AlphaBeta {
  float alpha, beta;
  explicit AlphaBeta(const double* parameters) : alpha((float)parameters[0]), beta((float)parameters[1]) {}

  // With P = p^s, Q = q^s, A = p^alpha q^beta and s = alpha + beta, all from logarithms: a small power of a
  // probability that underflows does not.
  Pair operator()(const Cell& c) const {
    const float s = alpha + beta;
    const vec d = keep(~(c.log_p == c.log_q), c.d);  // 0 where both are -inf
    const vec a = scaled(alpha, c.log_p) + scaled(beta, c.log_q);
    const vec p = scaled(s, c.log_p), q = scaled(s, c.log_q);
    if (alpha != 0 && beta != 0 && s != 0) {
      const vec q_less_a = exp_difference(q, a, alpha * d), p_less_a = exp_difference(p, a, -beta * d);
      return {(p_less_a / (beta * s)) + (q_less_a / (alpha * s)), q_less_a / alpha};
    }
    if (alpha == 0 && beta == 0) return {0.5f * d * d, d};
    if (s == 0) {
      const vec g = (1.f - exp(-alpha * d)) / alpha;
      return {(d - g) / alpha, g};
    }
    const vec difference = exp_difference(q, p, s * d);
    if (beta == 0) return {difference / (s * s) - weighted(exp(p), d) / s, difference / s};
    const vec g = weighted(exp(q), d);
    return {g / s - difference / (s * s), g};
  }

 private:
  static vec scaled(float factor, vec x) { return factor == 0 ? vec{} : factor * x; }  // 0 * -inf is 0 here
  static vec weighted(vec weight, vec x) { return keep(weight != 0.f, weight * x); }
};

// Squared error of raw logits: no softmax, and sweeps of its own in rows.h.
struct MSE {
  explicit MSE(const double*) {}
};

// Every divergence once, by the name that users write. When this library is loaded, the names in fastkd/divergences.py
// are looked up here.
#define FASTKD_DIVERGENCES(X)                                                                \
  X(forward_kl, ForwardKL) X(reverse_kl, ReverseKL) X(symmetric_kl, SymmetricKL) X(jsd, JSD) \
  X(skew_kl, SkewKL) X(skew_reverse_kl, SkewReverseKL) X(tvd, TVD) X(alpha_beta, AlphaBeta) X(mse, MSE)

template <class Divergence>
struct Kind {
  using type = Divergence;
};

// `function` of the Kind of that name; `unknown` where there is none.
template <class Result, class Function>
inline Result with_divergence(const char* name, Result unknown, const Function& function) {
#define FASTKD_CASE(known, Divergence) \
  if (strcmp(name, #known) == 0) return function(Kind<Divergence>{});
  FASTKD_DIVERGENCES(FASTKD_CASE)
#undef FASTKD_CASE
  return unknown;
}

inline bool knows(const char* name) {
  return with_divergence(name, false, [](auto) { return true; });
}

}  // namespace FASTKD_ISA
