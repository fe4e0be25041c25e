// One functor per divergence. A divergence is a sum over columns of a term, which depends on the column's own p
// (teacher) and q (student) alone. The functor takes a vector of columns and returns the terms and their derivatives
// g = dterm/dlog q. The sweeps sum the terms and turn g into the gradient by the logits, (g - q * (sum of g)) / T. The
// definitions are those of fastkd/reference.py.
//
// To add a divergence, add two things to this file. No other header changes.
//   - A functor; JSD shows all that it needs. Its constructor takes the divergence's parameters, in the order of the
//     fields in fastkd/divergences.py, at most two. `canonical` there has replaced limits that equal another
//     divergence. Its operator()(const Cell&) returns a Pair, or a Ratio if g / q is bounded.
//   - Its name in FASTKD_DIVERGENCES below. A library that lacks a name of fastkd/divergences.py is refused when it is
//     loaded. (Leave `normalised` true in that table: where rows come in tiles, it asks for the functor's sweep.)
// Then rebuild: pip install --editable . It can be a part of a mix (mix.h) without more.
//
// What a functor must get right, and tests judge against float64:
//   - Rows that nearly agree, as they do late in training. Work from `d = log q - log p`. It comes from the difference
//     of the logits and keeps its relative precision, while log_q - log_p and q - p cancel.
//   - Columns with p = 0 or q = 0. Beside a logit of -inf, d is infinite; a probability that underflowed is 0 beside a
//     finite logarithm. Give each product with a zero its limit, by `keep`, since 0 times infinity is NaN. Columns that
//     are -inf on both sides are left out by the sweeps.
//   - A NaN in a logit must reach the term.
//   - g may differ from the derivative by any multiple of q, because the gradient g - q * (sum of g) stays the same. If
//     the derivative is near a multiple of q where p is near q, subtract that multiple: what remains does not cancel.
#pragma once
#include "vector.h"

#include <type_traits>

namespace FASTKD_ISA {

// One vector of columns. Logarithms are natural. Where a logit is -inf, its probability is 0, its logarithm is -inf
// and d is infinite (NaN where both logits are -inf).
struct Cell {
  vec p, q, log_p, log_q, d;
};

// What a functor returns.
struct Pair {
  vec term, g;
};

// What it returns instead if ratio = g / q is bounded, or nearly so. Centred then subtracts from the ratio, before the
// product with q is rounded.
struct Ratio {
  vec term, ratio;
};

// The form that a functor takes on a row whose likeliest column, for the student, is this cell. Overload it for a
// functor that needs more than one form.
template <class Divergence>
inline Divergence centred_at(const Divergence& divergence, const Cell&) {
  return divergence;
}

// q - p. Where the two nearly cancel it is computed from d.
inline vec probability_gap(const Cell& c) {
  const vec y = c.d * kLog2e;
  return select(abs(y) <= 0.5f, c.p * (y * expm1_poly(y)), c.q - c.p);
}

// The Kullback-Leibler family needs no sweep 2: its value and gradient are linear in sums that sweep 1 takes.
// `forward` and `reverse` say which of these sums, and mark the family; the weights are those of the two directions. The
// functors serve sparse.h, which takes no such sums, and mixes with divergences of other families.
struct ForwardKL {
  static constexpr bool forward = true, reverse = false;
  double weight = 1;
  explicit ForwardKL(const double*) {}
  double forward_weight() const { return weight; }
  double reverse_weight() const { return 0; }
  Pair operator()(const Cell& c) const {
    const float w = (float)weight;
    return {w * keep(c.p != 0.f, -c.p * c.d), w * probability_gap(c)};
  }
};

struct ReverseKL {
  static constexpr bool forward = false, reverse = true;
  double weight = 1;
  explicit ReverseKL(const double*) {}
  double forward_weight() const { return 0; }
  double reverse_weight() const { return weight; }
  Pair operator()(const Cell& c) const {
    const vec term = (float)weight * keep(c.q != 0.f, c.q * c.d);
    return {term, term};
  }
};

struct SymmetricKL {
  static constexpr bool forward = true, reverse = true;
  ForwardKL forward_kl{nullptr};
  ReverseKL reverse_kl{nullptr};
  explicit SymmetricKL(const double* parameters) : SymmetricKL(parameters[0], 1 - parameters[0]) {}
  SymmetricKL(double forward_weight, double reverse_weight) {
    forward_kl.weight = forward_weight, reverse_kl.weight = reverse_weight;
  }
  double forward_weight() const { return forward_kl.weight; }
  double reverse_weight() const { return reverse_kl.weight; }
  Pair operator()(const Cell& c) const {
    Pair total{};
    // A direction without weight is left out: it may be infinite.
    if (forward_kl.weight != 0) total = forward_kl(c);
    if (reverse_kl.weight != 0) {
      const Pair pair = reverse_kl(c);
      total = {total.term + pair.term, total.g + pair.g};
    }
    return total;
  }
};

// Which of the Kullback-Leibler family's sums a divergence needs: neither, unless it says so.
template <class Divergence, class = void>
struct CrossSums {
  static constexpr bool forward = false, reverse = false;
};
template <class Divergence>
struct CrossSums<Divergence, std::void_t<decltype(Divergence::forward)>> {
  static constexpr bool forward = Divergence::forward, reverse = Divergence::reverse;
};

// log(weight + (1 - weight) e^d) = max(d, 0) + log_mix(d), for 0 < weight < 1. The two parts stay apart: nothing
// overflows, no infinities are subtracted, and log_mix keeps its relative precision as d -> 0.
inline vec log_mix(vec d, float weight) {
  const vec share = select(d > 0.f, splat(weight), splat(1.f - weight));
  return log1p(share * expm1_nonpositive(-abs(d)));
}

// (e^d - 1) / (weight + (1 - weight) e^d), with the same properties.
inline vec mix_ratio(vec d, float weight) {
  const vec change = expm1_nonpositive(-abs(d)), share = select(d > 0.f, splat(weight), splat(1.f - weight));
  return select(d > 0.f, -change, change) / (1.f + share * change);
}

struct JSD {
  float beta;
  explicit JSD(const double* parameters) : beta((float)parameters[0]) {}
  Ratio operator()(const Cell& c) const {
    const vec mix = log_mix(c.d, beta);  // m = beta p + (1 - beta) q
    const vec q_over_m = min(c.d, vec{}) - mix, m_over_p = max(c.d, vec{}) + mix;  // logarithms
    const vec ratio = (1.f - beta) * q_over_m;
    return {keep(c.q != 0.f, c.q * ratio) - keep(c.p != 0.f, beta * c.p * m_over_p), ratio};
  }
};

struct SkewKL {
  float lam;
  bool far = false;
  explicit SkewKL(const double* parameters) : lam((float)parameters[0]) {}

  // dterm/dlog q = -(1 - lam) q w with w = p / m. A constant may be subtracted from w, and w - 1 is exact near p = q.
  // `far`: the student is sure of a token and the teacher is not. Then w, near 0 in its column, would drown in w - 1.
  Ratio operator()(const Cell& c) const {
    const vec term = keep(c.p != 0.f, -c.p * (max(c.d, vec{}) + log_mix(c.d, lam)));
    const vec w = far ? c.p / (lam * c.p + (1.f - lam) * c.q) : (lam - 1.f) * mix_ratio(c.d, lam);
    return {term, (lam - 1.f) * w};
  }
};

inline SkewKL centred_at(const SkewKL& divergence, const Cell& top) {
  SkewKL result = divergence;
  const float w = top.p[0] / (result.lam * top.p[0] + (1.f - result.lam) * top.q[0]);
  result.far = !(w > 0.5f && w < 2.f);
  return result;
}

struct SkewReverseKL {
  float lam;
  explicit SkewReverseKL(const double* parameters) : lam((float)parameters[0]) {}
  Ratio operator()(const Cell& c) const {
    const vec m_over_q = max(-c.d, vec{}) + log_mix(-c.d, lam);  // a logarithm
    // dterm/dlog q = term + (1 - lam) q p / m. Subtracted from it: (1 - lam) q.
    return {keep(c.q != 0.f, -c.q * m_over_q), (1.f - lam) * lam * mix_ratio(-c.d, lam) - m_over_q};
  }
};

struct TVD {
  explicit TVD(const double*) {}
  Ratio operator()(const Cell& c) const {
    // The sign comes from d, which is exact where p and q agree to their last bit.
    const ivec sign = bits(c.d) & (int32_t)0x80000000;
    return {0.5f * abs(c.p - c.q), keep(c.d != 0.f, from_bits(bits(splat(0.5f)) ^ sign))};
  }
};

struct SquaredHellinger {
  float top_d = 0;  // d in the student's likeliest column
  explicit SquaredHellinger(const double*) {}

  // dterm/dlog q = q (1 - e^(-d/2)) / 2. What is returned, q (e^(-top_d/2) - e^(-d/2)) / 2, differs from it by a
  // multiple of q and is 0 in the likeliest column. It is the larger power times 1 minus a ratio: nothing cancels.
  Ratio operator()(const Cell& c) const {
    const vec larger = max(c.p, c.q), root = expm1_nonpositive(-0.5f * abs(c.d));
    const vec power = exp(-0.5f * min(c.d, splat(top_d))), less = expm1_nonpositive(-0.5f * abs(c.d - top_d));
    return {keep(larger != 0.f, 0.5f * larger * root * root),
            select(c.d > top_d, splat(-0.5f), splat(0.5f)) * power * less};
  }
};

inline SquaredHellinger centred_at(const SquaredHellinger& divergence, const Cell& top) {
  SquaredHellinger result = divergence;
  result.top_d = top.d[0] < 1e30f ? top.d[0] : 1e30f;  // infinite where the teacher has no such token
  return result;
}

// With s = alpha + beta the term is d^2 exp[s log q, alpha log p + beta log q, s log p] and its derivative
// d exp[s log q, alpha log p + beta log q], where exp[...] is the divided difference of exp at these points. They lie
// 0, alpha d and s d below the first. Nothing is divided by a parameter, so alpha, beta or s may be 0, or nearly 0.
struct AlphaBeta {
  struct Rate {
    float rate, inverse;  // of a rate of 0: 0
    explicit Rate(double of) : rate((float)of), inverse(of == 0 ? 0.f : (float)(1 / of)) {}
  };
  // For one sign of d: the largest of the three points as a combination of log p and log q, and how far the next and
  // the last are below it, per |d|. The derivative is a divided difference between two of the points. `upper` and
  // `lower` are the weights that the differences between largest and next, and between next and last, have in it.
  struct Side {
    float top_p, top_q;
    Rate next, gap, last;  // gap = last - next
    float upper, lower;
  };
  Side rising, falling;

  explicit AlphaBeta(const double* parameters)
      : rising(side(parameters[0], parameters[1], 1)), falling(side(parameters[0], parameters[1], -1)) {}

  Pair operator()(const Cell& c) const {
    const vec d = keep(~(c.log_p == c.log_q), c.d), size = abs(d);  // 0 where both are -inf
    const ivec up = d > 0.f;
    const auto of = [&](float r, float f) { return select(up, splat(r), splat(f)); };
    const vec largest = exp(weighted(of(rising.top_p, falling.top_p), c.log_p) +
                            weighted(of(rising.top_q, falling.top_q), c.log_q));
    const vec next = of(rising.next.rate, falling.next.rate), gap = of(rising.gap.rate, falling.gap.rate);
    const vec u = weighted(next, size), v = weighted(of(rising.last.rate, falling.last.rate), size);
    // |d| times the divided difference of the first two points, and of the last two, both over `largest`.
    const Decay to_next = decay(-u);
    const vec first = select(next == 0.f, size, to_next.minus_one * -of(rising.next.inverse, falling.next.inverse));
    const vec across = expm1_nonpositive(-gap * size) * -of(rising.gap.inverse, falling.gap.inverse);
    const vec second = weighted(to_next.power, select(gap == 0.f, size, across));
    // That of all three: by the recurrence, or by its series where the recurrence cancels.
    vec inner{}, series{};
    constexpr float factorials[] = {5e-1f,          1.6666667e-1f,  4.1666668e-2f,  8.3333338e-3f,
                                    1.3888889e-3f,  1.9841270e-4f,  2.4801588e-5f,  2.7557319e-6f};
    for (int k = 7; k >= 0; k--) inner = factorials[k] - u * inner, series = inner - v * series;
    const vec far = (first - second) * of(rising.last.inverse, falling.last.inverse);
    const vec all_three = select(v < 0.5f, size * size * series, far);
    const vec two =
        weighted(of(rising.upper, falling.upper), first) + weighted(of(rising.lower, falling.lower), second);
    const vec g = weighted(largest, two);
    return {weighted(largest, all_three), select(up, g, -g)};
  }

 private:
  // 0 where the weight is 0, whatever x is there.
  static vec weighted(vec weight, vec x) { return keep(weight != 0.f, weight * x); }

  static Side side(double alpha, double beta, double sign) {
    const double s = alpha + beta;
    const double below[] = {0, sign * alpha, sign * s}, by_p[] = {0, alpha, s}, by_q[] = {s, beta, 0};
    int order[] = {0, 1, 2};  // of the points, from the largest: sorted by comparing neighbours
    const int passes[] = {0, 1, 0};
    for (int pair : passes) {
      if (below[order[pair + 1]] >= below[order[pair]]) continue;
      const int larger = order[pair + 1];
      order[pair + 1] = order[pair], order[pair] = larger;
    }
    const double top = below[order[0]], next = below[order[1]], last = below[order[2]];
    const double upper = order[2] == 2 ? 1 : order[0] == 2 ? 0 : (next - top) / (last - top);
    return {(float)by_p[order[0]], (float)by_q[order[0]], Rate(next - top), Rate(last - next), Rate(last - top),
            (float)upper, (float)(1 - upper)};
  }
};

// A functor whose g is 0 in the student's likeliest column, `top`, because a multiple of q is subtracted. Otherwise, in
// a confident row, that column's gradient would be the rounding error of g - q * (sum of g), which almost cancel.
template <class Divergence>
struct Centred {
  Divergence divergence;
  float center, rest;  // the multiple is the sum of both: `rest` is what rounding to `center` lost

  Centred(const Divergence& of, const Cell& top) : divergence(centred_at(of, top)) {
    const double exactly = at(divergence(top), top);
    const bool finite = exactly - exactly == 0;  // otherwise the divergence is infinite there
    center = finite ? (float)exactly : 0, rest = finite ? (float)(exactly - center) : 0;
  }
  Pair operator()(const Cell& c) const { return centred(divergence(c), c); }

 private:
  static double at(const Pair& pair, const Cell& top) { return (double)pair.g[0] / top.q[0]; }
  static double at(const Ratio& pair, const Cell&) { return pair.ratio[0]; }
  Pair centred(const Pair& pair, const Cell& c) const { return {pair.term, (pair.g - center * c.q) - rest * c.q}; }
  Pair centred(const Ratio& pair, const Cell& c) const {
    return {pair.term, keep(c.q != 0.f, c.q * (pair.ratio - center))};
  }
};

// Squared error of raw logits. It has no softmax and so no functor: the sweeps know it.
struct MSE {
  explicit MSE(const double*) {}
};

// Every divergence, by the name that users write: the one list of them in C++. When the library is loaded, each name of
// fastkd/divergences.py is looked up here.
#define FASTKD_KL(X) X(forward_kl, ForwardKL) X(reverse_kl, ReverseKL) X(symmetric_kl, SymmetricKL)
#define FASTKD_FUNCTORS(X)                                                         \
  X(jsd, JSD) X(skew_kl, SkewKL) X(skew_reverse_kl, SkewReverseKL) X(tvd, TVD)     \
  X(squared_hellinger, SquaredHellinger) X(alpha_beta, AlphaBeta)
#define FASTKD_DIVERGENCES(X) FASTKD_KL(X) FASTKD_FUNCTORS(X) X(mse, MSE)

// A type passed as a value, to a generic lambda.
template <class Divergence>
struct Kind {
  using type = Divergence;
};

// Calls `function` with the Kind of that name. Returns `unknown` if there is none.
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
