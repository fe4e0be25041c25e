"""The Triton backend: NVIDIA, AMD and Intel GPUs. Offers the functions of `fastkd.backend.Backend`, and `scale_`."""

from fastkd.kernels.gpu.rows import kd_rows, scale_
from fastkd.kernels.gpu.state import tile_state
from fastkd.kernels.gpu.statistics import log_softmax, log_softmax_backward, row_statistics

__all__ = ["kd_rows", "log_softmax", "log_softmax_backward", "row_statistics", "scale_", "tile_state"]
