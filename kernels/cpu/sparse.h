// The loss of a row beside a sparse teacher, of which each row keeps K tokens. Teacher and student become
// distributions over K + 1 categories: the K tokens, and the rest, which is all other columns taken together. The
// student's rest is summed from its own columns, with the K tokens excluded, and never as 1 minus the others: so
// nothing cancels where the K tokens hold nearly all mass.
//
//   1. statistics   of the rest's columns, by sweep 1. The K logits are picked from the row before.
//   2. categories   the functor's terms and g on K + 1 categories, and a slope for each: g - q * (sum of g).
//   3. gradient     by sweep 3, which spreads the rest's slope over its columns in proportion to their probabilities.
//                   Then the K columns are written.
#pragma once
#include "sweeps.h"

namespace FASTKD_ISA {

// Returns the value of a row. Fills `at.slope` with the derivative by each category's logit, without the factor 1/T.
template <class Divergence>
double category_slopes(const void* functor, const Categories& at, int64_t count) {
  int64_t top = 0;
  for (int64_t k = 0; k <= count; k++)
    if (at.q[k] > at.q[top]) top = k;
  const Cell likeliest{splat(at.p[top]), splat(at.q[top]), splat(at.log_p[top]), splat(at.log_q[top]),
                       splat(at.d[top])};
  const Centred<Divergence> divergence(*static_cast<const Divergence*>(functor), likeliest);
  vec terms{};
  for (int64_t k = 0; k <= count; k += lanes) {
    const Cell cell{load(at.p + k), load(at.q + k), load(at.log_p + k), load(at.log_q + k), load(at.d + k)};
    const Pair pair = divergence(cell);
    // Left out: absent entries and padding, which have p = q = 0.
    const ivec counted =
        (cell.log_p > -kInf) | (cell.log_q > -kInf) | (cell.log_p != cell.log_p) | (cell.log_q != cell.log_q);
    terms += keep(counted, pair.term);
    store(at.slope + k, keep(counted, pair.g));
  }
  vec slopes{};
  for (int64_t k = 0; k <= count; k += lanes) slopes += load(at.slope + k);
  const float total = sum(slopes);
  for (int64_t k = 0; k <= count; k += lanes) store(at.slope + k, load(at.slope + k) - load(at.q + k) * total);
  return sum(terms);
}

using CategorySlopes = double (*)(const void* functor, const Categories& at, int64_t count);

// Stands in for a functor in loss.h.
struct Sparse {
  CategorySlopes slopes;
  const void* functor;
};

// The sums of a whole row: those of the rest and of the K tokens, relative to the larger maximum. Fills all of `at` but
// the slopes.
template <int hard>
inline Sums with_categories(const SparseRow& teacher, const RowSpec& spec, const Sums& rest, const Categories& at) {
  const float cs = spec.student_scale;
  const int64_t count = teacher.count;
  float top = -kInf;
  for (int64_t k = 0; k < count; k++) {
    const bool here = teacher.ids[k] < spec.vocab_size;
    at.log_q[k] = here ? teacher.picked[k] : -kInf;  // the logit, until `category` below
    if (at.log_q[k] > top) top = at.log_q[k];
  }
  for (int64_t k = count; k < Categories::padded(count); k++) at.log_q[k] = -kInf;
  const float student_max = top > rest.student_max ? top : rest.student_max;
  Sums sums = rest;
  sums.raise(student_max, sums.teacher_max, spec);
  const double rest_sum = sums.student;
  vec kept{}, kept_hard{};
  for (int64_t k = 0; k < count; k += lanes) {
    const vec z = load(at.log_q + k) - student_max;
    const vec e = exp2_nonpositive(z * cs);
    store(at.q + k, e), kept += e;
    if constexpr (hard != kNoHard) {
      vec e_hard;
      if constexpr (hard == kOwnExponential) e_hard = exp2_nonpositive(z * kLog2e);
      else e_hard = power<hard>(e);
      store(at.hard + k, e_hard), kept_hard += e_hard;
    }
  }
  sums.student += sum(kept), sums.hard += sum(kept_hard);

  const double log_z = ::log(sums.student), share = 1 / sums.student;
  const auto category = [&](int64_t k, double log_q, double log_p, double q) {
    at.q[k] = (float)q, at.log_q[k] = (float)log_q, at.log_p[k] = (float)log_p;
    at.d[k] = (float)(log_q - log_p);  // in double: where rows nearly agree, only this difference counts
  };
  for (int64_t k = 0; k < count; k++) {
    const double y = (double)cs * (at.log_q[k] - student_max);  // as the exponentials' exponents
    category(k, ln2 * y - log_z, teacher.logprobs[k], at.q[k] * share);
  }
  // Its sum is relative to its own maximum: relative to the row's it may underflow.
  const double rest_y = ((double)rest.student_max - student_max) * cs;
  category(count, ::log(rest.student) + ln2 * rest_y - log_z, teacher.rest, rest_sum * share);
  for (int64_t k = count + 1; k < Categories::padded(count); k++) category(k, -kInf, -kInf, 0);
  for (int64_t k = 0; k <= count; k += lanes) store(at.p + k, exp2_nonpositive(load(at.log_p + k) * kLog2e));
  return sums;
}

// The loss of one row and, if wanted, its gradient; or one stage of both on a tile of it.
template <int hard>
inline void one_row(const Sparse& sparse, const Row& row, const RowSpec& spec, const Scratch& scratch,
                    State& state, float& soft_out, float& hard_out) {
  const bool whole = spec.stage == kWhole;
  const bool want_grad = spec.want_grad && (whole || spec.stage == kGradient);
  const SparseRow& teacher = row.sparse;
  const int64_t first = teacher.first, end = first + spec.columns;
  const int64_t from = lower_bound(teacher.ids, teacher.count, first);  // the tokens of this tile
  const int64_t to = lower_bound(teacher.ids, teacher.count, end);

  if (whole || spec.stage == kStatistics) {  // before sweep 1: in place, the stash overwrites the logits
    if (hard != kNoHard && row.label >= 0 && row.label < spec.columns) state.label_logit = row.student.at(row.label);
    for (int64_t k = from; k < to; k++) teacher.picked[k] = row.student.at(teacher.ids[k] - first);
  }
  Row rest_row = row;
  if (want_grad && row.grad.row == row.student.row && row.student.dtype == kFloat32) {
    // These logits are about to be overwritten: the K tokens can be excluded here, without a copy.
    for (int64_t k = from; k < to; k++) row.grad.put(teacher.ids[k] - first, -kInf);
  } else {
    rest_row.student.excluded = teacher.ids + from;
    rest_row.student.excluded_count = to - from;
    rest_row.student.first = first;
  }
  const Sums swept = statistics<false, false, false, hard>(rest_row, spec, scratch,
                                                           whole ? want_grad : spec.stage != kStatistics, state.sums);
  if (whole || spec.stage == kStatistics) state.sums = swept;
  const Sums& rest = state.sums;
  const Categories& at = scratch.categories;
  const Sums sums = with_categories<hard>(teacher, spec, rest, at);
  const double value = sparse.slopes(sparse.functor, at, teacher.count) + teacher.offset;
  soft_out = (float)value;

  hard_out = 0;
  double by_hard = 0, label_slope = 0;
  if constexpr (hard != kNoHard) {
    hard_out = cross_entropy(state.label_logit, sums, spec);
    label_slope = spec.hard_weight * row.hard_scale;
    by_hard = label_slope / sums.hard;
    if (hard_out != hard_out) by_hard = label_slope = hard_out;
  }

  if (!want_grad) return;
  double soft = spec.soft_weight * row.soft_scale / spec.temperature;
  if (value != value) soft = value;  // a NaN is never swallowed, in no column
  Combination combination;
  // Relative to the rest's own maximum, so that its exponentials do not underflow, however small its probability.
  if (rest.student > 0 || rest.student != rest.student)
    combination.student = soft * at.slope[teacher.count] / rest.student;
  if (value != value) combination.student = value;
  combination.hard = by_hard * rescale(rest.student_max, sums.student_max, spec.hard_scale);
  combination.label = label_slope;
  gradient<kStashOnly, false, false, hard>(row, spec, scratch, rest, combination);
  for (int64_t k = from; k < to; k++) {
    const int64_t column = teacher.ids[k] - first;
    double g = soft * at.slope[k];
    if (hard != kNoHard) g += by_hard * at.hard[k];
    if (hard != kNoHard && column == row.label) g -= label_slope;
    row.grad.put(column, (float)g);
  }
}

}  // namespace FASTKD_ISA
