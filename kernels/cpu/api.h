// The C interface of the library: one argument struct per operation. interface.py mirrors each field by field.
#pragma once
#include <cstdint>

// Rows of `width` elements of dtype 0 = fp32, 1 = bf16, 2 = fp16; row i starts at element
// (i / inner) * outer_stride + (i % inner) * inner_stride. data == nullptr: absent.
struct Matrix {
  void* data;
  int64_t dtype;
  int64_t width;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

// See fastkd/rows.py, Tile: which sweep a call makes over its columns. kWhole: all of them, over whole rows.
enum Stage : int64_t { kWhole = 0, kStatistics = 1, kTerms = 2, kGradient = 3 };

// What is known of a row between tiles: the layout that interface.py reads and writes, where the parts of a row are on
// several ranks. Logits, and sums relative to them: see row.h, Sums and State.
struct RowState {
  float student_max, teacher_max;
  double student, teacher, hard;
  double gap, forward, reverse;
  float top_student, top_teacher;
  double label_logit, value, total_g;
};

// See fastkd/divergences.py, PARAMETERS and PARTS.
constexpr int kParameters = 2, kMostParts = 16;

// See fastkd/rows.py, SparseRows: `count` entries a row.
struct SparseTeacher {
  const int64_t* ids;  // nullptr: absent
  const float* logprobs;
  const float* rest;
  const float* offset;
  float* picked;
  int64_t count;
};

enum SparseKind : int64_t { kGhost = 0, kRenormalize = 1, kSampled = 2 };

// See fastkd/backend.py, Backend.sparse_rows: [rows, count], or [rows].
struct SparseInput {
  const int64_t* ids;
  const float* logprobs;
  const float* rest;     // nullptr: not given
  const float* entropy;  // nullptr: not given
  const float* live;     // 0 in rows that do not count; nullptr: all do
  int64_t* ids_out;
  float* logprobs_out;
  float* rest_out;
  float* offset_out;
  int64_t rows;
  int64_t count;
  int64_t vocab_size;
  int64_t kind;  // SparseKind
  int64_t threads;
  double slack;    // by how much probabilities may miss a sum of 1
  double nothing;  // a rest below it is rounding
};

// See fastkd/backend.py, Backend.kd_rows. `grad` may be `student`.
struct KDRows {
  Matrix student, teacher, grad;
  const int64_t* labels;
  const float* soft_scale;  // nullptr: no soft term (and no teacher)
  const float* hard_scale;  // nullptr: no hard term (and no labels)
  float* soft;
  float* hard;
  int64_t rows;
  int64_t vocab_size;  // columns of a whole row that count
  const char* divergence;  // its name, or that of a mix (mix.h)
  int64_t threads;
  const double* parameters;  // kParameters, the divergence's own first; or those of a mix
  int64_t parameter_count;
  double temperature, teacher_temperature;
  double soft_weight, hard_weight;
  int64_t stage;
  int64_t first;         // for tiles only: the column of the row that the matrices begin with,
  int64_t origin;        // the one that the first of the tiles begins with,
  void* state;           // and a RowState of each row
  SparseTeacher sparse;  // in place of `teacher`
};

// See fastkd/backend.py, Backend.mix_rows. `out` is fp32, and may be one of the teachers.
struct MixRows {
  const Matrix* teachers;  // `count` of them
  const double* weights;
  Matrix out;
  const float* scale;  // nullptr: every row is wanted
  int64_t count;
  int64_t rows;
  int64_t threads;
  double temperature;
};

struct Statistics {
  Matrix logits;
  const int64_t* labels;  // nullptr: every label_logprob is NaN
  float* log_sum_exp;
  float* entropy;
  int64_t* argmax;
  float* label_logprob;
  float* normaliser;  // as of LogSoftmax
  int64_t rows;
  int64_t threads;
  double temperature;
};

// `normaliser` is [rows, 2]: (max, log2 Z) with softmax(z / T) = 2^((z - max) * log2(e)/T - log2 Z). The two stay
// apart: beside a large offset their sum would lose the fraction.
struct LogSoftmax {
  Matrix logits;
  Matrix upstream;  // backward only
  Matrix out;
  float* normaliser;
  const float* total;  // backward only: the sum of each row's upstream gradient; nullptr: that of these columns
  int64_t rows;
  int64_t threads;
  double temperature;
};

// See fastkd/backend.py, Backend.top_k and Backend.sample.
struct Selection {
  Matrix logits;
  int64_t* ids;            // [rows, k]
  float* log_weights;      // [rows, k]
  float* summary;          // [rows]: the log of the mass that is not kept; for a sample the entropy
  const double* uniforms;  // [rows]; nullptr: the k likeliest
  int64_t k;
  int64_t rows;
  int64_t threads;
  double temperature;
};

// See fastkd/backend.py, Backend.row_scales.
struct RowScales {
  const int64_t* labels;  // nullptr: nothing is masked
  const float* weights;   // nullptr: all are 1
  float* every;           // [rows], the scales without the mask; nullptr: not wanted
  float* masked;          // [rows]
  int64_t* moved;         // [rows], the labels; nullptr: not wanted
  int64_t rows;
  int64_t length;  // of the sequences in which labels and weights move one place to the front; 0: they stay
  int64_t ignore_index;
  int64_t count;  // whether the divisor is the sum of what is divided
  double divisor;
};

// See fastkd/backend.py, Backend.weighted_total. A term without a scale is absent.
struct WeightedTotal {
  const float* soft;
  const float* hard;
  const float* soft_scale;
  const float* hard_scale;
  float* total;
  int64_t rows;
  double soft_weight, hard_weight;
};

// See fastkd/at_once.py. All of a loss but its values; pointers are unset.
struct KDLoss {
  KDRows rows;
  RowScales scales;
  int64_t soft, hard;    // whether the loss has these terms
  int64_t masked_apart;  // whether masked rows count in the soft term
  int64_t total;         // whether the loss is one number, not one of each row
};

// And its values. Tensors in main memory, of the forms that KDLoss says; nullptr: absent.
struct LossValues {
  void* student;
  void* teacher;
  const int64_t* labels;
  const float* weights;
  const float* upstream;  // [rows], by which the rows' gradients are multiplied
  void* grad;
  float* loss;
  double divisor;
  int64_t threads;
};

enum Outcome : int { kDone = 0, kOutOfMemory = 1, kUnknownDivergence = 2, kRefused = 3 };

// The kernels of one instruction set. Each returns an Outcome; `knows` whether there is a divergence of that name.
struct Kernels {
  int (*kd_rows)(const KDRows&);
  int (*mix_rows)(const MixRows&);
  int (*row_statistics)(const Statistics&);
  int (*log_softmax)(const LogSoftmax&);
  int (*log_softmax_backward)(const LogSoftmax&);
  int (*select)(const Selection&);
  int (*sparse_rows)(const SparseInput&);
  bool (*knows)(const char*);
};
