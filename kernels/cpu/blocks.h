// Rows as all other headers see them: in blocks of `block` columns, as fp32 in the first-level cache, whatever the
// dtype. The last block is padded to whole vectors with -inf (probability 0), so no other loop treats its end apart.
#pragma once
#include "api.h"
#include "vector.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace FASTKD_ISA {

constexpr int64_t block = 1024;

// The blocks of `columns` columns: for (const auto [start, n] : for_blocks(columns)). n is `block` in all but the last.
// Every loop over blocks is this one, so that its step, end and length cannot disagree.
struct Block {
  int64_t start, n;
};
struct for_blocks {
  int64_t columns;
  explicit for_blocks(int64_t columns) : columns(columns) {}

  struct Iterator {
    int64_t start, columns;
    Block operator*() const { return {start, columns - start < block ? columns - start : block}; }
    void operator++() { start += block; }
    bool operator!=(const Iterator&) const { return start < columns; }
  };
  Iterator begin() const { return {0, columns}; }
  Iterator end() const { return {columns, columns}; }
};

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t element_size(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Where row i of a matrix starts.
inline char* row_at(const Matrix& m, int64_t i) {
  const int64_t offset = i / m.inner * m.outer_stride + i % m.inner * m.inner_stride;
  return static_cast<char*>(m.data) + offset * element_size(m.dtype);
}

inline float widen_bf16(uint16_t x) {
  const uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t narrow_bf16(float x) {  // to nearest even; a NaN stays a NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

#if defined(__F16C__)
inline void widen_fp16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < n; i++) to[i] = _cvtsh_ss(from[i]);
}
inline void narrow_fp16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  for (; i < n; i++) to[i] = _cvtss_sh(from[i], 0);
}
#else
inline void widen_fp16(const uint16_t* from, float* to, int64_t n) {
  const _Float16* half = reinterpret_cast<const _Float16*>(from);
  for (int64_t i = 0; i < n; i++) to[i] = (float)half[i];
}
inline void narrow_fp16(const float* from, uint16_t* to, int64_t n) {
  _Float16* half = reinterpret_cast<_Float16*>(to);
  for (int64_t i = 0; i < n; i++) half[i] = (_Float16)from[i];
}
#endif

// How many of `count` ascending numbers are below `least`.
inline int64_t lower_bound(const int64_t* numbers, int64_t count, int64_t least) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (numbers[middle] < least) low = middle + 1;
    else count = middle;
  }
  return low;
}

// Fetches the columns from some column on into the cache.
struct Prefetch {
  const char* from;
  int64_t size;  // of an element
  void operator()(int64_t column) const { __builtin_prefetch(from + column * size); }
};

// A row to be read. `buffer` has room for one block.
struct Reader {
  const char* row;
  int64_t dtype;
  float* buffer;
  // Columns that `fetch` gives as -inf, ascending. They are columns of the whole row, where this one begins at `first`.
  const int64_t* excluded = nullptr;
  int64_t excluded_count = 0, first = 0;

  float at(int64_t column) const {
    if (dtype == kFloat32) return reinterpret_cast<const float*>(row)[column];
    const uint16_t x = reinterpret_cast<const uint16_t*>(row)[column];
    float f;
    if (dtype == kBFloat16) return widen_bf16(x);
    widen_fp16(&x, &f, 1);
    return f;
  }

  Prefetch prefetch(int64_t start) const { return {row + start * element_size(dtype), element_size(dtype)}; }

  // Columns [start, start + n) as fp32, readable up to a whole number of vectors.
  const float* fetch(int64_t start, int64_t n) const {
    int64_t next = excluded_count ? lower_bound(excluded, excluded_count, first + start) : 0;
    const auto here = [&] { return next < excluded_count && excluded[next] < first + start + n; };
    const bool excludes = here();
    if (dtype == kFloat32) {
      const float* from = reinterpret_cast<const float*>(row) + start;
      if (n % lanes == 0 && !excludes) return from;
      memcpy(buffer, from, n * sizeof(float));
    } else {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + start;
      if (dtype == kFloat16) widen_fp16(from, buffer, n);
      else for (int64_t i = 0; i < n; i++) buffer[i] = widen_bf16(from[i]);
    }
    for (int64_t i = n; i % lanes; i++) buffer[i] = -kInf;
    for (; here(); next++) buffer[excluded[next] - first - start] = -kInf;
    return buffer;
  }
};

// A row to be written. Put the fp32 values of a block where `target` says, then `flush` rounds them into the row.
struct Writer {
  char* row;
  int64_t dtype;
  float* buffer;

  float* target(int64_t start, int64_t n) const {
    return dtype == kFloat32 && n % lanes == 0 ? reinterpret_cast<float*>(row) + start : buffer;
  }

  void flush(const float* from, int64_t start, int64_t n) const {
    if (dtype == kFloat32) {
      float* to = reinterpret_cast<float*>(row) + start;
      if (from != to) memcpy(to, from, n * sizeof(float));
    } else {
      uint16_t* to = reinterpret_cast<uint16_t*>(row) + start;
      if (dtype == kFloat16) narrow_fp16(from, to, n);
      else for (int64_t i = 0; i < n; i++) to[i] = narrow_bf16(from[i]);
    }
  }

  void put(int64_t column, float value) const { flush(&value, column, 1); }

  void zero(int64_t start, int64_t end) const {
    const int64_t size = element_size(dtype);
    if (end > start) memset(row + start * size, 0, (end - start) * size);
  }
};

}  // namespace FASTKD_ISA
