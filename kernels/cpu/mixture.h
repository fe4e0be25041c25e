// Several teachers as one: the logits of a row whose probabilities are weighted means of theirs.
#pragma once
#include "normaliser.h"

namespace FASTKD_ISA {

// Memory for a row of `count` teachers.
struct MixBuffers {
  float *logits, *out;  // one block each
  float* exponents;     // one block of each teacher
  float* max;           // of each teacher, as its shift
  double* shift;
};

// Per teacher y = log2(w p) = (z - max) * log2(e)/T - shift. The least shift is left out: it is a constant of the row,
// beside which small differences would round away.
inline int mix_rows(const MixRows& call) {
  const float scale = exponent_scale(call.temperature), back = (float)(ln2 * call.temperature);
  const int64_t width = call.out.width, count = call.count;
  const auto lay_out = [count](Arrays& arrays) {
    return MixBuffers{arrays.take<float>(block), arrays.take<float>(block), arrays.take<float>(count * block),
                      arrays.take<float>(count), arrays.take<double>(count)};
  };
  return for_rows(call.rows, width, call.threads, lay_out, [&](int64_t i, const MixBuffers& buffers) {
    if (call.scale && call.scale[i] == 0) return;
    const auto teacher = [&](int64_t t) {
      return Reader{row_at(call.teachers[t], i), call.teachers[t].dtype, buffers.logits};
    };
    double least = kInf;
    for (int64_t t = 0; t < count; t++) {
      const Normaliser normaliser = normalise<false>(teacher(t), width, scale);
      buffers.max[t] = normaliser.max;
      buffers.shift[t] = ::log2(normaliser.sum) - ::log2(call.weights[t]);
      if (buffers.shift[t] < least) least = buffers.shift[t];
    }
    const Writer out{row_at(call.out, i), call.out.dtype, buffers.out};
    for (const auto [start, n] : for_blocks(width)) {
      for (int64_t t = 0; t < count; t++) {
        const float* z = teacher(t).fetch(start, n);
        float* y = buffers.exponents + t * block;
        const Exponent exponent{scale, buffers.max[t]};
        const float shift = (float)(buffers.shift[t] - least);
        for (int64_t j = 0; j < n; j += lanes) store(y + j, exponent(load(z + j)) - shift);
      }
      float* to = out.target(start, n);  // may be a teacher's row, of which these columns have been read
      for (int64_t j = 0; j < n; j += lanes) {
        vec top = splat(kNoMaximum);
        for (int64_t t = 0; t < count; t++) top = max(load(buffers.exponents + t * block + j), top);
        vec sum{};
        for (int64_t t = 0; t < count; t++) sum += exp2_nonpositive(load(buffers.exponents + t * block + j) - top);
        const vec log2_sum = log1p(sum - 1.f) * kLog2e;
        store(to + j, select(sum == 0.f, splat(-kInf), top + log2_sum) * back);
      }
      out.flush(to, start, n);
    }
  });
}

}  // namespace FASTKD_ISA
