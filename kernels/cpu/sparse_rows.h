// The rows of a sparse teacher that are in order, checked and made one kind: see fastkd/sparse.py, which does the same
// in PyTorch for rows that are not, with every message.
#pragma once
#include "threads.h"

#include <math.h>
#include <string.h>

namespace FASTKD_ISA {

// A row that does not count may hold anything: it becomes one without entries.
inline void leave_out(const SparseInput& call, int64_t row) {
  for (int64_t k = 0; k < call.count; k++)
    call.ids_out[row * call.count + k] = call.vocab_size, call.logprobs_out[row * call.count + k] = -INFINITY;
  call.rest_out[row] = call.offset_out[row] = 0;
}

// Whether the row is in order. `logprobs` are already those of the result.
inline bool sparse_row(const SparseInput& call, int64_t row) {
  const int64_t* ids = call.ids + row * call.count;
  int64_t* ids_out = call.ids_out + row * call.count;
  float* logprobs = call.logprobs_out + row * call.count;
  float top = -INFINITY;
  int64_t previous = -1;
  for (int64_t k = 0; k < call.count; k++) {
    const bool absent = logprobs[k] == -INFINITY;
    const int64_t id = absent ? call.vocab_size : ids[k];
    if (id < previous || (!absent && (id == previous || id >= call.vocab_size))) return false;
    ids_out[k] = previous = id;
    if (logprobs[k] > top) top = logprobs[k];
  }
  if (top == INFINITY) return false;
  double mass = 0, offset = 0;
  for (int64_t k = 0; k < call.count; k++) {
    if (logprobs[k] == -INFINITY) continue;
    mass += ::exp((double)logprobs[k] - top);
    if (call.kind == kSampled) offset -= ::exp((double)logprobs[k]) * logprobs[k];
  }
  const double log_mass = mass == 0 ? -INFINITY : top + ::log(mass);

  double log_total = log_mass, rest = -INFINITY;
  if (call.kind == kGhost) {
    if (call.rest) {
      rest = call.rest[row];
      log_total = ::log(::exp(log_mass) + ::exp(rest));
    } else {
      const double kept = ::exp(log_mass);
      rest = (float)::log1p(-(kept > 1 - call.nothing ? 1 : kept));
    }
    const double total = ::exp(log_total);
    if (total > 1 + call.slack || (call.rest && total < 1 - call.slack)) return false;
  }
  if (call.kind == kRenormalize || call.rest) {
    const float by = log_total == -INFINITY ? 0 : (float)log_total;
    for (int64_t k = 0; k < call.count; k++) logprobs[k] -= by;
    rest = (float)rest - by;
  }
  if (call.kind == kSampled && call.entropy) offset -= call.entropy[row];
  call.rest_out[row] = (float)rest, call.offset_out[row] = (float)offset;
  return true;
}

inline int sparse_rows(const SparseInput& call) {
  struct Nothing {};
  int disorder = 0;
  const auto none = [](Arrays& arrays) { return arrays.take<char>(1), Nothing{}; };  // an allocation of 0 may "fail"
  const int outcome = for_rows(call.rows, call.count, call.threads, none, [&](int64_t row, const Nothing&) {
    const int64_t first = row * call.count;
    memcpy(call.logprobs_out + first, call.logprobs + first, call.count * sizeof(float));
    if (call.live && call.live[row] == 0) leave_out(call, row);
    else if (!sparse_row(call, row)) {
#pragma omp atomic write
      disorder = 1;
    }
  });
  return outcome == kDone && disorder ? (int)kRefused : outcome;
}

}  // namespace FASTKD_ISA
