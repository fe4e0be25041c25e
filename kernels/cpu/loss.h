// kd_rows: from a call to the loss and gradient of each of its rows. Decides which sweeps a divergence needs, and which
// rows are skipped.
#pragma once
#include "sparse.h"

namespace FASTKD_ISA {

// Stands in for a divergence, for calls and rows without a soft term.
struct NoSoft {};

// What the sweeps must know of a divergence.
template <class Divergence>
struct Family : CrossSums<Divergence> {
  using CrossSums<Divergence>::forward, CrossSums<Divergence>::reverse;
  static constexpr bool kl = forward || reverse;
  static constexpr bool raw = std::is_same<Divergence, MSE>::value;
  static constexpr bool sparse = std::is_same<Divergence, Sparse>::value;
  static constexpr bool no_soft = std::is_same<Divergence, NoSoft>::value;
  static constexpr bool functor = !kl && !raw && !sparse && !no_soft;  // needs sweep 2
  static constexpr bool probabilities = kl || functor || sparse;       // a softmax at T
  static constexpr bool stashes_teacher = kl || functor;
  static constexpr bool reads_logits_once = sparse || no_soft || (kl && !reverse);
};

// The loss of one row and, if wanted, its gradient; or one stage of both on a tile of it. `divergence` is a functor,
// MSE or NoSoft.
template <int hard, class Divergence>
inline void one_row(const Divergence& divergence, const Row& row, const RowSpec& spec, const Scratch& scratch,
                    State& state, float& soft_out, float& hard_out) {
  using family = Family<Divergence>;
  constexpr bool kl = family::kl, forward_sums = family::forward, reverse_sums = family::reverse;
  constexpr bool functor = family::functor, raw = family::raw, probabilities = family::probabilities;
  const bool whole = spec.stage == kWhole;
  const bool want_grad = spec.want_grad && (whole || spec.stage == kGradient);

  if (whole || spec.stage == kStatistics) {
    // The label's logit is read before sweep 1: in place, the stash overwrites it.
    if (hard != kNoHard && row.label >= 0 && row.label < spec.columns) state.label_logit = row.student.at(row.label);
    if (raw) state.value += squared_error(row, spec);
  }
  if constexpr (probabilities || hard != kNoHard) {
    const bool stash = whole ? want_grad || functor : spec.stage != kStatistics;
    const Sums sums =
        statistics<probabilities, forward_sums, reverse_sums, hard>(row, spec, scratch, stash, state.sums);
    if (whole || spec.stage == kStatistics) state.sums = sums;  // final in later stages, which only want the stash
  }
  const Sums& sums = state.sums;
  if constexpr (functor) {
    double value_again = 0, total_again = 0;
    if (whole || spec.stage == kTerms)
      divergence_sums(divergence, row, spec, scratch, sums, state.value, state.total_g);
    else if (spec.stage == kGradient)
      divergence_sums(divergence, row, spec, scratch, sums, value_again, total_again);
  }

  const double soft = spec.soft_weight * row.soft_scale / (probabilities ? spec.temperature : 1);
  Combination combination;
  double value = state.value;
  if constexpr (kl) {
    const bool close = forward_sums && ::fabs(sums.gap) < sums.teacher / 2;
    const double apart = close ? ::log1p(sums.gap / sums.teacher) : ::log(sums.student) - ::log(sums.teacher);
    const double forward = forward_sums ? ln2 * sums.forward / sums.teacher + apart : 0;
    const double reverse = reverse_sums ? ln2 * sums.reverse / sums.student - apart : 0;
    const double f = divergence.forward_weight(), r = divergence.reverse_weight();
    value = (f != 0 ? f * forward : 0) + (r != 0 ? r * reverse : 0);
    combination.gap = soft * f;
    combination.student = reverse_sums ? -soft / sums.student * r * reverse : 0;
    combination.ratio = soft / sums.student * r * ln2;
  } else if constexpr (functor) {
    combination.student = -soft * state.total_g / sums.student;
    combination.g = soft;
  } else if constexpr (raw) {
    value /= spec.vocab_size;
    combination.raw = 2 * soft / spec.vocab_size;
  }
  soft_out = (float)value;
  if (value != value) combination.gap = combination.student = combination.raw = value;  // NaN is never swallowed

  hard_out = 0;
  if constexpr (hard != kNoHard) {
    hard_out = cross_entropy(state.label_logit, sums, spec);
    combination.label = spec.hard_weight * row.hard_scale;
    combination.hard = combination.label / sums.hard;
    if (hard_out != hard_out) combination.hard = combination.label = hard_out;
  }

  if (!want_grad) return;
  constexpr int logits = raw ? kDifference : reverse_sums ? kLogRatio : kStashOnly;
  gradient<logits, forward_sums || functor, forward_sums, hard>(row, spec, scratch, sums, combination);
}

// Turns the run-time choice of the hard term into a template argument.
template <class Divergence>
inline void one_row(const Divergence& divergence, int hard, const Row& row, const RowSpec& spec,
                    const Scratch& scratch, State& state, float& soft_out, float& hard_out) {
  switch (hard) {
    case kNoHard: return one_row<kNoHard>(divergence, row, spec, scratch, state, soft_out, hard_out);
    case kPower1: return one_row<kPower1>(divergence, row, spec, scratch, state, soft_out, hard_out);
    case kPower2: return one_row<kPower2>(divergence, row, spec, scratch, state, soft_out, hard_out);
    case kPower3: return one_row<kPower3>(divergence, row, spec, scratch, state, soft_out, hard_out);
    case kPower4: return one_row<kPower4>(divergence, row, spec, scratch, state, soft_out, hard_out);
    default: return one_row<kOwnExponential>(divergence, row, spec, scratch, state, soft_out, hard_out);
  }
}

inline int hard_term(const KDRows& call, double temperature) {
  if (!call.hard_scale) return kNoHard;
  for (int t = 1; t <= 4; t++)
    if (temperature == t) return t;
  return kOwnExponential;
}

inline RowSpec row_spec(const KDRows& call, double temperature) {
  RowSpec spec;
  spec.temperature = temperature;
  spec.student_scale = exponent_scale(temperature), spec.teacher_scale = exponent_scale(call.teacher_temperature);
  spec.same_temperature = call.temperature == call.teacher_temperature;
  spec.soft_weight = call.soft_weight, spec.hard_weight = call.hard_weight;
  spec.vocab_size = call.vocab_size, spec.columns = call.stage == kWhole ? call.vocab_size : call.student.width;
  spec.stage = call.stage;
  spec.want_grad = call.grad.data != nullptr;
  spec.hard = hard_term(call, temperature);
  spec.hard_scale = spec.hard == kOwnExponential ? (double)kLog2e : (double)spec.student_scale * spec.hard;
  return spec;
}

// A row without its soft term is plain cross-entropy, computed at T = 1.
inline RowSpec without_soft(const KDRows& call, const RowSpec& spec) {
  RowSpec plain = spec;
  plain.temperature = 1, plain.student_scale = kLog2e, plain.hard_scale = kLog2e;
  plain.hard = call.hard_scale ? kPower1 : kNoHard;
  return plain;
}

inline Row row_of(const KDRows& call, int64_t i, const Scratch& scratch) {
  Row row;
  row.soft_scale = call.soft_scale ? call.soft_scale[i] : 0;
  row.hard_scale = call.hard_scale ? call.hard_scale[i] : 0;
  row.label = row.hard_scale != 0 ? call.labels[i] - call.first : -1;
  row.student = {row_at(call.student, i), call.student.dtype, scratch.student_block};
  if (call.teacher.data) row.teacher = {row_at(call.teacher, i), call.teacher.dtype, scratch.teacher_block};
  if (call.sparse.ids) {
    const SparseTeacher& all = call.sparse;
    row.sparse = {all.ids + i * all.count, all.logprobs + i * all.count, all.picked + i * all.count,
                  all.rest[i], all.offset[i], all.count, call.first};
  }
  if (call.grad.data) row.grad = {row_at(call.grad, i), call.grad.dtype, scratch.out_block};
  return row;
}

template <class Divergence>
int kd_rows(const Divergence& divergence, const KDRows& call) {
  using family = Family<Divergence>;
  // Without a softmax at T, exponentials are stashed at T = 1, for the hard term.
  const RowSpec spec = row_spec(call, family::probabilities ? call.temperature : 1);
  const RowSpec plain = without_soft(call, spec);
  // The student's exponentials may lie where the gradient will, unless the logits there are read again.
  const bool stash_in_grad = call.grad.data && call.grad.dtype == kFloat32 &&
                             (family::reads_logits_once || call.grad.data != call.student.data);
  const bool stash = spec.want_grad || (family::functor && call.stage != kStatistics);
  const bool fp32 = call.student.dtype == kFloat32 && call.teacher.dtype == kFloat32 && call.grad.dtype == kFloat32;
  // Only the last block passes through buffers if rows are read as they lie and every other block is stashed elsewhere.
  // The parts of a mix add up in one.
  const bool mix = std::is_same<Divergence, Mix>::value;
  const bool every_block = !fp32 || family::sparse || mix || !spec.want_grad;
  const ScratchSizes sizes{spec.columns, stash && !stash_in_grad, stash && family::stashes_teacher,
                           stash && spec.hard == kOwnExponential, every_block, family::reads_logits_once,
                           family::sparse ? call.sparse.count : 0};
  const auto lay_out_scratch = [&](Arrays& arrays) { return lay_out(arrays, sizes); };
  return for_rows(call.rows, spec.columns, call.threads, lay_out_scratch, [&](int64_t i, Scratch& scratch) {
    const Row row = row_of(call, i, scratch);
    if (stash_in_grad) scratch.student.row = reinterpret_cast<float*>(row.grad.row);

    State own;
    State& state = call.stage == kWhole ? own : static_cast<State*>(call.state)[i];
    if (call.first == call.origin && call.stage == kStatistics) state = own;

    float soft = 0, hard = 0;
    if (row.soft_scale != 0)
      one_row(divergence, row.hard_scale != 0 ? spec.hard : (int)kNoHard, row, spec, scratch, state, soft, hard);
    else if (row.hard_scale != 0)
      one_row<kPower1>(NoSoft{}, row, plain, scratch, state, soft, hard);
    else if (spec.want_grad)
      row.grad.zero(0, spec.columns);
    call.soft[i] = soft, call.hard[i] = hard;
    if (spec.want_grad) row.grad.zero(spec.columns, call.grad.width);
  });
}

// A functor, beside the teacher of the call.
template <class Divergence>
int kd_rows_beside(const Divergence& divergence, const KDRows& call) {
  if (!call.sparse.ids) return kd_rows(divergence, call);
  return kd_rows(Sparse{category_slopes<Divergence>, &divergence}, call);
}

inline int mixed_kd_rows(const Mix& mix, const KDRows& call) {
  if (!mix.known) return kUnknownDivergence;
  if (call.sparse.ids || !mix.kl_alone()) return kd_rows_beside(mix, call);
  // A direction without weight is left out: it may be infinite.
  if (mix.kl.reverse_weight() == 0) return kd_rows(mix.kl.forward_kl, call);
  if (mix.kl.forward_weight() == 0) return kd_rows(mix.kl.reverse_kl, call);
  return kd_rows(mix.kl, call);
}

inline int kd_rows(const KDRows& call) {
  if (!call.soft_scale) return kd_rows(NoSoft{}, call);
  if (Mix::names(call.divergence))
    return mixed_kd_rows(Mix(call.divergence, call.parameters, call.parameter_count), call);
  return with_divergence(call.divergence, (int)kUnknownDivergence, [&](auto kind) {
    using Divergence = typename decltype(kind)::type;
    if constexpr (!std::is_same<Divergence, MSE>::value) return kd_rows_beside(Divergence(call.parameters), call);
    // A sparse teacher has probabilities, and no logits to compare.
    else return call.sparse.ids ? (int)kUnknownDivergence : kd_rows(MSE(call.parameters), call);
  });
}

}  // namespace FASTKD_ISA
