// A small vector layer on GNU vector extensions, FASTKD_LANES floats per vector. The compiler brings the arithmetic
// operators. This file adds loads, selects, reductions and the few elementary functions that the divergences need.
//
// a * b + c contracts to one fused multiply-add (-ffp-contract=fast). The accuracy stated below depends on that.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace FASTKD_ISA {

constexpr int lanes = FASTKD_LANES;
typedef float vec __attribute__((vector_size(4 * FASTKD_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * FASTKD_LANES)));

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr double log2e = 1.4426950408889634, ln2 = 0.69314718055994530942;

inline vec splat(float x) { return x - vec{}; }

inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

inline ivec bits(vec v) { return (ivec)v; }
inline vec from_bits(ivec v) { return (vec)v; }

// Whether the mask holds in any lane.
inline bool any(ivec mask) {
#if defined(__AVX512F__) && FASTKD_LANES == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && FASTKD_LANES == 8
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < lanes; i++) found |= mask[i];
  return found != 0;
#endif
}

inline vec select(ivec mask, vec a, vec b) { return mask ? a : b; }
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec min(vec a, vec b) { return a < b ? a : b; }
inline vec abs(vec a) { return from_bits(bits(a) & 0x7fffffff); }
// `value` where the mask holds, +0 elsewhere, whatever `value` is there: an infinity or NaN does not leak.
inline vec keep(ivec mask, vec value) { return mask ? value : vec{}; }

// Reductions halve the vector, so that they take log2(lanes) dependent steps.
inline float sum(vec v) {
  float x[lanes];
  store(x, v);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

inline float largest(vec v) {
  float x[lanes];
  store(x, v);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

// 2^f - 1 = f * expm1_poly(f) on [-1/2, 1/2], relative error 1e-7. Coefficients from the highest power to the lowest.
constexpr float kExpm1[] = {1.534581243e-04f, 1.339993090e-03f, 9.618489072e-03f,
                            5.550328642e-02f, 2.402264625e-01f, 6.931471825e-01f};
inline vec expm1_poly(vec f) {
  vec p = splat(kExpm1[0]);
  for (int i = 1; i < 6; i++) p = p * f + kExpm1[i];
  return p;
}

// y = n + f with n an integer and |f| <= 1/2, for |y| < 2^21. `scale` is 2^n for -126 <= n <= 127. Adding 1.5 * 2^23
// leaves n in the low bits of the float, and adding 127 makes it an exponent. A NaN survives in f.
struct Split {
  vec f, scale;
};
constexpr float kSplit = 12582912.f + 127;
inline Split split(vec y) {
  const vec shifted = y + kSplit;
  return {y - (shifted - kSplit), from_bits(bits(shifted) << 23)};
}

// 2^y for y <= 0 (a rounding error above 0 is harmless). A result below 2^-125 is exactly 0, so that `p != 0` is a safe
// test. NaN stays NaN.
inline vec exp2_nonpositive(vec y) {
  const Split s = split(y);
  const vec power = (s.f * expm1_poly(s.f) + 1.f) * s.scale;
  return y < -125.f ? vec{} : power;
}

// What the logits z of a row are exponentiated by: y = (z - max) * scale, with scale = log2(e)/T. 2^y is 0 further than
// `farthest` below `max`, as in exp2_nonpositive.
struct Peak {
  vec max, scale, farthest;
  // `farthest` is finite, so that a logit of -inf is beyond it at any temperature.
  Peak(float max, float scale)
      : max(splat(max)), scale(splat(scale)), farthest(splat(scale > 1e-36f ? 125.f / scale : 1e38f)) {}
};

// 2^y of `count` vectors of logits, as exp2_nonpositive, but the product with the scale is not rounded. The steps of
// the vectors alternate: each waits for the one before, and a processor does not see far enough ahead to find another
// vector's.
template <int count>
struct Exponentials {
  vec below[count], scale[count];  // max - z
  ivec counted[count];             // where 2^y is not 0
  vec power[count];

  void set(int k, const Peak& peak, vec z) {
    below[k] = peak.max - z, scale[k] = peak.scale;
    counted[k] = ~(below[k] > peak.farthest);
  }

  void compute() {
    vec shifted[count], f[count];
    for (int k = 0; k < count; k++) shifted[k] = kSplit - below[k] * scale[k];
    for (int k = 0; k < count; k++) f[k] = (kSplit - shifted[k]) - below[k] * scale[k];
    for (int k = 0; k < count; k++) power[k] = splat(kExpm1[0]);
    for (int i = 1; i < 6; i++)
      for (int k = 0; k < count; k++) power[k] = power[k] * f[k] + kExpm1[i];
    for (int k = 0; k < count; k++) power[k] = power[k] * f[k] + 1.f;
    for (int k = 0; k < count; k++) power[k] = keep(counted[k], power[k] * from_bits(bits(shifted[k]) << 23));
  }
};

// 2^y for any y. A result below 2^-125 is 0, a result of 2^127 or more is +inf.
inline vec exp2(vec y) {
  const vec power = exp2_nonpositive(y > 127.f ? splat(127.f) : y);
  return select(y >= 127.f, splat(kInf), power);
}

inline vec exp(vec x) { return exp2(x * kLog2e); }

// e^x and e^x - 1 for x <= 0, each with a relative error of 2e-7, however near x is to 0.
struct Decay {
  vec power, minus_one;
};
inline Decay decay(vec x) {
  const vec y = max(x, splat(-80.f)) * kLog2e;  // e^-80 vanishes beside 1
  const Split s = split(y);
  const vec change = s.scale * (s.f * expm1_poly(s.f));
  return {select(x > -80.f, change + s.scale, x == x ? vec{} : x), select(x == x, change + (s.scale - 1.f), x)};
}

inline vec expm1_nonpositive(vec x) { return decay(x).minus_one; }

// log(1 + u) for u > -1, with a relative error of 2e-7, however near u is to 0.
inline vec log1p(vec u) {
  const vec w = u + 1.f;
  // w = 2^n m with m in [sqrt(1/2), sqrt(2)). Rounding 1 + u to w loses a little: (u - (w - 1)) / w restores it.
  const ivec n = (bits(w) - 0x3f3504f3) >> 23;
  const vec m = from_bits(bits(w) - (n << 23));
  const vec r = m - 1.f;
  vec p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const vec exponent = __builtin_convertvector(n, vec);
  const vec log_m = r - r * r * (0.5f - r * p);
  const vec lost = (u - (w - 1.f)) / w;
  return exponent * kLn2 + (log_m + lost);
}

}  // namespace FASTKD_ISA
