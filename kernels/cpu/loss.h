// From a call to its rows: which family a divergence belongs to, threads, per-thread memory, skipped rows.
#pragma once
#include "sparse.h"

#include <stdlib.h>
#include <type_traits>

namespace FASTKD_ISA {

// Stands where a divergence does, for calls and rows without one.
struct NoSoft {};

template <class Divergence, class = void>
struct is_kl : std::false_type {};
template <class Divergence>
struct is_kl<Divergence, std::void_t<decltype(Divergence::forward)>> : std::true_type {};

// The loss of one row and, if wanted, its gradient; or one stage of both on a tile of it. `divergence` is a functor, MSE
// or NoSoft.
template <int hard, class Divergence>
inline void one_row(const Divergence& divergence, const Row& row, const Settings& settings, const Scratch& scratch,
                    State& state, float& soft_out, float& hard_out) {
  constexpr bool kl = is_kl<Divergence>::value;
  constexpr bool raw = std::is_same<Divergence, MSE>::value;
  constexpr bool no_soft = std::is_same<Divergence, NoSoft>::value;
  constexpr bool functor = !kl && !raw && !no_soft;
  constexpr bool probabilities = kl || functor;
  const bool whole = settings.stage == kWhole;
  const bool want_grad = settings.want_grad && (whole || settings.stage == kGradient);

  if (whole || settings.stage == kStatistics) {
    // The label's logit now: in place, the stash overwrites it.
    if (hard != kNoHard && row.label >= 0 && row.label < settings.columns) state.label_logit = row.student.at(row.label);
    if (raw) state.value += squared_error(row, settings);
  }
  if constexpr (probabilities || hard != kNoHard) {
    const bool stash = whole ? want_grad || functor : settings.stage != kStatistics;
    Sums sums;
    if constexpr (kl) sums = statistics<true, Divergence::forward, Divergence::reverse, hard>(row, settings, scratch, stash, state.sums);
    else sums = statistics<functor, false, false, hard>(row, settings, scratch, stash, state.sums);
    if (whole || settings.stage == kStatistics) state.sums = sums;  // later they are final: only the stash was wanted
  }
  const Sums& sums = state.sums;
  if constexpr (functor) {
    double value_again = 0, total_again = 0;
    if (whole || settings.stage == kTerms)
      divergence_sums(divergence, row, settings, scratch, sums, state.value, state.total_g);
    else if (settings.stage == kGradient)
      divergence_sums(divergence, row, settings, scratch, sums, value_again, total_again);
  }

  const double soft = settings.soft_weight * row.soft_scale / (probabilities ? settings.temperature : 1);
  Combination combination;
  double value = state.value;
  if constexpr (kl) {
    const bool close = Divergence::forward && ::fabs(sums.gap) < sums.teacher / 2;
    const double apart = close ? ::log1p(sums.gap / sums.teacher) : ::log(sums.student) - ::log(sums.teacher);
    const double forward = Divergence::forward ? ln2 * sums.forward / sums.teacher + apart : 0;
    const double reverse = Divergence::reverse ? ln2 * sums.reverse / sums.student - apart : 0;
    const double w = divergence.weight();
    value = (w != 0 ? w * forward : 0) + (w != 1 ? (1 - w) * reverse : 0);
    combination.gap = soft * w;
    combination.student = Divergence::reverse ? -soft / sums.student * (1 - w) * reverse : 0;
    combination.ratio = soft / sums.student * (1 - w) * ln2;
  } else if constexpr (functor) {
    combination.student = -soft * state.total_g / sums.student;
    combination.g = soft;
  } else if constexpr (raw) {
    value /= settings.vocab_size;
    combination.raw = 2 * soft / settings.vocab_size;
  }
  soft_out = (float)value;
  if (value != value) combination.gap = combination.student = combination.raw = value;  // a NaN is never hidden, in no column

  hard_out = 0;
  if constexpr (hard != kNoHard) {
    hard_out = cross_entropy(state.label_logit, sums, settings);
    combination.label = settings.hard_weight * row.hard_scale;
    combination.hard = combination.label / sums.hard;
    if (hard_out != hard_out) combination.hard = combination.label = hard_out;
  }

  if (!want_grad) return;
  constexpr int logits = raw ? kDifference : kl && !std::is_same<Divergence, ForwardKL>::value ? kLogRatio : kStashOnly;
  constexpr bool forward = std::is_same<Divergence, ForwardKL>::value || std::is_same<Divergence, SymmetricKL>::value;
  gradient<logits, forward || functor, forward, hard>(row, settings, scratch, sums, combination);
}

// Turns the run-time choice of the hard term into a template argument.
template <class Divergence>
inline void one_row(const Divergence& divergence, int hard, const Row& row, const Settings& settings,
                    const Scratch& scratch, State& state, float& soft_out, float& hard_out) {
  switch (hard) {
    case kNoHard: return one_row<kNoHard>(divergence, row, settings, scratch, state, soft_out, hard_out);
    case kPower1: return one_row<kPower1>(divergence, row, settings, scratch, state, soft_out, hard_out);
    case kPower2: return one_row<kPower2>(divergence, row, settings, scratch, state, soft_out, hard_out);
    case kPower3: return one_row<kPower3>(divergence, row, settings, scratch, state, soft_out, hard_out);
    case kPower4: return one_row<kPower4>(divergence, row, settings, scratch, state, soft_out, hard_out);
    default: return one_row<kOwnExponential>(divergence, row, settings, scratch, state, soft_out, hard_out);
  }
}

// One allocation per thread, carved into the arrays of Scratch. A stash that is not wanted whole has its tail only.
class ThreadMemory {
 public:
  ThreadMemory(int64_t columns, bool student, bool teacher, bool hard, int64_t kept_tokens = 0) {
    const int64_t row = columns / block * block, maxima = (columns / block + 16) / 16 * 16;
    const int64_t categories = Categories::padded(kept_tokens);
    const int64_t flags = maxima + (columns / lanes / 4 + 32) / 16 * 16;  // four to a float
    const int64_t floats =
        (student + teacher + hard) * row + 6 * block + 2 * maxima + flags + Categories::arrays * categories;
    memory_ = static_cast<float*>(aligned_alloc(64, floats * sizeof(float)));
    float* next = memory_;
    const auto take = [&](int64_t n) { return next += n, next - n; };
    const auto stash = [&](bool whole) { return Stash{take(whole ? row : 0), take(block)}; };
    scratch.student = stash(student), scratch.teacher = stash(teacher), scratch.hard = stash(hard);
    scratch.student_max = take(maxima), scratch.teacher_max = take(maxima);
    scratch.student_block = take(block), scratch.teacher_block = take(block), scratch.out_block = take(block);
    categories_ = {take(categories), take(categories), take(categories), take(categories),
                   take(categories), take(categories), take(categories)};
    scratch.categories = &categories_;
    scratch.near_block = reinterpret_cast<uint8_t*>(take(flags)), scratch.near = scratch.near_block + maxima * 4;
  }
  ~ThreadMemory() { free(memory_); }
  ThreadMemory(const ThreadMemory&) = delete;
  bool failed() const { return memory_ == nullptr; }
  Scratch scratch;

 private:
  float* memory_;
  Categories categories_;
};

constexpr int64_t kSerialBelow = 32768;  // elements: waking the other threads costs about 15 us

inline int team(int64_t rows, int64_t columns, int64_t threads) {
  const int64_t most = rows < threads ? rows : threads;
  return rows * columns < kSerialBelow || most < 1 ? 1 : (int)most;
}

// Rows a thread takes at a time: enough that two threads seldom touch one new huge page (2 MiB) of the gradient for the
// first time, which the kernel serialises; few enough that the team stays busy to the end.
inline int64_t rows_per_turn(int64_t rows, int64_t columns, int threads) {
  const int64_t in_pages = 1 + (1 << 20) / columns, fair = rows / (4 * threads);
  return in_pages < fair ? in_pages : fair < 1 ? 1 : fair;
}

inline int hard_term(const KDRows& call, double temperature) {
  if (!call.hard_scale) return kNoHard;
  for (int t = 1; t <= 4; t++)
    if (temperature == t) return t;
  return kOwnExponential;
}

template <class Divergence>
int kd_rows(const Divergence& divergence, const KDRows& call) {
  constexpr bool probabilities = !std::is_same<Divergence, MSE>::value && !std::is_same<Divergence, NoSoft>::value;
  constexpr bool sparse = std::is_same<Divergence, Sparse>::value;
  Settings settings;
  settings.temperature = probabilities ? call.temperature : 1;  // without a softmax at T, stash at T = 1
  settings.student_scale = (float)(1.4426950408889634 / settings.temperature);
  settings.teacher_scale = (float)(1.4426950408889634 / call.teacher_temperature);
  settings.same_temperature = call.temperature == call.teacher_temperature;
  settings.soft_weight = call.soft_weight, settings.hard_weight = call.hard_weight;
  settings.vocab_size = call.vocab_size, settings.columns = call.stage == kWhole ? call.vocab_size : call.student.width;
  settings.stage = call.stage;
  settings.want_grad = call.grad.data != nullptr;
  settings.hard = hard_term(call, settings.temperature);
  settings.hard_scale = settings.hard == kOwnExponential ? (double)kLog2e : (double)settings.student_scale * settings.hard;
  // A row without its soft term is plain cross-entropy, computed at T = 1.
  Settings plain = settings;
  plain.temperature = 1, plain.student_scale = kLog2e, plain.hard_scale = kLog2e;
  plain.hard = call.hard_scale ? kPower1 : kNoHard;

  const int threads = team(call.rows, settings.columns, call.threads);
  const int64_t turn = rows_per_turn(call.rows, settings.columns, threads);
  // The student's exponentials may lie where the gradient will, unless the logits there are read again.
  constexpr bool reads_logits_once =
      sparse || std::is_same<Divergence, ForwardKL>::value || std::is_same<Divergence, NoSoft>::value;
  const bool stash_in_grad = call.grad.data && call.grad.dtype == kFloat32 &&
                             (reads_logits_once || call.grad.data != call.student.data);
  constexpr bool functor = probabilities && !sparse && !is_kl<Divergence>::value;
  const bool stash = settings.want_grad || (functor && call.stage != kStatistics);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    ThreadMemory memory(settings.columns, stash && !stash_in_grad, stash && probabilities && !sparse,
                        stash && settings.hard == kOwnExponential, sparse ? call.sparse.count : 0);
    Scratch& scratch = memory.scratch;
    if (memory.failed()) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, turn)
    for (int64_t i = 0; i < call.rows; i++) {
      if (memory.failed()) continue;
      Row row;
      row.soft_scale = call.soft_scale ? call.soft_scale[i] : 0;
      row.hard_scale = call.hard_scale ? call.hard_scale[i] : 0;
      row.label = row.hard_scale != 0 ? call.labels[i] - call.first : -1;
      row.student = {row_at(call.student, i), call.student.dtype, scratch.student_block};
      if (call.teacher.data) row.teacher = {row_at(call.teacher, i), call.teacher.dtype, scratch.teacher_block};
      if constexpr (sparse) {
        const SparseTeacher& all = call.sparse;
        row.sparse = {all.ids + i * all.count, all.logprobs + i * all.count, all.picked + i * all.count,
                      all.rest[i], all.offset[i], all.count, call.first};
      }
      if (call.grad.data) row.grad = {row_at(call.grad, i), call.grad.dtype, scratch.out_block};

      if (stash_in_grad) scratch.student.row = reinterpret_cast<float*>(row.grad.row);

      State own;
      State& state = call.stage == kWhole ? own : static_cast<State*>(call.state)[i];
      if (call.first == 0 && call.stage == kStatistics) state = own;

      float soft = 0, hard = 0;
      if (row.soft_scale != 0)
        one_row(divergence, row.hard_scale != 0 ? settings.hard : (int)kNoHard, row, settings, scratch, state, soft, hard);
      else if (row.hard_scale != 0)
        one_row<kPower1>(NoSoft{}, row, plain, scratch, state, soft, hard);
      else if (settings.want_grad)
        row.grad.zero(0, settings.columns);
      call.soft[i] = soft, call.hard[i] = hard;
      if (settings.want_grad) row.grad.zero(settings.columns, call.grad.width);
    }
  }
  return failed;
}

inline int kd_rows(const KDRows& call) {
  if (!call.soft_scale) return kd_rows(NoSoft{}, call);
  return with_divergence(call.divergence, (int)kUnknownDivergence, [&](auto kind) {
    using Divergence = typename decltype(kind)::type;
    if (!call.sparse.ids) return kd_rows(Divergence(call.parameters), call);
    // A sparse teacher has probabilities, and no logits to compare.
    if constexpr (std::is_same<Divergence, MSE>::value) return (int)kUnknownDivergence;
    else return kd_rows(Sparse{category_slopes<Divergence>, call.parameters, call.sparse.count}, call);
  });
}

}  // namespace FASTKD_ISA
