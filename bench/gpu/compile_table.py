"""Compiles the kernels that `launch_table` times, by as many processes as there are."""

from bench.gpu.launch_table import compile_all as run

__all__ = ["run"]
