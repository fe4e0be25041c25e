// The threads of a call: how many work, which rows each takes, and the memory in which each works.
#pragma once
#include "api.h"

#include <stdlib.h>
#include <utility>

namespace FASTKD_ISA {

// Hands out the arrays of one allocation, each at the start of a cache line. Without memory it only counts the bytes.
// So one function that takes arrays gives both the size of an allocation and its layout.
struct Arrays {
  char* memory = nullptr;
  int64_t bytes = 0;

  template <class Element>
  Element* take(int64_t count) {
    Element* const array = memory ? reinterpret_cast<Element*>(memory + bytes) : nullptr;
    bytes += (count * (int64_t)sizeof(Element) + 63) / 64 * 64;
    return array;
  }
};

// What `lay_out(Arrays&)` returns, a struct of arrays, with the memory behind it. One thread's own.
template <class Scratch>
class ThreadMemory {
 public:
  template <class LayOut>
  explicit ThreadMemory(const LayOut& lay_out) {
    Arrays counted;
    lay_out(counted);
    memory_ = static_cast<char*>(aligned_alloc(64, counted.bytes));
    Arrays arrays{memory_};
    scratch = lay_out(arrays);
  }
  ~ThreadMemory() { free(memory_); }
  ThreadMemory(const ThreadMemory&) = delete;
  bool failed() const { return memory_ == nullptr; }
  Scratch scratch;

 private:
  char* memory_;
};

constexpr int64_t kSerialBelow = 32768;  // elements: waking the other threads costs about 15 us

inline int team(int64_t rows, int64_t columns, int64_t threads) {
  const int64_t most = rows < threads ? rows : threads;
  return rows * columns < kSerialBelow || most < 1 ? 1 : (int)most;
}

// Rows a thread takes at a time. Enough that two threads seldom touch the same new huge page (2 MiB) of the gradient
// first, which the operating system serialises. Few enough that all threads stay busy to the end.
inline int64_t rows_per_turn(int64_t rows, int64_t columns, int threads) {
  const int64_t in_pages = 1 + (1 << 20) / (columns + 1), fair = rows / (4 * threads);
  return in_pages < fair ? in_pages : fair < 1 ? 1 : fair;
}

// Runs `body(i, scratch)` on rows 0 to rows - 1 of `columns` columns, with a scratch per thread as `lay_out` makes it.
// Returns an Outcome. Every loop over the rows of a call is this one.
template <class LayOut, class Body>
inline int for_rows(int64_t rows, int64_t columns, int64_t threads, const LayOut& lay_out, const Body& body) {
  using Scratch = decltype(lay_out(std::declval<Arrays&>()));
  int outcome = kDone;
  const int used = team(rows, columns, threads);
  const int64_t turn = rows_per_turn(rows, columns, used);
#pragma omp parallel num_threads(used)
  {
    ThreadMemory<Scratch> memory(lay_out);
    if (memory.failed()) {
#pragma omp atomic write
      outcome = kOutOfMemory;
    }
#pragma omp for schedule(dynamic, turn)
    for (int64_t i = 0; i < rows; i++)
      if (!memory.failed()) body(i, memory.scratch);
  }
  return outcome;
}

}  // namespace FASTKD_ISA
