// What the sweeps over a row share: the numbers of the loss, a thread's memory, and the sums of a row.
#pragma once
#include "blocks.h"
#include "threads.h"

#include <float.h>
#include <math.h>
#include <stddef.h>

namespace FASTKD_ISA {

constexpr float kNoMaximum = -FLT_MAX;  // finite, so that exponents relative to it are not NaN; no logit is below it

// What turns a difference of logits into a base-2 exponent at temperature T: log2(e) / T.
inline float exponent_scale(double temperature) { return (float)(log2e / temperature); }

// How the hard term gets e^z (T = 1): as a power of e^(z/T), or as an exponential of its own.
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
// whole vectors. So `row` may be the fp32 gradient row itself, which has no room beyond its end.
struct Stash {
  float *row, *tail;
  float* at(int64_t start, int64_t n) const { return n == block ? row + start : tail; }
};

// The K + 1 categories of a row of a sparse teacher (sparse.h): its K tokens, then the rest. Arrays have room for whole
// vectors of any width.
struct Categories {
  float *p, *q, *log_p, *log_q, *d, *slope;
  float* hard;  // e^z of the K tokens relative to the row's maximum

  static int64_t padded(int64_t tokens) { return (tokens + 1 + 15) / 16 * 16; }
};

// Per-thread memory for one row: the stashes, and the maxima that each block was stashed with.
struct Scratch {
  Stash student, teacher, hard;  // `teacher` later holds g
  float *student_max, *teacher_max;
  float *student_block, *teacher_block, *out_block;  // one block each, first-level cache
  Categories categories;
  uint8_t *near_block, *near;  // whether a block has near vectors, and whether each vector is one (near.h)
};

// What a call needs of Scratch. A stash that is not kept whole has its tail only.
struct ScratchSizes {
  int64_t columns;
  bool student, teacher, hard;  // stashes to keep whole
  bool every_block;             // passes through the buffers and tails; else the last, partial one alone
  bool read_once;               // no sweep reads logits again: exponentials may replace those in the buffers
  int64_t tokens;               // of a row of a sparse teacher, else 0
};

inline Scratch lay_out(Arrays& arrays, const ScratchSizes& sizes) {
  const int64_t whole_blocks = sizes.columns / block, blocks = whole_blocks + 1, vectors = sizes.columns / lanes + 1;
  const int64_t part = (sizes.columns % block + lanes - 1) / lanes * lanes, room = sizes.every_block ? block : part;
  const auto floats = [&](int64_t count) { return arrays.take<float>(count); };
  const auto whole = [&](bool keep) { return floats(keep ? whole_blocks * block : 0); };
  const auto category = [&] { return floats(Categories::padded(sizes.tokens)); };
  Scratch scratch;
  scratch.student.row = whole(sizes.student), scratch.teacher.row = whole(sizes.teacher);
  scratch.student_max = floats(blocks), scratch.teacher_max = floats(blocks);
  scratch.near_block = arrays.take<uint8_t>(blocks);
  scratch.student_block = floats(room), scratch.teacher_block = floats(room);
  scratch.student.tail = sizes.read_once ? scratch.student_block : floats(room);
  scratch.teacher.tail = sizes.read_once ? scratch.teacher_block : floats(room);
  // Of the last block the gradient may even replace the exponentials.
  scratch.out_block = sizes.read_once && !sizes.every_block ? scratch.student_block : floats(room);
  // What few calls touch comes last: a page that nobody touches is not there.
  scratch.near = arrays.take<uint8_t>(vectors);
  scratch.hard.row = whole(sizes.hard), scratch.hard.tail = floats(room);
  scratch.categories = {category(), category(), category(), category(), category(), category(), category()};
  return scratch;
}

// The numbers of a loss (fastkd/rows.py, RowSpec) as the sweeps use them, fixed for the whole call.
struct RowSpec {
  float student_scale, teacher_scale;  // exponent_scale of either side
  double hard_scale;                   // of the hard term's exponentials, however it gets them
  bool same_temperature;
  int hard;  // HardTerm
  double temperature, soft_weight, hard_weight;
  int64_t columns, vocab_size;  // of the tile and of the row, which are the same where rows are whole
  int64_t stage;  // Stage
  bool want_grad;
};

// Scalars of a row, which grow block by block. The hard term's exponentials are relative to the student's maximum.
struct Sums {
  float student_max = kNoMaximum, teacher_max = kNoMaximum;  // logits
  double student = 0, teacher = 0, hard = 0;  // sums of 2^y
  double gap = 0;      // student - teacher, with `forward` only; precise where rows nearly agree and the two cancel
  double forward = 0;  // sum of e_t (y_t - y_s), relative to the current maxima
  double reverse = 0;  // sum of e_s (y_s - y_t)
  float top_student = 0, top_teacher = 0;  // both logits of the student's likeliest column; kept for functors only

  void raise(float student_to, float teacher_to, const RowSpec& spec) {
    const double up = (double)student_to - student_max;
    const double up_s = up * spec.student_scale, up_t = ((double)teacher_to - teacher_max) * spec.teacher_scale;
    const double by_s = ::exp2(-up_s), by_t = ::exp2(-up_t);
    gap = gap * by_s + teacher * (by_s - by_t);
    forward = (forward + teacher * (up_s - up_t)) * by_t;
    reverse = (reverse + student * (up_t - up_s)) * by_s;
    student *= by_s;
    teacher *= by_t;
    hard *= ::exp2(-up * spec.hard_scale);
    student_max = student_to, teacher_max = teacher_to;
  }
};

// What is known of a row: all that must outlive a tile.
struct State {
  Sums sums;
  double label_logit = __builtin_nan("");  // until a tile has its column: no tile has a label outside the vocabulary
  double value = 0;                        // the sum of a functor's terms, or of squares
  double total_g = 0;
};
static_assert(sizeof(State) == sizeof(RowState) && offsetof(State, label_logit) == offsetof(RowState, label_logit) &&
                  offsetof(Sums, top_student) == offsetof(RowState, top_student),
              "library.py allocates these, and reads them between ranks");

// A row of a SparseTeacher. `first` is the column of the row that the tile begins with.
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

// From the label's logit and the sums of a whole row. The exponent is rounded as every column's is. NaN for a label
// outside the vocabulary: such a label is never read out of bounds, and never swallowed.
inline float cross_entropy(double label_logit, const Sums& sums, const RowSpec& spec) {
  return (float)(::log(sums.hard) - ln2 * spec.hard_scale * (float)((float)label_logit - sums.student_max));
}

// y_s - y_t of a vector of columns, from both sides' logits and maxima. Accurate however small it is.
struct LogRatio {
  float cs, ct, student_max, teacher_max, shift, shift_low;
  bool direct;  // from the difference of the two logits

  // y_s - y_t - total.
  LogRatio(const RowSpec& spec, float student_max, float teacher_max, double total)
      : cs(spec.student_scale), ct(spec.teacher_scale), student_max(student_max), teacher_max(teacher_max) {
    // Where the maxima are further apart than this, the difference of two logits is no more accurate.
    direct = spec.same_temperature && ::fabs((double)student_max - teacher_max) < 1 << 24;
    if (direct) total += ((double)student_max - teacher_max) * cs;
    shift = (float)total, shift_low = (float)(total - shift);
  }
  // log2 q - log2 p, once the sums are those of whole rows.
  LogRatio(const RowSpec& spec, const Sums& sums)
      : LogRatio(spec, sums.student_max, sums.teacher_max, ::log2(sums.student) - ::log2(sums.teacher)) {}

  vec operator()(vec s, vec t) const {
    if (!direct) return (s - student_max) * cs - (t - teacher_max) * ct - shift;
    // s - t is exact where they are close. Beside a large offset it is rounded: two-sum adds back what was lost.
    const vec h = s - t;
    const vec back = s - h;
    const vec lost = (s - (h + back)) + (back - t);
    const vec correction = keep(abs(h) < 1e30f, lost * cs);
    return (h * cs - shift) + (correction - shift_low);
  }
};

// The factor from exponentials relative to one maximum, `from`, to those relative to another, `to`.
inline double rescale(float from, float to, double scale) {
  return from == to ? 1 : ::exp2(((double)from - to) * scale);
}

}  // namespace FASTKD_ISA
