// Row statistics and log-softmax: what needs one row of logits and no loss.
#pragma once
#include "row.h"

namespace FASTKD_ISA {

// Exponents y = (z - max) * log2(e)/T of a row's logits, relative to a logit.
struct Exponent {
  float scale, max;
  double operator()(float z) const { return (double)scale * (z - max); }
  vec operator()(vec z) const { return (z - max) * scale; }
};

// Sums over the columns of a block.
struct Masses {
  float sum, weighted;  // of 2^y, and of 2^y y for the entropy
};

// `before(i)` runs before each vector. Vectors alternate between two sums, so that additions seldom wait.
template <bool with_weighted, class Before>
inline Masses masses(const float* z, int64_t n, const Exponent& exponent, const Before& before) {
  vec sums{}, sums2{}, weighted{};
  const auto add = [&](int64_t i, vec& into) {
    before(i);
    const vec y = exponent(load(z + i));
    const vec e = exp2_nonpositive(y);
    into += e;
    if constexpr (with_weighted) weighted += keep(e != 0.f, e * y);
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) add(i, sums), add(i + lanes, sums2);
  for (; i < n; i += lanes) add(i, sums);
  return {sum(sums + sums2), with_weighted ? sum(weighted) : 0};
}

// Running sums of one row of softmax(z / T), relative to the largest logit so far.
struct Normaliser {
  float max = kNoMaximum;
  double sum = 0, weighted = 0;  // as of Masses
  int64_t argmax = 0;

  void raise(float to, float scale) {
    const double up = ((double)to - max) * scale, factor = ::exp2(-up);
    weighted = (weighted - up * sum) * factor;
    sum *= factor;
    max = to;
  }
};

// `full`: with the sum for the entropy, and the arg-max.
template <bool full>
inline Normaliser normalise(const Reader& row, int64_t width, float scale) {
  Normaliser result;
  float largest_logit = -kInf;
  for (const auto [start, n] : for_blocks(width)) {
    const float* z = row.fetch(start, n);
    const float top = block_max(z, n);
    if (top > result.max) result.raise(top, scale);
    if (full && top > largest_logit) {
      largest_logit = top;
      int64_t i = 0;
      while (z[i] != top) i++;
      result.argmax = start + i;
    }
    const Masses these = masses<full>(z, n, {scale, result.max}, row.prefetch(start + block));
    result.sum += these.sum, result.weighted += these.weighted;
  }
  return result;
}

// Memory for one block each.
struct Buffers {
  float *logits, *upstream, *out;

  static Buffers lay_out(Arrays& arrays) {
    return {arrays.take<float>(block), arrays.take<float>(block), arrays.take<float>(block)};
  }
};

inline int row_statistics(const Statistics& call) {
  const float scale = exponent_scale(call.temperature);
  const int64_t width = call.logits.width;
  return for_rows(call.rows, width, call.threads, Buffers::lay_out, [&](int64_t i, const Buffers& buffers) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, buffers.logits};
    const Normaliser normaliser = normalise<true>(row, width, scale);
    const double log_z = ::log(normaliser.sum);
    call.normaliser[2 * i] = normaliser.max, call.normaliser[2 * i + 1] = (float)::log2(normaliser.sum);
    call.log_sum_exp[i] = (float)(log_z + normaliser.max / call.temperature);
    call.entropy[i] = (float)(log_z - ln2 * normaliser.weighted / normaliser.sum);
    call.argmax[i] = normaliser.argmax;
    const int64_t label = call.labels ? call.labels[i] : -1;
    call.label_logprob[i] = __builtin_nanf("");
    if (label >= 0 && label < width)
      call.label_logprob[i] = (float)(ln2 * scale * (row.at(label) - normaliser.max) - log_z);
  });
}

inline int log_softmax(const LogSoftmax& call) {
  const float scale = exponent_scale(call.temperature);
  const int64_t width = call.logits.width;
  return for_rows(call.rows, width, call.threads, Buffers::lay_out, [&](int64_t i, const Buffers& buffers) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, buffers.logits};
    const Writer out{row_at(call.out, i), call.out.dtype, buffers.out};
    const Normaliser normaliser = normalise<false>(row, width, scale);
    const float max = normaliser.max, log2_z = (float)::log2(normaliser.sum);
    call.normaliser[2 * i] = max, call.normaliser[2 * i + 1] = log2_z;
    for (const auto [start, n] : for_blocks(width)) {
      const float* z = row.fetch(start, n);
      float* to = out.target(start, n);
      for (int64_t j = 0; j < n; j += lanes) store(to + j, ((load(z + j) - max) * scale - log2_z) * kLn2);
      out.flush(to, start, n);
    }
  });
}

inline int log_softmax_backward(const LogSoftmax& call) {
  const float scale = exponent_scale(call.temperature);
  const float inverse = (float)(1 / call.temperature);
  const int64_t width = call.logits.width;
  return for_rows(call.rows, width, call.threads, Buffers::lay_out, [&](int64_t i, const Buffers& buffers) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, buffers.logits};
    const Reader upstream{row_at(call.upstream, i), call.upstream.dtype, buffers.upstream};
    const Writer grad{row_at(call.out, i), call.out.dtype, buffers.out};
    const float max = call.normaliser[2 * i], log2_z = call.normaliser[2 * i + 1];
    double total = call.total ? call.total[i] : 0;
    for (const auto [start, n] : for_blocks(call.total ? 0 : width)) {
      const float* u = upstream.fetch(start, n);
      vec sums{};
      const int64_t whole = n / lanes * lanes;
      for (int64_t j = 0; j < whole; j += lanes) sums += load(u + j);
      for (int64_t j = whole; j < n; j++) total += u[j];  // the padding of a reader is -inf, not 0
      total += sum(sums);
    }
    const float total_upstream = (float)total;
    for (const auto [start, n] : for_blocks(width)) {
      const float* z = row.fetch(start, n);
      const float* u = upstream.fetch(start, n);
      float* to = grad.target(start, n);
      for (int64_t j = 0; j < n; j += lanes) {
        const vec q = exp2_nonpositive((load(z + j) - max) * scale - log2_z);
        store(to + j, (load(u + j) - q * total_upstream) * inverse);
      }
      grad.flush(to, start, n);
    }
  });
}

}  // namespace FASTKD_ISA
