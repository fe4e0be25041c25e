// The skeleton: one row of logits -> its loss and gradient, for every divergence.
//
//   1. statistics   one sweep over both rows in blocks: running maxima, sums of exponentials, and the cross sums that
//                   close the Kullback-Leibler family. Exponentials are stashed as they are computed.
//   2. divergence   for the others only: the functor's terms and g, from the stash.
//   3. gradient     a linear combination of the stash, while it is in the second-level cache.
//
// Logarithms are to base 2 until the end: an exponent is y = fma(z, log2(e)/T, -M) with M the row's running maximum in
// the same unit, so the label's logit and every column round alike and a common offset drops out. A block's stash is
// relative to the maximum at that block; one factor per block rescales it. Sums run in fp32 lanes within a block and in
// double across blocks.
//
// Cross-entropy at T = 1 rides along: e^z is a power of e^(z/T) where T is a small integer, a third exponential elsewhere.
//
// A row may also come in tiles of columns, its logits computed anew for each of the three: then `State` is what is known
// of the row between tiles, and sweeps 2 and 3 begin by stashing the tile's exponentials again.
#pragma once
#include "blocks.h"
#include "divergences.h"

#include <math.h>

namespace FASTKD_ISA {

constexpr float kNoMaximum = -1e30f;  // finite, so that exponents relative to it are not NaN

// How e^z (T = 1) is had from e^(z/T).
enum HardTerm : int { kNoHard = 0, kPower1 = 1, kPower2 = 2, kPower3 = 3, kPower4 = 4, kOwnExponential = 5 };

template <int hard>
inline vec power(vec e) {
  static_assert(hard >= kPower1 && hard <= kPower4, "a small integer temperature");
  if constexpr (hard == kPower1) return e;
  const vec square = e * e;
  if constexpr (hard == kPower2) return square;
  if constexpr (hard == kPower3) return square * e;
  return square * square;
}

// Exponentials of a row, block by block: whole blocks in `row`, the last partial one in `tail`, which has room for
// whole vectors. So `row` may be the fp32 gradient row itself, which has none beyond its end.
struct Stash {
  float *row, *tail;
  float* at(int64_t start, int64_t n) const { return n == block ? row + start : tail; }
};

struct Categories;  // sparse.h

// Per-thread memory for one row: the stashes, and the maxima each block was stashed with.
struct Scratch {
  Stash student, teacher, hard;  // `teacher` later holds g
  float *student_max, *teacher_max, *hard_max;
  float *student_block, *teacher_block, *out_block;  // one block each, first-level cache
  const Categories* categories;
};

// What a row's loss needs, fixed for the whole call.
struct Settings {
  float student_scale, teacher_scale;  // log2(e) / T
  bool same_temperature;
  int hard;  // HardTerm
  double temperature, soft_weight, hard_weight;
  int64_t columns, vocab_size;  // of the tile and of the row, which are the same where rows are whole
  int64_t stage;  // Stage
  bool want_grad;
};

// Mergeable scalars of a row; maxima in log2 units.
struct Sums {
  float student_max = kNoMaximum, teacher_max = kNoMaximum;
  double hard_max = kNoMaximum;  // a multiple of student_max or an fp32 maximum of its own: exact in double
  double student = 0, teacher = 0, hard = 0;  // sums of 2^(y - max)
  double forward = 0;  // sum of e_t (y_t - y_s), relative to the current maxima
  double reverse = 0;  // sum of e_s (y_s - y_t)
  float top_student = 0, top_teacher = 0;  // both logits of the student's likeliest column; kept for functors only

  void raise(float student_to, float teacher_to, double hard_to) {
    const double up_s = (double)student_to - student_max, up_t = (double)teacher_to - teacher_max;
    forward = (forward + teacher * (up_s - up_t)) * ::exp2(-up_t);
    reverse = (reverse + student * (up_t - up_s)) * ::exp2(-up_s);
    student *= ::exp2(-up_s);
    teacher *= ::exp2(-up_t);
    hard *= ::exp2(hard_max - hard_to);
    student_max = student_to, teacher_max = teacher_to, hard_max = hard_to;
  }
};

// What is known of a row: all that has to outlive a tile.
struct State {
  Sums sums;
  double label_logit = __builtin_nan("");  // until its column is met; a label outside the vocabulary never is
  double value = 0;                        // of a functor, and the sum of squares
  double total_g = 0;
};
static_assert(sizeof(State) <= kStateBytes, "fastkd/_native.py allocates this much per row");

// A row of a SparseTeacher; `first` is the column of the row that the tile begins with.
struct SparseRow {
  const int64_t* ids;
  const float* logprobs;
  float* picked;
  double rest, offset;
  int64_t count, first;
};

struct Row {
  Reader student, teacher;
  SparseRow sparse;
  Writer grad;
  int64_t label;  // relative to the first column of the tile
  double soft_scale, hard_scale;
};

inline float block_max(const float* z, int64_t n) {
  vec m = splat(-kInf), m2 = m;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) m = max(load(z + i), m), m2 = max(load(z + i + lanes), m2);
  for (; i < n; i += lanes) m = max(load(z + i), m);
  return largest(max(m, m2));
}

// Sweep 1: `sums` and those of these columns. `keep_stash` false: nobody reads the exponentials again, so they stay in
// one block's worth of memory.
template <bool with_teacher, bool forward, bool reverse, int hard>
inline Sums statistics(const Row& row, const Settings& settings, const Scratch& scratch, bool keep_stash, Sums sums) {
  constexpr bool functor = with_teacher && !forward && !reverse;
  int64_t top_start = -1;  // of the block that holds the largest logit
  const float cs = settings.student_scale, ct = settings.teacher_scale;
  for (const auto [start, n] : for_blocks(settings.columns)) {
    const int64_t b = start / block;
    const float* s = row.student.fetch(start, n);
    const float* t = with_teacher ? row.teacher.fetch(start, n) : nullptr;

    const float top = block_max(s, n);
    if (functor && top * cs > sums.student_max) top_start = start, sums.top_student = top;
    const float student_max = top * cs > sums.student_max ? top * cs : sums.student_max;
    const float own_max = top * kLog2e > (float)sums.hard_max ? top * kLog2e : (float)sums.hard_max;
    const double hard_max = hard == kOwnExponential ? own_max : (double)student_max * hard;
    float teacher_max = sums.teacher_max;
    if (with_teacher) {
      const float teacher_top = block_max(t, n) * ct;
      if (teacher_top > teacher_max) teacher_max = teacher_top;
    }
    if (student_max != sums.student_max || teacher_max != sums.teacher_max) sums.raise(student_max, teacher_max, hard_max);
    if (keep_stash) {
      scratch.student_max[b] = student_max;
      if (with_teacher) scratch.teacher_max[b] = teacher_max;
      if (hard == kOwnExponential) scratch.hard_max[b] = own_max;
    }

    float *es_out = scratch.student.tail, *et_out = scratch.teacher.tail, *eh_out = scratch.hard.tail;
    if (keep_stash) es_out = scratch.student.at(start, n), et_out = scratch.teacher.at(start, n), eh_out = scratch.hard.at(start, n);
    vec sum_s{}, sum_t{}, sum_h{}, sum_forward{}, sum_reverse{};
    for (int64_t i = 0; i < n; i += lanes) {
      row.student.prefetch(start + block + i);  // the next block's maximum is taken before its exponentials
      if (with_teacher) row.teacher.prefetch(start + block + i);
      const vec zs = load(s + i);
      const vec ys = zs * cs - student_max;
      const vec es = exp2_nonpositive(ys);
      store(es_out + i, es);
      sum_s += es;
      if constexpr (hard == kOwnExponential) {
        const vec eh = exp2_nonpositive(zs * kLog2e - own_max);
        store(eh_out + i, eh);
        sum_h += eh;
      } else if constexpr (hard > kPower1) {
        sum_h += power<hard>(es);
      }
      if constexpr (with_teacher) {
        const vec yt = load(t + i) * ct - teacher_max;
        const vec et = exp2_nonpositive(yt);
        store(et_out + i, et);
        sum_t += et;
        // A probability of 0 contributes 0 even beside an infinity (or a NaN from inf - inf).
        if constexpr (forward) sum_forward += keep(et != 0.f, et * (yt - ys));
        if constexpr (reverse) sum_reverse += keep(es != 0.f, es * (ys - yt));
      }
    }
    sums.student += sum(sum_s);
    if constexpr (hard > kPower1) sums.hard += sum(sum_h);
    if constexpr (with_teacher) sums.teacher += sum(sum_t);
    if constexpr (forward) sums.forward += sum(sum_forward);
    if constexpr (reverse) sums.reverse += sum(sum_reverse);
  }
  if (hard == kPower1) sums.hard = sums.student;
  if (functor && top_start >= 0) {
    int64_t column = top_start;
    while (row.student.at(column) != sums.top_student) column++;
    sums.top_teacher = row.teacher.at(column);
  }
  return sums;
}

// log2 q - log2 p of a vector of columns, given the student's and teacher's logits.
struct LogRatio {
  float cs, ct, student_max, teacher_max, shift, shift_low;
  bool same_temperature;

  LogRatio(const Settings& settings, const Sums& sums) {
    cs = settings.student_scale, ct = settings.teacher_scale;
    student_max = sums.student_max, teacher_max = sums.teacher_max;
    same_temperature = settings.same_temperature;
    double total = ::log2(sums.student) - ::log2(sums.teacher);
    if (same_temperature) total += (double)student_max - teacher_max;
    shift = (float)total, shift_low = (float)(total - shift);
  }

  vec operator()(vec s, vec t) const {
    if (!same_temperature) return (s * cs - student_max) - (t * ct - teacher_max) - shift;
    // s - t is exact where they are close; what it rounds off beside a large offset is added back (two-sum).
    const vec h = s - t;
    const vec back = s - h;
    const vec lost = (s - (h + back)) + (back - t);
    const vec correction = keep(abs(h) < 1e30f, lost * cs);
    return (h * cs - shift) + (correction - shift_low);
  }
};

// What a functor works from, for the columns of a row whose normalisers are known.
struct Cells {
  const Settings& settings;
  const Sums& sums;
  const Scratch& scratch;
  LogRatio log_ratio;
  float log_zs, log_zt;  // to base 2

  Cells(const Settings& settings, const Sums& sums, const Scratch& scratch)
      : settings(settings), sums(sums), scratch(scratch), log_ratio(settings, sums) {
    log_zs = (float)::log2(sums.student), log_zt = (float)::log2(sums.teacher);
  }

  // From a block's exponentials to probabilities.
  float to_q(int64_t b) const { return (float)(::exp2((double)scratch.student_max[b] - sums.student_max) / sums.student); }
  float to_p(int64_t b) const { return (float)(::exp2((double)scratch.teacher_max[b] - sums.teacher_max) / sums.teacher); }

  Cell operator()(vec zs, vec zt, vec p, vec q) const {
    const vec log_q = (zs * settings.student_scale - sums.student_max) - log_zs;
    const vec log_p = (zt * settings.teacher_scale - sums.teacher_max) - log_zt;
    return {p, q, log_p * kLn2, log_q * kLn2, log_ratio(zs, zt) * kLn2};
  }
};

// g / q at the student's likeliest column, 0 where the divergence is infinite there. g less this multiple of q is as
// good a g, and makes that column add 0 to the sum: in a confident row the column's gradient would else be what
// rounding leaves of g - q * sum, two numbers that almost cancel.
template <class Divergence>
inline float center_of(const Divergence& divergence, const Cells& cells) {
  const Settings& settings = cells.settings;
  const Sums& sums = cells.sums;
  const vec s = splat(sums.top_student), t = splat(sums.top_teacher);
  const vec es = exp2_nonpositive(s * settings.student_scale - sums.student_max);
  const vec et = exp2_nonpositive(t * settings.teacher_scale - sums.teacher_max);
  const Cell cell = cells(s, t, et * (float)(1 / sums.teacher), es * (float)(1 / sums.student));
  const float center = divergence(cell).g[0] / cell.q[0];
  return center - center == 0 ? center : 0;
}

// Sweep 2 of the divergences that need the normalisers: adds to (sum of terms, sum of g) and stashes g.
template <class Divergence>
inline void divergence_sums(const Divergence& divergence, const Row& row, const Settings& settings,
                            const Scratch& scratch, const Sums& sums, double& value, double& total_g) {
  const Cells cells(settings, sums, scratch);
  const float center = center_of(divergence, cells);
  for (const auto [start, n] : for_blocks(settings.columns)) {
    const int64_t b = start / block;
    const float* s = row.student.fetch(start, n);
    const float* t = row.teacher.fetch(start, n);
    const float to_q = cells.to_q(b), to_p = cells.to_p(b);
    const float* es = scratch.student.at(start, n);
    float* et = scratch.teacher.at(start, n);
    vec sum_term{}, sum_g{};
    for (int64_t i = 0; i < n; i += lanes) {
      const vec zs = load(s + i), zt = load(t + i);
      const Cell cell = cells(zs, zt, load(et + i) * to_p, load(es + i) * to_q);
      const Pair pair = divergence(cell);
      // Padding and jointly masked columns: p = q = 0 contribute nothing, whatever the functor makes of them.
      const ivec counted = (zs > -kInf) | (zt > -kInf) | (zs != zs) | (zt != zt);
      const vec g = keep(counted, pair.g - center * cell.q);
      sum_term += keep(counted, pair.term);
      sum_g += g;
      store(et + i, g);
    }
    value += sum(sum_term);
    total_g += sum(sum_g);
  }
}

// Squared error of raw logits; no softmax.
inline double squared_error(const Row& row, const Settings& settings) {
  double total = 0;
  for (const auto [start, n] : for_blocks(settings.columns)) {
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

// The gradient of one row as a combination of what is in cache:
//   student * e_s  +  ratio * e_s * (y_s - y_t)  +  teacher * stash_t  +  raw * (z_s - z_t)  +  hard * e_hard
// e_s, e_t and e_hard rescaled block by block; the label's column gets -label more.
struct Combination {
  double student = 0, ratio = 0, teacher = 0, raw = 0, hard = 0, label = 0;
  bool teacher_is_g = false;  // stash_t holds g, which needs no rescaling
};

enum Logits : int { kStashOnly = 0, kLogRatio = 1, kDifference = 2 };

// 2^y, y being mostly 0: what rescales a block's stash to the row's final maximum.
inline double rescale(double y) { return y == 0 ? 1 : ::exp2(y); }

template <int logits, bool with_teacher, int hard>
inline void gradient(const Row& row, const Settings& settings, const Scratch& scratch, const Sums& sums,
                     const Combination& combination) {
  const LogRatio log_ratio(settings, sums);
  const bool stashed = logits != kDifference || hard != kNoHard;
  for (const auto [start, n] : for_blocks(settings.columns)) {
    const int64_t b = start / block;
    const float* s = logits ? row.student.fetch(start, n) : nullptr;
    const float* t = logits ? row.teacher.fetch(start, n) : nullptr;
    const double moved_s = stashed ? (double)scratch.student_max[b] - sums.student_max : 0;
    const double moved_t = with_teacher ? (double)scratch.teacher_max[b] - sums.teacher_max : 0;
    const double moved_h = hard == kOwnExponential ? (double)scratch.hard_max[b] - sums.hard_max : moved_s * hard;
    const float by_s = (float)(combination.student * rescale(moved_s));
    const float by_ratio = (float)(combination.ratio * rescale(moved_s));
    const float by_t = (float)(combination.teacher_is_g ? combination.teacher : combination.teacher * rescale(moved_t));
    const float by_h = (float)(combination.hard * rescale(moved_h));
    const float by_raw = (float)combination.raw;
    const float* es_in = scratch.student.at(start, n);
    const float* et_in = scratch.teacher.at(start, n);
    const float* eh_in = scratch.hard.at(start, n);
    float* out = row.grad.target(start, n);
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
    if (row.label >= start && row.label < start + n) out[row.label - start] -= (float)combination.label;
    row.grad.flush(out, start, n);
  }
}

}  // namespace FASTKD_ISA
