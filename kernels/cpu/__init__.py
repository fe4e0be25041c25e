"""The native CPU backend: x86-64 with AVX2 or AVX-512, 64-bit Arm. Offers the functions of `fastkd.backend.Backend`."""

from fastkd.kernels.cpu.library import (
    kd_rows,
    log_softmax,
    log_softmax_backward,
    mix_rows,
    row_scales,
    row_statistics,
    sample,
    sparse_rows,
    top_k,
    weighted_total,
)
from fastkd.kernels.cpu.state import state_fields, tile_state

__all__ = [
    "kd_rows",
    "log_softmax",
    "log_softmax_backward",
    "mix_rows",
    "row_scales",
    "row_statistics",
    "sample",
    "sparse_rows",
    "state_fields",
    "tile_state",
    "top_k",
    "weighted_total",
]
