// What stands before and after the rows of a loss, one number a row: the scales of its terms, and their weighted total.
// One thread does it: there are a thousand times fewer of these numbers than logits.
#pragma once
#include "api.h"

// A row's weight without the mask and with it, and the label it is scored against.
struct RowWeight {
  float every, masked;
  int64_t label;
};

inline RowWeight row_weight(const RowScales& call, int64_t row) {
  RowWeight found{1, 1, call.ignore_index};
  int64_t source = row;
  if (call.length) {  // shifted: what a row is scored against stands beside the next; the last of a sequence has none
    if (row % call.length == call.length - 1) return {0, 0, call.ignore_index};
    source = row + 1;
  }
  if (call.weights) found.every = found.masked = call.weights[source];
  if (call.labels) {
    found.label = call.labels[source];
    if (found.label == call.ignore_index) found.masked = 0;
  }
  return found;
}

inline void row_scales(const RowScales& call) {
  float every_divisor = (float)call.divisor, masked_divisor = every_divisor;
  if (call.count) {
    double every = 0, masked = 0;
    for (int64_t row = 0; row < call.rows; row++) {
      const RowWeight weight = row_weight(call, row);
      every += weight.every;
      masked += weight.masked;
    }
    every_divisor = (float)every;
    masked_divisor = (float)masked;
  }
  for (int64_t row = 0; row < call.rows; row++) {
    const RowWeight weight = row_weight(call, row);
    call.masked[row] = masked_divisor == 0 ? 0 : weight.masked / masked_divisor;
    if (call.every) call.every[row] = every_divisor == 0 ? 0 : weight.every / every_divisor;
    if (call.moved) call.moved[row] = weight.label;
  }
}

// The same of each row, into `total[row]`.
inline void weighted_rows(const WeightedTotal& call) {
  const bool soft = call.soft_scale && call.soft_weight != 0, hard = call.hard_scale && call.hard_weight != 0;
  for (int64_t row = 0; row < call.rows; row++) {
    const float soft_part = soft ? (float)call.soft_weight * call.soft_scale[row] * call.soft[row] : 0;
    const float hard_part = hard ? (float)call.hard_weight * call.hard_scale[row] * call.hard[row] : 0;
    call.total[row] = soft_part + hard_part;
  }
}

inline void weighted_total(const WeightedTotal& call) {
  double total = 0;
  for (int64_t row = 0; row < call.rows; row++) {
    if (call.soft_scale) total += call.soft_weight * call.soft_scale[row] * call.soft[row];
    if (call.hard_scale) total += call.hard_weight * call.hard_scale[row] * call.hard[row];
  }
  *call.total = (float)total;
}
