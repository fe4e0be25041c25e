// A whole loss on logits in one call: what fastkd/at_once.py takes here has nothing left for Python to do.
#pragma once
#include "row_scalars.h"

#include <cmath>
#include <cstdlib>

// The arrays of a call, one number a row, in one allocation.
struct LossRows {
  char* memory;
  int64_t* moved;
  float *soft, *hard, *every, *masked;

  explicit LossRows(int64_t rows) : memory(static_cast<char*>(std::malloc(rows * (sizeof(int64_t) + 4 * sizeof(float))))) {
    moved = reinterpret_cast<int64_t*>(memory);
    soft = reinterpret_cast<float*>(moved + rows), hard = soft + rows, every = hard + rows, masked = every + rows;
  }
  ~LossRows() { std::free(memory); }
  LossRows(const LossRows&) = delete;
};

inline bool weights_are_valid(const float* weights, int64_t rows) {
  for (int64_t row = 0; weights && row < rows; row++)
    if (!(weights[row] >= 0 && std::isfinite(weights[row]))) return false;
  return true;
}

inline bool labels_are_tokens(const KDRows& call) {
  for (int64_t row = 0; row < call.rows; row++)
    if (call.hard_scale[row] != 0 && (call.labels[row] < 0 || call.labels[row] >= call.vocab_size)) return false;
  return true;
}

// kRefused where values are not as they must be: before anything is written.
inline int kd_loss(const KDLoss& form, const LossValues& values, const Kernels& kernels) {
  const int64_t rows = form.rows.rows;
  LossRows arrays(rows);
  if (!arrays.memory) return kOutOfMemory;
  if (!weights_are_valid(values.weights, rows)) return kRefused;

  const bool apart = form.soft && form.masked_apart;  // the soft term has scales of its own
  RowScales scales = form.scales;
  scales.labels = values.labels, scales.weights = values.weights, scales.divisor = values.divisor;
  scales.every = apart ? arrays.every : nullptr, scales.masked = arrays.masked;
  scales.moved = scales.length && values.labels ? arrays.moved : nullptr;
  row_scales(scales);

  KDRows call = form.rows;
  call.student.data = values.student, call.teacher.data = form.soft ? values.teacher : nullptr;
  call.grad.data = values.grad;
  call.soft = arrays.soft, call.hard = arrays.hard;
  call.labels = scales.moved ? scales.moved : values.labels;
  call.soft_scale = form.soft ? (apart ? arrays.every : arrays.masked) : nullptr;
  call.hard_scale = form.hard ? arrays.masked : nullptr;
  call.threads = values.threads;
  if (form.hard && !labels_are_tokens(call)) return kRefused;
  if (values.upstream)
    for (int64_t row = 0; row < rows; row++) {
      arrays.masked[row] *= values.upstream[row];
      if (apart) arrays.every[row] *= values.upstream[row];
    }
  const int outcome = kernels.kd_rows(call);
  if (outcome != kDone || !values.loss) return outcome;
  const WeightedTotal whole{call.soft,  call.hard, call.soft_scale,  call.hard_scale,
                            values.loss, rows,     call.soft_weight, call.hard_weight};
  if (form.total) weighted_total(whole);
  else weighted_rows(whole);
  return kDone;
}
