// The kernels of one instruction set: CMake compiles this file once for each, with FASTKD_ISA naming its namespace.
#include "loss.h"
#include "normaliser.h"
#include "select.h"

namespace FASTKD_ISA {

Kernels kernels() { return {kd_rows, row_statistics, log_softmax, log_softmax_backward, select, knows}; }

}  // namespace FASTKD_ISA
