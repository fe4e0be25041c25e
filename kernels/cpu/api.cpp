// The C entry points: the first call picks the instruction set, and every call is forwarded to its kernels.
#include "api.h"
#include "at_once.h"

#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define FASTKD_API extern "C" __attribute__((visibility("default")))

#if defined(FASTKD_HAS_v4)
namespace v4 { Kernels kernels(); }
#endif
#if defined(FASTKD_HAS_v3)
namespace v3 { Kernels kernels(); }
#endif
#if defined(FASTKD_HAS_generic)
namespace generic { Kernels kernels(); }
#endif

namespace {

struct Choice {
  const char* name;  // nullptr: this processor is not supported
  Kernels kernels;
};

// The environment variable FASTKD_ISA=v3 chooses AVX2 on a processor that has more, to compare or to test both.
Choice choose() {
#if defined(FASTKD_HAS_v4)
  __builtin_cpu_init();
  const char* wish = std::getenv("FASTKD_ISA");
  const bool narrow = wish && std::strcmp(wish, "v3") == 0;
  if (!narrow && __builtin_cpu_supports("x86-64-v4")) return {"x86-64-v4 (AVX-512)", v4::kernels()};
#endif
#if defined(FASTKD_HAS_v3)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) return {"x86-64-v3 (AVX2, FMA)", v3::kernels()};
#endif
#if defined(FASTKD_HAS_generic)
  return {"generic vectors of 128 bits", generic::kernels()};
#endif
  return {nullptr, {}};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

// What library.py asks before it uses a library: the version of this interface, which changes with the meaning of its
// functions; the instruction set; whether it knows a divergence; and the sizes that both sides must agree on.
FASTKD_API int fastkd_abi() { return 10; }

FASTKD_API const char* fastkd_isa() { return chosen().name; }

FASTKD_API int fastkd_knows(const char* divergence) { return chosen().kernels.knows(divergence); }

// Bytes of an argument struct, or of a row's state between tiles. -1 for any other name.
FASTKD_API int64_t fastkd_size(const char* name) {
  const struct { const char* name; int64_t size; } sizes[] = {
      {"KDRows", sizeof(KDRows)}, {"MixRows", sizeof(MixRows)}, {"Statistics", sizeof(Statistics)},
      {"LogSoftmax", sizeof(LogSoftmax)}, {"Selection", sizeof(Selection)},
      {"SparseInput", sizeof(SparseInput)}, {"RowScales", sizeof(RowScales)},
      {"WeightedTotal", sizeof(WeightedTotal)}, {"KDLoss", sizeof(KDLoss)}, {"RowState", sizeof(RowState)}};
  for (const auto& entry : sizes)
    if (std::strcmp(name, entry.name) == 0) return entry.size;
  return -1;
}

FASTKD_API int fastkd_kd_rows(const KDRows* call) { return chosen().kernels.kd_rows(*call); }

FASTKD_API int fastkd_kd_loss(const KDLoss* form, void* student, void* teacher, const int64_t* labels,
                              const float* weights, const float* upstream, void* grad, float* loss, double divisor,
                              int64_t threads) {
  const LossValues values{student, teacher, labels, weights, upstream, grad, loss, divisor, threads};
  return kd_loss(*form, values, chosen().kernels);
}

FASTKD_API int fastkd_mix_rows(const MixRows* call) { return chosen().kernels.mix_rows(*call); }

FASTKD_API int fastkd_row_statistics(const Statistics* call) { return chosen().kernels.row_statistics(*call); }

FASTKD_API int fastkd_log_softmax(const LogSoftmax* call) { return chosen().kernels.log_softmax(*call); }

FASTKD_API int fastkd_log_softmax_backward(const LogSoftmax* call) {
  return chosen().kernels.log_softmax_backward(*call);
}

FASTKD_API int fastkd_select(const Selection* call) { return chosen().kernels.select(*call); }

FASTKD_API int fastkd_sparse_rows(const SparseInput* call) { return chosen().kernels.sparse_rows(*call); }

FASTKD_API int fastkd_row_scales(const RowScales* call) {
  row_scales(*call);
  return kDone;
}

FASTKD_API int fastkd_weighted_total(const WeightedTotal* call) {
  weighted_total(*call);
  return kDone;
}

// Asks for huge pages under a fresh buffer, except in pages that it shares with others. The first touch of its memory
// is the largest cost of a new gradient.
FASTKD_API void fastkd_advise_huge_pages(char* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}
