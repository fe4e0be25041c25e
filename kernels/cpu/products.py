"""Products of bfloat16 matrices that keep their fp32 sums, on processors with units for bfloat16.

On CPUs PyTorch's own products round their result to the operands' dtype. There are two ways around that:

| way | what is multiplied | runs on |
|---|---|---|
| fp32 | copies in fp32, which hold every 16-bit number | any processor |
| mkl | the matrices as they are, by `cblas_gemm_bf16bf16f32` of oneMKL, which PyTorch's x86 builds contain | x86 |

A processor with units for bfloat16 (AVX512-BF16, AMX) may be several times faster the second way, or slower: oneMKL has
not a good kernel for each of them. So the two are raced, once in a process, when the first such product is near.
FASTKD_CPU_PRODUCTS names one in place of the race.

oneMKL has such a product of fp16 too. It is not used: gradients would leave fp16's range.
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["detail", "multiplies", "multiply", "pieces"]

#: Values of FASTKD_CPU_PRODUCTS.
_WAYS = ("auto", "fp32", "mkl")
_SYMBOL = "cblas_gemm_bf16bf16f32"
#: As Linux calls the units. Without them oneMKL computes the same, as fast as fp32 or many times slower.
_UNITS = {"avx512_bf16", "amx_bf16"}
#: Tokens, hidden size and columns of the products that are raced: 0.5 GFLOP each.
_RACED = 256, 512, 2048
_ROUNDS = 3
#: What bfloat16 must gain in the race: a smaller gain may be noise, and another process might find otherwise.
_CLEARLY = 1.15
#: Relative, of sums of 512 products in fp32 against others: far more than another order of summation explains.
_SAME = 1e-5


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of such matrices are to go to `multiply`, else to be computed in fp32.

    The same throughout a process, unless FASTKD_CPU_PRODUCTS changes. Raises ValueError where that names no way, and
    RuntimeError where it names one that this PyTorch does not have, whatever the dtype.
    """
    named = _named()
    return dtype == torch.bfloat16 and (named or _raced()).way == "mkl"


def detail() -> str:
    """The way of bfloat16 and why, for people. Raises as `multiplies` does."""
    way, reason = _named() or _raced()
    return f"bf16 products: {way} ({reason})"


def pieces(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices, whose sum is an fp32 one to 16 of its 24 bits; that is overwritten.

    One would have an error as large as that of rounding the result.
    """
    high = gradient.to(torch.bfloat16)
    return high, gradient.sub_(high).to(torch.bfloat16)


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """a·b into `out`, or added to it. `a` and `b` are bfloat16, `[m, k]` and `[k, n]`; `out` is fp32 with rows."""
    gemm = _gemm()
    assert gemm is not None, f"{_SYMBOL} was chosen without being there"
    assert a.dtype == b.dtype == torch.bfloat16, f"operands are {a.dtype} and {b.dtype}"
    assert out.dtype == torch.float32, f"the result is {out.dtype}"
    (m, k), n = a.shape, b.shape[1]
    assert b.shape[0] == k, f"{tuple(a.shape)} times {tuple(b.shape)}"
    assert out.shape == (m, n), f"{tuple(a.shape)} times {tuple(b.shape)} into {tuple(out.shape)}"
    a, a_order, a_stride = _laid_out(a)
    b, b_order, b_stride = _laid_out(b)
    where, order, stride = _laid_out(out)
    assert where is out, f"a product cannot be written to strides {out.stride()}"
    assert order == _AS_IT_IS, f"a product is written to rows, not to columns, of strides {out.stride()}"
    gemm(
        *(_ROW_MAJOR, a_order, b_order, m, n, k),
        *(1.0, a.data_ptr(), a_stride, b.data_ptr(), b_stride, float(accumulate), out.data_ptr(), stride),
    )


#: CBLAS: rows lie behind each other; a matrix as it is, or transposed.
_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
_LARGEST = 2**31 - 1


def _laid_out(matrix: Tensor) -> tuple[Tensor, int, int]:
    """A matrix, how CBLAS is to read it, and from row to row (or column to column): copied where CBLAS could not."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    if (right == 1 or columns == 1) and (rows == 1 or columns <= down <= _LARGEST):
        return matrix, _AS_IT_IS, max(columns, down if rows > 1 else 1)
    if (down == 1 or rows == 1) and (columns == 1 or rows <= right <= _LARGEST):
        return matrix, _TRANSPOSED, max(rows, right if columns > 1 else 1)
    return matrix.contiguous(), _AS_IT_IS, columns


@functools.cache
def _gemm() -> Callable[..., None] | None:
    """oneMKL's product, or None where this PyTorch does not have it."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            gemm: Any = getattr(ctypes.CDLL(str(path)), _SYMBOL)
        except (OSError, AttributeError):
            continue
        scalar, matrix, size = ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        gemm.restype = None
        gemm.argtypes = [size] * 6 + [scalar, matrix, size, matrix, size, scalar, matrix, size]
        return gemm  # type: ignore[no-any-return]
    return None


@functools.cache
def _has_units() -> bool:
    """Whether the processor has units for bfloat16, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and _UNITS & {*line.split()} for line in lines)


class _Choice(NamedTuple):
    way: str
    reason: str


def _named() -> _Choice | None:
    """What FASTKD_CPU_PRODUCTS says; None for a race."""
    way = os.environ.get("FASTKD_CPU_PRODUCTS", "auto")
    if way not in _WAYS:
        raise ValueError(f"FASTKD_CPU_PRODUCTS={way!r}: choose one of {', '.join(_WAYS)}, or unset it")
    if way == "mkl" and _gemm() is None:
        raise RuntimeError(
            f"FASTKD_CPU_PRODUCTS='mkl', but PyTorch {torch.__version__} exports no {_SYMBOL}: unset it, or install "
            "PyTorch's build for x86 and Linux"
        )
    return None if way == "auto" else _Choice(way, "FASTKD_CPU_PRODUCTS")


_lock = threading.Lock()
_found: list[_Choice] = []


def _raced() -> _Choice:
    """What the race says: remembered, so that a process adds up in one order."""
    with _lock:
        if not _found:
            _found.append(_race())
        return _found[0]


def _race() -> _Choice:
    if not _has_units():
        return _Choice("fp32", "no bf16 units")
    if _gemm() is None:
        return _Choice("fp32", f"PyTorch {torch.__version__} exports no {_SYMBOL}")
    # In a thread of its own no dispatch mode, autocast or default of the caller's is in force.
    with ThreadPoolExecutor(1) as thread:
        gain, error = thread.submit(_gain).result()
    if not error <= _SAME:
        return _Choice("fp32", f"those of mkl have a relative error of {error:.1e}")
    return _Choice("mkl" if gain >= _CLEARLY else "fp32", f"mkl is {gain:.2f} times as fast")


@torch.no_grad()
def _gain() -> tuple[float, float]:
    """How many times as long fp32 takes for a head's three products, and how far the two ways are apart."""
    tokens, hidden, columns = _RACED

    def matrix(rows: int, width: int, dtype: torch.dtype) -> Tensor:  # takes no number from anybody's generator
        return torch.arange(rows * width, dtype=torch.float32, device="cpu").sin_().view(rows, width).to(dtype)

    x, weight = matrix(tokens, hidden, torch.bfloat16), matrix(columns, hidden, torch.bfloat16)
    gradient, given = matrix(tokens, columns, torch.float32), torch.empty(tokens, columns, device="cpu")
    results = {
        way: [torch.empty(*shape, dtype=torch.float32, device="cpu") for shape in (given.shape, x.shape, weight.shape)]
        for way in ("fp32", "mkl")
    }

    def in_fp32() -> None:
        logits, d_hidden, d_weight = results["fp32"]
        given.copy_(gradient)
        wide = x.float()
        torch.mm(wide, weight.float().t(), out=logits)
        torch.mm(given, weight.float(), out=d_hidden)
        torch.mm(given.t(), wide, out=d_weight)

    def by_mkl() -> None:
        logits, d_hidden, d_weight = results["mkl"]
        given.copy_(gradient)
        multiply(x, weight.t(), logits)
        for number, piece in enumerate(pieces(given)):
            multiply(piece, weight, d_hidden, accumulate=number > 0)
            multiply(piece.t(), x, d_weight, accumulate=number > 0)

    seconds: dict[str, list[float]] = {"fp32": [], "mkl": []}
    for _ in range(1 + _ROUNDS):
        seconds["fp32"].append(_seconds(in_fp32))
        seconds["mkl"].append(_seconds(by_mkl))
    fp32, mkl = (statistics.median(taken[1:]) for taken in seconds.values())
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(results["mkl"], results["fp32"], strict=True)]
    return fp32 / mkl, max(errors)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
