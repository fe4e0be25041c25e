// The tokens that a cache keeps of a row: the k likeliest, or a random k whose weights stand for all of them.
//
//   1. maxima   of every group of 64 columns. The k-th largest of these bounds the k-th largest logit from below, so
//               only the groups that reach it are searched for the k likeliest.
//   2. masses   one sweep of exponentials, with the k likeliest excluded. What is not kept is summed from its own
//               columns, never as 1 - sum, and so is accurate however small it is.
//   3. draws    of a sample: only the blocks in which a draw falls are read again.
#pragma once
#include "normaliser.h"

#include <algorithm>

namespace FASTKD_ISA {

constexpr int64_t group = 64;
static_assert(block % group == 0 && group % (2 * lanes) == 0, "groups fill blocks, and vectors in pairs fill groups");

struct Token {
  float value;  // its logit; in results its log-weight
  int32_t column;
};
inline bool likelier(const Token& a, const Token& b) {
  return a.value > b.value || (a.value == b.value && a.column < b.column);
}
inline bool earlier(const Token& a, const Token& b) { return a.column < b.column; }

// Per-thread memory for one row.
struct SelectionScratch {
  float *buffer, *copy;  // one block each
  float* maxima;         // of groups
  Token* found;          // [columns]: all may be equally likely
  Token* kept;           // [k]
  double* above;         // [k + 1]
  double* mass;          // of blocks
};

inline SelectionScratch lay_out(Arrays& arrays, int64_t columns, int64_t k) {
  SelectionScratch scratch;
  scratch.buffer = arrays.take<float>(block), scratch.copy = arrays.take<float>(block);
  scratch.maxima = arrays.take<float>((columns + group - 1) / group);
  scratch.found = arrays.take<Token>(columns), scratch.kept = arrays.take<Token>(k);
  scratch.above = arrays.take<double>(k + 1), scratch.mass = arrays.take<double>((columns + block - 1) / block);
  return scratch;
}

// The likeliest min(k, columns above -inf) tokens into `scratch.found`; returns their number.
inline int64_t find_likeliest(const Reader& row, int64_t columns, int64_t k, const SelectionScratch& scratch) {
  const int64_t groups = (columns + group - 1) / group;
  for (const auto [start, n] : for_blocks(columns)) {
    const float* z = row.fetch(start, n);
    for (int64_t first = 0; first < n; first += group)
      scratch.maxima[(start + first) / group] = block_max(z + first, n - first < group ? n - first : group);
  }
  Token* const found = scratch.found;
  float least = -kInf;
  if (k <= groups) {
    for (int64_t g = 0; g < groups; g++) found[g] = {scratch.maxima[g], (int32_t)g};
    std::nth_element(found, found + k - 1, found + groups, likelier);
    least = found[k - 1].value;
  }
  int64_t count = 0;
  for (int64_t g = 0; g < groups; g++) {
    if (scratch.maxima[g] < least) continue;
    const int64_t end = (g + 1) * group < columns ? (g + 1) * group : columns;
    for (int64_t column = g * group; column < end; column++) {
      const float z = row.at(column);
      if (z >= least && z > -kInf) found[count++] = {z, (int32_t)column};
    }
  }
  if (count > k) std::nth_element(found, found + k - 1, found + count, likelier), count = k;
  return count;
}

// Columns [start, start + n) with the tokens from `next` to `end`, which ascend by column, excluded. `next` moves past
// those of the block.
inline const float* without(const Reader& row, int64_t start, int64_t n, const Token*& next, const Token* end,
                            float* copy) {
  const float* z = row.fetch(start, n);
  if (next == end || next->column >= start + n) return z;
  memcpy(copy, z, (n + lanes - 1) / lanes * lanes * sizeof(float));
  for (; next != end && next->column < start + n; next++) copy[next->column - start] = -kInf;
  return copy;
}

// Sums over the columns that were not found, per block in `scratch.mass`, all relative to `exponent.max`.
struct Rest {
  double sum = 0, weighted = 0;  // of 2^y and 2^y y
};
template <bool with_entropy>
inline Rest sum_rest(const Reader& row, int64_t columns, const Exponent& exponent, int64_t count,
                     const SelectionScratch& scratch) {
  Rest rest;
  const Token *next = scratch.found, *end = next + count;
  for (const auto [start, n] : for_blocks(columns)) {
    const float* z = without(row, start, n, next, end, scratch.copy);
    const Masses these = masses<with_entropy>(z, n, exponent, [](int64_t) {});
    scratch.mass[start / block] = these.sum;
    rest.sum += these.sum, rest.weighted += these.weighted;
  }
  return rest;
}

// Systematic sampling: walks the masses of all columns but `heads` in order, and draws the column in which each of the
// positions (uniform + j)·step falls. No column is heavier than a step, so none is drawn twice; where rounding leaves
// a position beyond the end, the likeliest column left takes it.
class Draws {
 public:
  Draws(const Reader& row, int64_t columns, const Exponent& exponent, const SelectionScratch& scratch)
      : row_(row), columns_(columns), exponent_(exponent), scratch_(scratch) {}

  // `found` is in two parts, heads and others, each in ascending order of columns. Tokens go to `out`.
  void operator()(int64_t heads, int64_t found, double uniform, double step, int64_t wanted, Token* out) const {
    const Token *head = scratch_.found, *const head_end = head + heads;
    const Token *other = head_end, *const other_end = scratch_.found + found;
    double before = 0, position = uniform * step;
    int64_t drawn = 0;
    for (const auto [start, n] : for_blocks(columns_)) {
      if (drawn == wanted) break;
      double mass = scratch_.mass[start / block];
      for (; other != other_end && other->column < start + n; other++) mass += ::exp2(exponent_(other->value));
      if (before + mass <= position) {
        while (head != head_end && head->column < start + n) head++;
      } else {
        const float* z = without(row_, start, n, head, head_end, scratch_.copy);
        double reached = before;
        for (int64_t i = 0; i < n && drawn < wanted; i += lanes) {
          float e[lanes];
          const vec power = exp2_nonpositive(exponent_(load(z + i)));
          const double together = sum(power);
          if (reached + together <= position) {
            reached += together;
            continue;
          }
          store(e, power);
          for (int j = 0; j < lanes && drawn < wanted; j++) {
            reached += e[j];
            if (e[j] == 0 || reached <= position) continue;
            out[drawn++] = {0, (int32_t)(start + i + j)};
            position = (uniform + drawn) * step;
          }
        }
      }
      before += mass;
    }
    const Token* const drawn_end = out + drawn;
    for (other = head_end; drawn < wanted && other != other_end; other++) {
      const auto same = [&](const Token& token) { return token.column == other->column; };
      if (std::none_of(static_cast<const Token*>(out), drawn_end, same)) out[drawn++] = {0, other->column};
    }
  }

 private:
  const Reader& row_;
  int64_t columns_;
  const Exponent& exponent_;
  const SelectionScratch& scratch_;
};

inline void write_tokens(const Selection& call, int64_t i, Token* tokens, int64_t count) {
  std::sort(tokens, tokens + count, earlier);
  for (int64_t j = 0; j < call.k; j++) {
    call.ids[i * call.k + j] = j < count ? tokens[j].column : 0;
    call.log_weights[i * call.k + j] = j < count ? tokens[j].value : -kInf;
  }
}

inline void write_nan(const Selection& call, int64_t i) {
  for (int64_t j = 0; j < call.k; j++) {
    call.ids[i * call.k + j] = 0;
    call.log_weights[i * call.k + j] = __builtin_nanf("");
  }
  call.summary[i] = __builtin_nanf("");
}

inline void one_top_k(const Selection& call, int64_t i, const Reader& row, float scale,
                      const SelectionScratch& scratch) {
  Token* const found = scratch.found;
  const int64_t count = find_likeliest(row, call.logits.width, call.k, scratch);
  std::sort(found, found + count, earlier);
  const float top = count ? std::min_element(found, found + count, likelier)->value : -kInf;
  const Exponent exponent{scale, top};
  const double rest = sum_rest<false>(row, call.logits.width, exponent, count, scratch).sum;
  double total = rest;
  for (int64_t j = 0; j < count; j++) total += ::exp2(exponent(found[j].value));
  if (!(total > 0)) return write_nan(call, i);
  const double log2_total = ::log2(total);
  for (int64_t j = 0; j < count; j++) found[j].value = (float)(ln2 * (exponent(found[j].value) - log2_total));
  write_tokens(call, i, found, count);
  call.summary[i] = (float)(ln2 * (::log2(rest) - log2_total));
}

// With e the masses in descending order and above[h] = the sum of all but the h largest, the heads are the first h for
// which e[h] < above[h] / (k - h): the step. Heads keep their mass; k - h draws share the rest equally.
inline void one_sample(const Selection& call, int64_t i, const Reader& row, float scale,
                       const SelectionScratch& scratch) {
  Token *const found = scratch.found, *const kept = scratch.kept;
  int64_t count = find_likeliest(row, call.logits.width, call.k, scratch);
  std::sort(found, found + count, earlier);
  const float top = count ? std::min_element(found, found + count, likelier)->value : -kInf;
  const Exponent exponent{scale, top};
  const Rest rest = sum_rest<true>(row, call.logits.width, exponent, count, scratch);
  std::sort(found, found + count, likelier);
  double* const above = scratch.above;
  double weighted = rest.weighted;
  above[count] = rest.sum;
  for (int64_t j = count; j--;) {
    const double y = exponent(found[j].value), e = ::exp2(y);
    above[j] = above[j + 1] + e;
    if (e != 0) weighted += e * y;
  }
  const double total = above[0];
  if (!(total > 0)) return write_nan(call, i);
  const double log2_total = ::log2(total);
  int64_t heads = 0;
  for (; heads < count; heads++) {
    const double e = ::exp2(exponent(found[heads].value));
    if (e == 0 || e * (double)(call.k - heads) < above[heads]) break;
    kept[heads] = {(float)(ln2 * (exponent(found[heads].value) - log2_total)), found[heads].column};
  }
  int64_t entries = heads;
  if (heads < call.k && above[heads] > 0) {
    std::sort(found, found + heads, earlier);
    std::sort(found + heads, found + count, earlier);
    const double step = above[heads] / (double)(call.k - heads);
    const Draws draw(row, call.logits.width, exponent, scratch);
    draw(heads, count, call.uniforms[i], step, call.k - heads, kept + heads);
    for (entries = call.k; entries-- > heads;) kept[entries].value = (float)(ln2 * (::log2(step) - log2_total));
    entries = call.k;
  }
  write_tokens(call, i, kept, entries);
  call.summary[i] = (float)(ln2 * (log2_total - weighted / total));
}

inline int select(const Selection& call) {
  const float scale = exponent_scale(call.temperature);
  const int64_t width = call.logits.width;
  const auto lay_out_scratch = [&](Arrays& arrays) { return lay_out(arrays, width, call.k); };
  return for_rows(call.rows, width, call.threads, lay_out_scratch, [&](int64_t i, const SelectionScratch& scratch) {
    const Reader row{row_at(call.logits, i), call.logits.dtype, scratch.buffer};
    (call.uniforms ? one_sample : one_top_k)(call, i, row, scale, scratch);
  });
}

}  // namespace FASTKD_ISA
