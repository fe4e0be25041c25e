"""Elementary functions of the kernels, fp32, each with its error: from basic operations and what every GPU has.

libdevice exists neither in Triton's interpreter nor in the same form for AMD.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """e^x − 1 to about 3e-7 of itself."""
    tail = 0.5 + x * (0.166664466 + x * (0.0416659825 + x * (0.00837764330 + x * 0.00139655964)))
    return tl.where(tl.abs(x) < 0.4, x + x * x * tail, exp(x) - 1)


@triton.jit
def log2(x):
    """log2 of a positive x that is no denormal; to 2^-22, or from 2 on and up to 1/2 to 2^-22 of itself.

    Triton's own is right to the last bit on NVIDIA, and 22 instructions; the processor's is one.
    """
    if is_cuda():
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1 / x of an x from 1e-37 to 1e37, to about 4e-7 of itself. A division takes 8 instructions and more."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def log_near_one(x, x_minus_one):
    """log x of a positive x to about 2e-7 of itself, given x − 1 more accurately than x tells it."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # x = 2^e·m with m in [2/3, 4/3): e, where a float has its exponent
    m = (bits - power).to(tl.float32, bitcast=True)
    f = tl.where(tl.abs(x_minus_one) > 0.3, m - 1, x_minus_one)  # NaN chooses x_minus_one, and stays
    tail = -0.164193973 + f * (0.139209390 + f * (-0.153725162 + f * 0.143740639))
    tail = -0.499999404 + f * (0.333331078 + f * (-0.250075966 + f * (0.200160578 + f * tail)))
    return power.to(tl.float32) * (LN2 / 0x800000) + (f + f * f * tail)


@triton.jit
def weighted(probability, value):
    """probability · value, and 0 where the probability is 0 even if the value is infinite there, or NaN."""
    return tl.where(probability == 0, 0.0, probability * value)
