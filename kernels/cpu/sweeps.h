// The three sweeps over one row of logits, which give its loss and gradient for every divergence.
//
//   1. statistics   over both rows: running maxima, sums of exponentials, and the cross sums from which the value and
//                   gradient of the Kullback-Leibler family follow. Exponentials are stashed as they are computed.
//   2. divergence   for all other functors: their terms and g, from the stash.
//   3. gradient     a linear combination of the stash, while it is in the second-level cache.
//
// Exponents are (z - max) * log2(e)/T with max the row's largest logit so far. Subtracting the maximum first is nearly
// exact, so neither a large common offset nor a temperature of 1e-9 costs accuracy. The label's logit and every column
// go through the same two operations. A block's stash is relative to the maximum known when it was stashed; one factor
// per block rescales it. Sums run in fp32 lanes within a block and in double across blocks.
//
// The hard term (cross-entropy at T = 1) comes out of the same sweeps. Where T is an integer up to 4, e^z is a power of
// e^(z/T). For other T it is a third exponential.
//
// A row may also come in tiles of columns, with its logits computed again for each sweep. Then `State` keeps what is
// known of the row between tiles, and sweeps 2 and 3 begin by stashing the tile's exponentials again.
#pragma once
#include "mix.h"
#include "near.h"

#include <type_traits>

namespace FASTKD_ISA {

// Sweep 1: adds these columns to `sums`. If `keep_stash` is false, nobody reads the exponentials again, and every block
// writes them to the same memory.
template <bool with_teacher, bool forward, bool reverse, int hard>
inline Sums statistics(const Row& row, const RowSpec& spec, const Scratch& scratch, bool keep_stash, Sums sums) {
  constexpr bool functor = with_teacher && !forward && !reverse;
  int64_t top_start = -1;  // of the block that holds the largest logit
  const float cs = spec.student_scale, ct_by_cs = spec.teacher_scale / cs;
  bool mostly_near = false;  // the previous block
  for (const auto [start, n] : for_blocks(spec.columns)) {
    const int64_t b = start / block;
    const float* s = row.student.fetch(start, n);
    const float* t = with_teacher ? row.teacher.fetch(start, n) : nullptr;

    const float top = block_max(s, n);
    if (functor && top >= sums.student_max) top_start = start, sums.top_student = top;
    const float student_max = top > sums.student_max ? top : sums.student_max;
    float teacher_max = sums.teacher_max;
    if (with_teacher) {
      const float teacher_top = block_max(t, n);
      if (teacher_top > teacher_max) teacher_max = teacher_top;
    }
    if (student_max != sums.student_max || teacher_max != sums.teacher_max) sums.raise(student_max, teacher_max, spec);
    if (keep_stash) {
      scratch.student_max[b] = student_max;
      if (with_teacher) scratch.teacher_max[b] = teacher_max;
    }

    // The next block is fetched meanwhile: its maximum would wait for memory.
    const Prefetch next_s = row.student.prefetch(start + block);
    const Prefetch next_t = with_teacher ? row.teacher.prefetch(start + block) : next_s;
    float *es_out = scratch.student.tail, *et_out = scratch.teacher.tail, *eh_out = scratch.hard.tail;
    if (keep_stash) {
      es_out = scratch.student.at(start, n), et_out = scratch.teacher.at(start, n);
      eh_out = scratch.hard.at(start, n);
    }
    if constexpr (forward) {
      if (keep_stash) scratch.near_block[b] = false;
      if (b % 8 == 0 || mostly_near) {
        const Nearness nearness(spec, student_max, teacher_max);
        const bool look = nearness.apart.direct && (mostly_near || nearness.holds(load(s), load(t)));
        mostly_near = false;
        if (look) {
          const NearBlock at{s, t, es_out, et_out, eh_out, keep_stash ? scratch.near + start / lanes : nullptr, n};
          const int64_t near = near_statistics<reverse, hard>(at, next_s, next_t, nearness, spec, sums);
          mostly_near = 2 * lanes * near > n;
          if (keep_stash) scratch.near_block[b] = true;
          continue;
        }
      }
    }
    const Peak student_peak(student_max, cs), hard_peak(student_max, kLog2e);
    const Peak teacher_peak(teacher_max, spec.teacher_scale);
    vec sum_s{}, sum_t{}, sum_h{}, sum_forward{}, sum_reverse{};
    const auto add = [&](int64_t first, auto vectors) {  // of the columns from `first` on
      constexpr int m = vectors;
      Exponentials<with_teacher ? 2 * m : m> soft;
      Exponentials<m> own;
      for (int k = 0; k < m; k++) {
        const int64_t i = first + k * lanes;
        soft.set(k, student_peak, load(s + i));
        if constexpr (with_teacher) soft.set(m + k, teacher_peak, load(t + i));
        if constexpr (hard == kOwnExponential) own.set(k, hard_peak, load(s + i));
      }
      soft.compute();
      if constexpr (hard == kOwnExponential) own.compute();
      for (int k = 0; k < m; k++) {
        const int64_t i = first + k * lanes;
        const vec es = soft.power[k];
        store(es_out + i, es);
        sum_s += es;
        if constexpr (hard == kOwnExponential) {
          store(eh_out + i, own.power[k]);
          sum_h += own.power[k];
        } else if constexpr (hard > kPower1) {
          sum_h += power<hard>(es);
        }
        if constexpr (with_teacher) {
          const vec et = soft.power[m + k];
          store(et_out + i, et);
          sum_t += et;
          const vec apart = soft.below[k] - soft.below[m + k] * ct_by_cs;  // (y_t - y_s) / cs
          // A probability of 0 contributes 0 even beside an infinity (or a NaN from inf - inf).
          if constexpr (forward) sum_forward += et * keep(soft.counted[m + k], apart);
          if constexpr (reverse) sum_reverse -= es * keep(soft.counted[k], apart);
        }
      }
    };
    constexpr int step = with_teacher ? 2 : 4;  // vectors; four exponentials at once fill the registers
    int64_t i = 0;
    for (; i + step * lanes <= n; i += step * lanes) {
      for (int k = 0; k < step; k += 2) next_s(i + k * lanes), next_t(i + k * lanes);
      add(i, std::integral_constant<int, step>{});
    }
    for (; i < n; i += lanes) add(i, std::integral_constant<int, 1>{});
    sums.student += sum(sum_s);
    if constexpr (hard > kPower1) sums.hard += sum(sum_h);
    if constexpr (with_teacher) sums.teacher += sum(sum_t);
    if constexpr (forward) sums.forward += cs * (double)sum(sum_forward), sums.gap += (double)sum(sum_s) - sum(sum_t);
    if constexpr (reverse) sums.reverse += cs * (double)sum(sum_reverse);
  }
  if (hard == kPower1) sums.hard = sums.student;
  if (functor && top_start >= 0) {
    int64_t column = top_start;
    while (row.student.at(column) != sums.top_student) column++;
    sums.top_teacher = row.teacher.at(column);
  }
  return sums;
}

// Makes the cells of a functor, for a row whose normalisers are known.
struct Cells {
  const RowSpec& spec;
  const Sums& sums;
  const Scratch& scratch;
  LogRatio log_ratio;  // has the maxima and scales too
  float log_zs, log_zt;  // to base 2

  Cells(const RowSpec& spec, const Sums& sums, const Scratch& scratch)
      : spec(spec), sums(sums), scratch(scratch), log_ratio(spec, sums) {
    log_zs = (float)::log2(sums.student), log_zt = (float)::log2(sums.teacher);
  }

  // The factors from a block's exponentials to probabilities.
  float to_q(int64_t b) const {
    return (float)(rescale(scratch.student_max[b], sums.student_max, spec.student_scale) / sums.student);
  }
  float to_p(int64_t b) const {
    return (float)(rescale(scratch.teacher_max[b], sums.teacher_max, spec.teacher_scale) / sums.teacher);
  }

  Cell operator()(vec zs, vec zt, vec p, vec q) const {
    const vec log_q = (zs - log_ratio.student_max) * log_ratio.cs - log_zs;
    const vec log_p = (zt - log_ratio.teacher_max) * log_ratio.ct - log_zt;
    return {p, q, log_p * kLn2, log_q * kLn2, log_ratio(zs, zt) * kLn2};
  }
};

// The student's likeliest column, in all lanes.
inline Cell top_cell(const Cells& cells) {
  const RowSpec& spec = cells.spec;
  const Sums& sums = cells.sums;
  const vec s = splat(sums.top_student), t = splat(sums.top_teacher);
  const vec es = exp2_nonpositive((s - sums.student_max) * spec.student_scale);
  const vec et = exp2_nonpositive((t - sums.teacher_max) * spec.teacher_scale);
  return cells(s, t, et * (float)(1 / sums.teacher), es * (float)(1 / sums.student));
}

// A block of sweep 2: logits, exponentials, and the factors from these to probabilities.
struct CellBlock {
  const float *s, *t, *es, *et;
  float to_q, to_p;
  int64_t n;
};

// Adds a functor's terms in a block to `value` and its g to `total_g`. Calls put(column, g). The functor and the cells
// come by value, so that the compiler knows that no store changes them. `flatten`: left alone, it would call a mix's
// functors for every vector.
template <class Functor, class Put>
__attribute__((noinline, flatten)) void block_sums(const Functor functor, const Cells cells, const CellBlock at,
                                                   double& value, double& total_g, const Put put) {
  vec sum_term{}, sum_g{};
  for (int64_t i = 0; i < at.n; i += lanes) {
    const vec zs = load(at.s + i), zt = load(at.t + i);
    const Cell cell = cells(zs, zt, load(at.et + i) * at.to_p, load(at.es + i) * at.to_q);
    const Pair pair = functor(cell);
    // Columns that are -inf on both sides, such as padding, count for nothing, whatever the functor returns.
    const ivec counted = (zs > -kInf) | (zt > -kInf) | (zs != zs) | (zt != zt);
    const vec g = keep(counted, pair.g);
    sum_term += keep(counted, pair.term);
    sum_g += g;
    put(i, g);
  }
  value += sum(sum_term);
  total_g += sum(sum_g);
}

// Sweep 2 of one block. `out` may be at.et.
template <class Divergence>
inline void block_terms(const Centred<Divergence>& divergence, const Cells& cells, const CellBlock& at, float* out,
                        double& value, double& total_g) {
  block_sums(divergence, cells, at, value, total_g, [&](int64_t i, vec g) { store(out + i, g); });
}

// The parts of a mix one after the other, while the block is in the first-level cache: each in a loop of its own, whose
// constants have registers.
inline void block_terms(const Centred<Mix>& mix, const Cells& cells, const CellBlock& at, float* out, double& value,
                        double& total_g) {
  float* const total = cells.scratch.out_block;
  int left = mix.mix.count;
  bool first = true;
  mix.each([&](const auto& part) {
    float* const to = --left ? total : out;
    if (first) block_sums(part, cells, at, value, total_g, [=](int64_t i, vec g) { store(to + i, g); });
    else block_sums(part, cells, at, value, total_g, [=](int64_t i, vec g) { store(to + i, load(total + i) + g); });
    first = false;
  });
}

// Sweep 2: adds a functor's terms to `value` and its g to `total_g`. Stashes g in place of the teacher's exponentials.
template <class Divergence>
inline void divergence_sums(const Divergence& divergence, const Row& row, const RowSpec& spec,
                            const Scratch& scratch, const Sums& sums, double& value, double& total_g) {
  const Cells cells(spec, sums, scratch);
  const Centred<Divergence> centred(divergence, top_cell(cells));
  for (const auto [start, n] : for_blocks(spec.columns)) {
    const int64_t b = start / block;
    const float* s = row.student.fetch(start, n);
    const float* t = row.teacher.fetch(start, n);
    float* et = scratch.teacher.at(start, n);
    const CellBlock at{s, t, scratch.student.at(start, n), et, cells.to_q(b), cells.to_p(b), n};
    block_terms(centred, cells, at, et, value, total_g);
  }
}

// The sum of squared differences of raw logits, for MSE: no softmax.
inline double squared_error(const Row& row, const RowSpec& spec) {
  double total = 0;
  for (const auto [start, n] : for_blocks(spec.columns)) {
    const float* s = row.student.fetch(start, n);
    const float* t = row.teacher.fetch(start, n);
    vec squares{};
    for (int64_t i = 0; i < n; i += lanes) {
      const vec zs = load(s + i), zt = load(t + i);
      const vec difference = keep(zs != zt, zs - zt);  // 0 where both are -inf
      squares += difference * difference;
    }
    total += sum(squares);
  }
  return total;
}

// The coefficients of a row's gradient:
//   gap * (q - p) + student * e_s + ratio * e_s * (y_s - y_t) + g * stash_g + raw * (z_s - z_t) + hard * e_hard
// minus `label` in the label's column. Exponentials are relative to the row's maxima. stash_g is what sweep 2 stashed.
struct Combination {
  double gap = 0, student = 0, ratio = 0, g = 0, raw = 0, hard = 0, label = 0;
};

// What sweep 3 reads beside the stash: nothing, or the logits, for y_s - y_t or for z_s - z_t.
enum Logits : int { kStashOnly = 0, kLogRatio = 1, kDifference = 2 };

// Sweep 3. `with_teacher`: the teacher's stash takes part. It holds g, or e_t if `forward`, where near blocks have the
// stash of near.h.
template <int logits, bool with_teacher, bool forward, int hard>
inline void gradient(const Row& row, const RowSpec& spec, const Scratch& scratch, const Sums& sums,
                     const Combination& combination) {
  const LogRatio log_ratio(spec, sums);
  const bool stashed = logits != kDifference || hard != kNoHard;
  for (const auto [start, n] : for_blocks(spec.columns)) {
    const int64_t b = start / block;
    const float* s = logits ? row.student.fetch(start, n) : nullptr;
    const float* t = logits ? row.teacher.fetch(start, n) : nullptr;
    const float at_s = stashed ? scratch.student_max[b] : sums.student_max;
    const double moved_s = rescale(at_s, sums.student_max, spec.student_scale);
    const float by_ratio = (float)(combination.ratio * moved_s);
    float by_s = (float)(combination.student * moved_s), by_t = (float)combination.g;
    double by_q = 0, by_p = 0;  // of e_s and e_t, for q - p
    if constexpr (forward) {
      by_q = combination.gap * moved_s / sums.student;
      by_p = combination.gap * rescale(scratch.teacher_max[b], sums.teacher_max, spec.teacher_scale) / sums.teacher;
      by_s = (float)(combination.student * moved_s + by_q), by_t = (float)-by_p;
    }
    const float by_h = (float)(combination.hard * rescale(at_s, sums.student_max, spec.hard_scale));
    const float by_raw = (float)combination.raw;
    float *const es_in = scratch.student.at(start, n), *const et_in = scratch.teacher.at(start, n);
    float *const eh_in = scratch.hard.at(start, n), *const out = row.grad.target(start, n);
    if (forward && scratch.near_block[b]) {
      const NearBlock at{s, t, es_in, et_in, eh_in, scratch.near + start / lanes, n};
      const double gap = combination.gap * near_gap(at_s, scratch.teacher_max[b], spec, sums);
      const float near_s = (float)(combination.student * moved_s);
      const NearGradient by{by_s, by_t, near_s, (float)by_q, (float)gap, by_ratio, by_h};
      near_gradient<logits == kLogRatio, hard>(at, log_ratio, by, out);
    } else {
      for (int64_t i = 0; i < n; i += lanes) {
        vec g{};
        if constexpr (logits != kDifference || hard != kNoHard) {
          const vec es = load(es_in + i);
          if constexpr (logits == kLogRatio) {
            const vec ratio = log_ratio(load(s + i), load(t + i));
            g = keep(es != 0.f, es * (by_s + by_ratio * ratio));
          } else if constexpr (logits == kStashOnly) {
            g = es * by_s;
          }
          if constexpr (hard == kOwnExponential) g += load(eh_in + i) * by_h;
          else if constexpr (hard != kNoHard) g += power<hard>(es) * by_h;
        }
        if constexpr (with_teacher) g += load(et_in + i) * by_t;
        if constexpr (logits == kDifference) {
          const vec zs = load(s + i), zt = load(t + i);
          g += keep(zs != zt, zs - zt) * by_raw;
        }
        store(out + i, g);
      }
    }
    if (row.label >= start && row.label < start + n) out[row.label - start] -= (float)combination.label;
    row.grad.flush(out, start, n);
  }
}

}  // namespace FASTKD_ISA
