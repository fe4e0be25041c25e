// Row statistics and log-softmax, from the same blocks and exponentials as the loss.
#pragma once
#include "loss.h"

namespace FASTKD_ISA {

// Running sums of one row of softmax(z / T), in log2 units.
struct Normaliser {
  float max = kNoMaximum;
  double sum = 0;       // of 2^(y - max)
  double weighted = 0;  // of 2^(y - max) (y - max), for the entropy
  int64_t argmax = 0;

  void raise(float to) {
    const double up = (double)to - max, factor = ::exp2(-up);
    weighted = (weighted - up * sum) * factor;
    sum *= factor;
    max = to;
  }
};

template <bool full>  // full: entropy and arg-max too
inline Normaliser normalise(const Reader& row, int64_t width, float scale) {
  Normaliser result;
  float largest_logit = -kInf;
  for (const auto [start, n] : for_blocks(width)) {
    const float* z = row.fetch(start, n);
    const float top = block_max(z, n);
    if (top * scale > result.max) result.raise(top * scale);
    if (full && top > largest_logit) {
      largest_logit = top;
      int64_t i = 0;
      while (z[i] != top) i++;
      result.argmax = start + i;
    }
    vec sums{}, sums2{}, weighted{};
    const vec max = splat(result.max);
    const int64_t next = start + block;
    const auto add = [&](int64_t i, vec& into) {
      row.prefetch(next + i);
      const vec y = load(z + i) * scale - max;
      const vec e = exp2_nonpositive(y);
      into += e;
      if constexpr (full) weighted += keep(e != 0.f, e * y);
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) add(i, sums), add(i + lanes, sums2);
    for (; i < n; i += lanes) add(i, sums);
    result.sum += sum(sums + sums2);
    if (full) result.weighted += sum(weighted);
  }
  return result;
}

// Runs `row(i, scratch)` over the rows of a call.
template <class Body>
inline int for_rows(int64_t rows, int64_t columns, int64_t threads, const Body& body) {
  int failed = 0;
  const int used = team(rows, columns, threads);
  const int64_t turn = rows_per_turn(rows, columns, used);
#pragma omp parallel num_threads(used)
  {
    ThreadMemory memory(0, false, false, false);
    if (memory.failed()) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, turn)
    for (int64_t i = 0; i < rows; i++)
      if (!memory.failed()) body(i, memory.scratch);
  }
  return failed;
}

inline int row_statistics(const Statistics& call) {
  const float scale = (float)(1.4426950408889634 / call.temperature);
  const double ln2 = 0.69314718055994530942;
  const int64_t width = call.logits.width;
  return for_rows(call.rows, width, call.threads, [&](int64_t i, const Scratch& scratch) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, scratch.student_block};
    const Normaliser normaliser = normalise<true>(row, width, scale);
    const double log_z = ::log(normaliser.sum);
    call.log_sum_exp[i] = (float)(log_z + ln2 * normaliser.max);
    call.entropy[i] = (float)(log_z - ln2 * normaliser.weighted / normaliser.sum);
    call.argmax[i] = normaliser.argmax;
    const int64_t label = call.labels ? call.labels[i] : -1;
    call.label_logprob[i] = __builtin_nanf("");
    if (label >= 0 && label < width)
      call.label_logprob[i] = (float)(ln2 * __builtin_fmaf(row.at(label), scale, -normaliser.max) - log_z);
  });
}

inline int log_softmax(const LogSoftmax& call) {
  const float scale = (float)(1.4426950408889634 / call.temperature);
  const int64_t width = call.logits.width;
  return for_rows(call.rows, width, call.threads, [&](int64_t i, const Scratch& scratch) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, scratch.student_block};
    const Writer out{row_at(call.out, i), call.out.dtype, scratch.out_block};
    const Normaliser normaliser = normalise<false>(row, width, scale);
    const float max = normaliser.max, log2_z = (float)::log2(normaliser.sum);
    call.normaliser[2 * i] = max, call.normaliser[2 * i + 1] = log2_z;
    for (const auto [start, n] : for_blocks(width)) {
      const float* z = row.fetch(start, n);
      float* to = out.target(start, n);
      for (int64_t j = 0; j < n; j += lanes) store(to + j, ((load(z + j) * scale - max) - log2_z) * kLn2);
      out.flush(to, start, n);
    }
  });
}

inline int log_softmax_backward(const LogSoftmax& call) {
  const float scale = (float)(1.4426950408889634 / call.temperature);
  const float inverse = (float)(1 / call.temperature);
  const int64_t width = call.logits.width;
  return for_rows(call.rows, width, call.threads, [&](int64_t i, const Scratch& scratch) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, scratch.student_block};
    const Reader upstream{row_at(call.upstream, i), call.upstream.dtype, scratch.teacher_block};
    const Writer grad{row_at(call.out, i), call.out.dtype, scratch.out_block};
    const float max = call.normaliser[2 * i], log2_z = call.normaliser[2 * i + 1];
    double total = 0;
    for (const auto [start, n] : for_blocks(width)) {
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
        const vec q = exp2_nonpositive((load(z + j) * scale - max) - log2_z);
        store(to + j, (load(u + j) - q * total_upstream) * inverse);
      }
      grad.flush(to, start, n);
    }
  });
}

}  // namespace FASTKD_ISA
