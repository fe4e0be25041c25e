// The kernels of one instruction set. CMake compiles this file once for each, and FASTKD_ISA names its namespace.
//
// The headers build on each other in this order, and nothing includes against it:
//
//   api.h          the C interface
//   vector.h       vectors of floats and their elementary functions
//   blocks.h       a row of any dtype as fp32 blocks
//   threads.h      the rows of a call shared among threads, and their memory
//   row.h          what the sweeps share: numbers of the loss, memory, sums
//   divergences.h  one functor per divergence, and their list
//   mix.h          a weighted sum of them
//   near.h         blocks in which student and teacher nearly agree
//   sweeps.h       the three sweeps over a row
//   sparse.h       the loss of a row beside a sparse teacher
//   loss.h         the loss of a row, and a call of it
//   normaliser.h   log-softmax and row statistics, on row.h alone
//   mixture.h      several teachers as one, on normaliser.h
//   select.h       top-k and sampling, on normaliser.h
//   sparse_rows.h  the rows of a sparse teacher, checked, on threads.h alone
//
// Everything is in the namespace FASTKD_ISA, types that templates are instantiated with included. Otherwise the linker
// would keep one instruction set's copy of a template for all of them.
#include "loss.h"
#include "mixture.h"
#include "normaliser.h"
#include "select.h"
#include "sparse_rows.h"

namespace FASTKD_ISA {

Kernels kernels() {
  return {kd_rows, mix_rows, row_statistics, log_softmax, log_softmax_backward, select, sparse_rows, knows};
}

}  // namespace FASTKD_ISA
