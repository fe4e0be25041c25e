// A teacher of which each row keeps K tokens. Teacher and student are taken as distributions over K + 1 categories: the
// K tokens and the rest, all other columns as one. The student's rest is the sum of its columns, read with the K tokens
// as -inf, and never 1 less the others: nothing cancels where K tokens hold nearly all mass.
//
//   1. statistics   the sweep of rows.h over the rest's columns; the K logits are picked from the row before it.
//   2. categories   the functor's terms and g on K + 1 categories; a slope for each: (g - q G).
//   3. gradient     the rest's slope is spread over its columns as their share of it, which the sweep of rows.h does
//                   from the stash; then the K columns are written.
#pragma once
#include "rows.h"

namespace FASTKD_ISA {

// K + 1 entries each, the last the rest, with room for whole vectors of any width.
struct Categories {
  float *p, *q, *log_p, *log_q, *d, *slope;
  float* hard;  // e^z of the K tokens relative to the row's maximum

  static int64_t padded(int64_t count) { return (count + 1 + 15) / 16 * 16; }
  static constexpr int arrays = 7;
};

// The value of a row and, into `slope`, the derivative by each category's logit, but for the temperature.
template <class Divergence>
double category_slopes(const double* parameters, const Categories& at, int64_t count) {
  const Divergence divergence(parameters);
  int64_t top = 0;
  for (int64_t k = 0; k <= count; k++)
    if (at.q[k] > at.q[top]) top = k;
  vec terms{};
  float center = 0;
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t k = 0; k <= count; k += lanes) {
      const Cell cell{load(at.p + k), load(at.q + k), load(at.log_p + k), load(at.log_q + k), load(at.d + k)};
      const Pair pair = divergence(cell);
      // Absent entries and padding: p = q = 0.
      const ivec counted = (cell.log_p > -kInf) | (cell.log_q > -kInf) | (cell.log_p != cell.log_p) | (cell.log_q != cell.log_q);
      if (pass) terms += keep(counted, pair.term);
      store(at.slope + k, keep(counted, pair.g - center * cell.q));
    }
    // As in center_of: g less that multiple of q which leaves the likeliest category nothing to round.
    if (!pass) center = at.slope[top] / at.q[top];
    if (!(center - center == 0)) center = 0;
  }
  vec slopes{};
  for (int64_t k = 0; k <= count; k += lanes) slopes += load(at.slope + k);
  const float total = sum(slopes);
  for (int64_t k = 0; k <= count; k += lanes) store(at.slope + k, load(at.slope + k) - load(at.q + k) * total);
  return sum(terms);
}

using CategorySlopes = double (*)(const double* parameters, const Categories& at, int64_t count);

// Stands where a functor does in loss.h.
struct Sparse {
  CategorySlopes slopes;
  const double* parameters;
  int64_t count;
};

// The sums of a whole row: those of the rest and of the K tokens, relative to the maxima of both. Fills `at`.
template <int hard>
inline Sums with_categories(const SparseRow& teacher, const Settings& settings, const Sums& rest, const Categories& at) {
  const float cs = settings.student_scale;
  const int64_t count = teacher.count;
  float top = -kInf;
  for (int64_t k = 0; k < count; k++) {
    const bool here = teacher.ids[k] < settings.vocab_size;
    at.log_q[k] = here ? teacher.picked[k] : -kInf;  // the logit, for now
    if (at.log_q[k] > top) top = at.log_q[k];
  }
  for (int64_t k = count; k < Categories::padded(count); k++) at.log_q[k] = -kInf;
  const float student_max = top * cs > rest.student_max ? top * cs : rest.student_max;
  const float own_max = top * kLog2e > (float)rest.hard_max ? top * kLog2e : (float)rest.hard_max;
  const double hard_max = hard == kOwnExponential ? own_max : (double)student_max * hard;
  Sums sums = rest;
  sums.raise(student_max, sums.teacher_max, hard_max);
  const double rest_sum = sums.student;
  vec kept{}, kept_hard{};
  for (int64_t k = 0; k < count; k += lanes) {
    const vec z = load(at.log_q + k);
    const vec e = exp2_nonpositive(z * cs - student_max);
    store(at.q + k, e), kept += e;
    if constexpr (hard != kNoHard) {
      vec e_hard;
      if constexpr (hard == kOwnExponential) e_hard = exp2_nonpositive(z * kLog2e - own_max);
      else e_hard = power<hard>(e);
      store(at.hard + k, e_hard), kept_hard += e_hard;
    }
  }
  sums.student += sum(kept), sums.hard += sum(kept_hard);

  const double ln2 = 0.69314718055994530942, log_z = ::log(sums.student), share = 1 / sums.student;
  const auto category = [&](int64_t k, double log_q, double log_p, double q) {
    at.q[k] = (float)q, at.log_q[k] = (float)log_q, at.log_p[k] = (float)log_p;
    at.d[k] = (float)(log_q - log_p);  // in double: between nearly equal rows only this difference counts
  };
  for (int64_t k = 0; k < count; k++) {
    // The multiply-add that the exponentials went through, so a large offset cancels.
    const double y = __builtin_fma((double)at.log_q[k], (double)cs, -(double)student_max);
    category(k, ln2 * y - log_z, teacher.logprobs[k], at.q[k] * share);
  }
  category(count, ::log(rest_sum) - log_z, teacher.rest, rest_sum * share);
  for (int64_t k = count + 1; k < Categories::padded(count); k++) category(k, -kInf, -kInf, 0);
  for (int64_t k = 0; k <= count; k += lanes) store(at.p + k, exp2_nonpositive(load(at.log_p + k) * kLog2e));
  return sums;
}

// The loss of one row and, if wanted, its gradient; or one stage of both on a tile of it.
template <int hard>
inline void one_row(const Sparse& sparse, const Row& row, const Settings& settings, const Scratch& scratch,
                    State& state, float& soft_out, float& hard_out) {
  const bool whole = settings.stage == kWhole;
  const bool want_grad = settings.want_grad && (whole || settings.stage == kGradient);
  const SparseRow& teacher = row.sparse;
  const int64_t first = teacher.first, end = first + settings.columns;
  const int64_t from = lower_bound(teacher.ids, teacher.count, first), to = lower_bound(teacher.ids, teacher.count, end);

  if (whole || settings.stage == kStatistics) {  // now: in place, the stash overwrites the logits
    if (hard != kNoHard && row.label >= 0 && row.label < settings.columns) state.label_logit = row.student.at(row.label);
    for (int64_t k = from; k < to; k++) teacher.picked[k] = row.student.at(teacher.ids[k] - first);
  }
  Row rest_row = row;
  if (want_grad && row.grad.row == row.student.row && row.student.dtype == kFloat32) {
    // These logits are about to be overwritten: no copy is needed to hide some of them.
    for (int64_t k = from; k < to; k++) row.grad.put(teacher.ids[k] - first, -kInf);
  } else {
    rest_row.student.hidden = teacher.ids + from;
    rest_row.student.hidden_count = to - from;
    rest_row.student.first = first;
  }
  const Sums swept = statistics<false, false, false, hard>(rest_row, settings, scratch,
                                                           whole ? want_grad : settings.stage != kStatistics, state.sums);
  if (whole || settings.stage == kStatistics) state.sums = swept;
  const Sums& rest = state.sums;
  const Categories& at = *scratch.categories;
  const Sums sums = with_categories<hard>(teacher, settings, rest, at);
  const double value = sparse.slopes(sparse.parameters, at, teacher.count) + teacher.offset;
  soft_out = (float)value;

  hard_out = 0;
  double by_hard = 0, label_slope = 0;
  if constexpr (hard != kNoHard) {
    const float label_logit = (float)state.label_logit;
    const double y = hard == kOwnExponential
                         ? (double)__builtin_fmaf(label_logit, kLog2e, -(float)sums.hard_max)
                         : (double)hard * __builtin_fmaf(label_logit, settings.student_scale, -sums.student_max);
    hard_out = (float)(::log(sums.hard) - 0.69314718055994530942 * y);
    label_slope = settings.hard_weight * row.hard_scale;
    by_hard = label_slope / sums.hard;
    if (hard_out != hard_out) by_hard = label_slope = hard_out;
  }

  if (!want_grad) return;
  double soft = settings.soft_weight * row.soft_scale / settings.temperature;
  if (value != value) soft = value;  // a NaN is never hidden, in no column
  Combination combination;
  // Relative to the rest's own maxima, at which its exponentials do not underflow, however little it holds.
  if (rest.student > 0 || rest.student != rest.student) combination.student = soft * at.slope[teacher.count] / rest.student;
  if (value != value) combination.student = value;
  combination.hard = by_hard * ::exp2(rest.hard_max - sums.hard_max);
  combination.label = label_slope;
  gradient<kStashOnly, false, hard>(row, settings, scratch, rest, combination);
  for (int64_t k = from; k < to; k++) {
    const int64_t column = teacher.ids[k] - first;
    double g = soft * at.slope[k];
    if (hard != kNoHard) g += by_hard * at.hard[k];
    if (hard != kNoHard && column == row.label) g -= label_slope;
    row.grad.put(column, (float)g);
  }
}

}  // namespace FASTKD_ISA
