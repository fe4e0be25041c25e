// What the sweeps over a row share: settings, scratch memory, the sums of a row and what follows from them.
#pragma once
#include "blocks.h"

#include <float.h>
#include <math.h>

namespace FASTKD_ISA {

constexpr float kNoMaximum = -FLT_MAX;  // finite, so that exponents relative to it are not NaN; no logit is less

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
  float *student_max, *teacher_max;
  uint8_t *near, *near_block;  // of each vector, and whether a block has any
  float *student_block, *teacher_block, *out_block;  // one block each, first-level cache
  const Categories* categories;
};

// What a row's loss needs, fixed for the whole call.
struct Settings {
  float student_scale, teacher_scale;  // log2(e) / T
  double hard_scale;                   // the same of the hard term's exponentials, as they are had
  bool same_temperature;
  int hard;  // HardTerm
  double temperature, soft_weight, hard_weight;
  int64_t columns, vocab_size;  // of the tile and of the row, which are the same where rows are whole
  int64_t stage;  // Stage
  bool want_grad;
};

// Mergeable scalars of a row. The hard term's exponentials are relative to the student's maximum.
struct Sums {
  float student_max = kNoMaximum, teacher_max = kNoMaximum;  // logits
  double student = 0, teacher = 0, hard = 0;  // sums of 2^y
  double gap = 0;      // student - teacher, kept apart: between near rows all rests on it (beside `forward` only)
  double forward = 0;  // sum of e_t (y_t - y_s), relative to the current maxima
  double reverse = 0;  // sum of e_s (y_s - y_t)
  float top_student = 0, top_teacher = 0;  // both logits of the student's likeliest column; kept for functors only

  void raise(float student_to, float teacher_to, const Settings& settings) {
    const double up = (double)student_to - student_max;
    const double up_s = up * settings.student_scale, up_t = ((double)teacher_to - teacher_max) * settings.teacher_scale;
    const double by_s = ::exp2(-up_s), by_t = ::exp2(-up_t);
    gap = gap * by_s + teacher * (by_s - by_t);
    forward = (forward + teacher * (up_s - up_t)) * by_t;
    reverse = (reverse + student * (up_t - up_s)) * by_s;
    student *= by_s;
    teacher *= by_t;
    hard *= ::exp2(-up * settings.hard_scale);
    student_max = student_to, teacher_max = teacher_to;
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

// Of the label's logit and the sums of a whole row. The exponent is rounded as every column's is. NaN for a label outside
// the vocabulary: never read out of bounds, never hidden.
inline float cross_entropy(double label_logit, const Sums& sums, const Settings& settings) {
  return (float)(::log(sums.hard) - ln2 * settings.hard_scale * (float)((float)label_logit - sums.student_max));
}

// y_s - y_t of a vector of columns, given the student's and teacher's logits and the maxima: accurate however small.
struct LogRatio {
  float cs, ct, student_max, teacher_max, shift, shift_low;
  bool direct;  // from the difference of the two logits

  // Less `total`.
  LogRatio(const Settings& settings, float student_max, float teacher_max, double total)
      : cs(settings.student_scale), ct(settings.teacher_scale), student_max(student_max), teacher_max(teacher_max) {
    // Rows further apart than this have nothing in common that the difference could keep.
    direct = settings.same_temperature && ::fabs((double)student_max - teacher_max) < 1 << 24;
    if (direct) total += ((double)student_max - teacher_max) * cs;
    shift = (float)total, shift_low = (float)(total - shift);
  }
  // log2 q - log2 p, once the sums are those of whole rows.
  LogRatio(const Settings& settings, const Sums& sums)
      : LogRatio(settings, sums.student_max, sums.teacher_max, ::log2(sums.student) - ::log2(sums.teacher)) {}

  vec operator()(vec s, vec t) const {
    if (!direct) return (s - student_max) * cs - (t - teacher_max) * ct - shift;
    // s - t is exact where they are close; what it rounds off beside a large offset is added back (two-sum).
    const vec h = s - t;
    const vec back = s - h;
    const vec lost = (s - (h + back)) + (back - t);
    const vec correction = keep(abs(h) < 1e30f, lost * cs);
    return (h * cs - shift) + (correction - shift_low);
  }
};

// What takes exponentials relative to a block's maximum to the row's.
inline double rescale(float from, float to, double scale) { return from == to ? 1 : ::exp2(((double)from - to) * scale); }

}  // namespace FASTKD_ISA
