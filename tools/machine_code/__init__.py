"""The machine code of the Triton kernels, read without a GPU.

`offline` compiles for GPUs that are not there and reads registers, spills and loops off the result; `roofline`
estimates what limits a kernel; `static` makes the table of both, `static.md`: `python -m tools.machine_code.static`.
"""
