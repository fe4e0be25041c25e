"""The Triton backend: NVIDIA, AMD and Intel GPUs. Offers the functions of `fastkd.backend.Backend`, and `scale_`."""

from fastkd.kernels.gpu.mixture import mix_rows
from fastkd.kernels.gpu.row_scalars import row_scales, weighted_total
from fastkd.kernels.gpu.rows import kd_rows
from fastkd.kernels.gpu.scale import scale_
from fastkd.kernels.gpu.state import state_fields, tile_state
from fastkd.kernels.gpu.statistics import log_softmax, log_softmax_backward, row_statistics
from fastkd.reference import sample, top_k  # torch's own selection runs on the device

__all__ = [
    "kd_rows",
    "log_softmax",
    "log_softmax_backward",
    "mix_rows",
    "row_scales",
    "row_statistics",
    "sample",
    "scale_",
    "state_fields",
    "tile_state",
    "top_k",
    "weighted_total",
]
