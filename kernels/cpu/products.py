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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["detail", "gains_in_torch", "missing", "multiplies", "multiply", "pieces"]

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
#: What takes so many times as long at first is not measured any further: emulated products may take seconds.
_HOPELESS = 8
#: Relative, of sums of 512 products in fp32 against others: far more than another order of summation explains.
_SAME = 1e-5


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of such matrices are to go to `multiply`, else to be computed in fp32.

    The same throughout a process, unless FASTKD_CPU_PRODUCTS changes. Raises ValueError where that names no way, and
    RuntimeError where it names one that this PyTorch does not have, whatever the dtype.
    """
    named = _named()
    return dtype == torch.bfloat16 and (named or _once(_race)).way == "mkl"


def detail() -> str:
    """The way of bfloat16 and why, for people. Raises as `multiplies` does."""
    way, reason = _named() or _once(_race)
    return f"bf16 products: {way} ({reason})"


def missing() -> str | None:
    """What keeps oneMKL's product out of the race here, for people; None where it takes part."""
    if not _has_units():
        return "no bf16 units"
    return f"PyTorch {torch.__version__} exports no {_SYMBOL}" if _gemm() is None else None


def gains_in_torch() -> bool:
    """Whether PyTorch's own products are clearly faster in bfloat16 here, as a model's layers ask for them in autocast.

    Raced once in a process, and False without a race where the processor has no units for bfloat16.
    """
    return _once(_race_in_torch)


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


_Outcome = TypeVar("_Outcome")
_lock = threading.Lock()
_found: dict[Callable[[], Any], Any] = {}


def _once(race: Callable[[], _Outcome]) -> _Outcome:
    """What a race says: remembered, so that a process adds up in one order."""
    with _lock:
        if race not in _found:
            _found[race] = race()
        outcome: _Outcome = _found[race]
        return outcome


def _race() -> _Choice:
    if reason := missing():
        return _Choice("fp32", reason)
    gain, error = _raced(_in_fp32, _by_mkl)
    if not error <= _SAME:
        return _Choice("fp32", f"those of mkl have a relative error of {error:.1e}")
    return _Choice("mkl" if gain >= _CLEARLY else "fp32", f"mkl is {gain:.2f} times as fast")


def _race_in_torch() -> bool:
    return _has_units() and _raced(_layer_in_fp32, _layer_in_bf16)[0] >= _CLEARLY


class _Head:
    """What is raced on: the operands of an output head's three products, and room for their results."""

    def __init__(self) -> None:
        tokens, hidden, columns = _RACED
        self.x, self.weight, self.gradient = _made(tokens, hidden), _made(columns, hidden), _made(tokens, columns)
        self.narrow_x, self.narrow_weight = self.x.bfloat16(), self.weight.bfloat16()
        self.spent = self.gradient.clone()  # what may be overwritten
        shapes = self.gradient.shape, self.x.shape, self.weight.shape
        self.results = [torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in shapes]


def _made(rows: int, width: int) -> Tensor:
    """fp32 numbers that bfloat16 can hold; no generator of anybody's is asked for them."""
    numbers = torch.arange(rows * width, dtype=torch.float32, device="cpu").sin_().view(rows, width)
    return numbers.bfloat16().float()


def _in_fp32(head: _Head) -> None:
    """As a loss from bfloat16 hidden states does it: the head is cast where it is needed."""
    logits, d_hidden, d_weight = head.results
    torch.mm(head.x, head.narrow_weight.float().t(), out=logits)
    gradient = head.spent.copy_(head.gradient)
    torch.mm(gradient, head.narrow_weight.float(), out=d_hidden)
    torch.mm(gradient.t(), head.x, out=d_weight)


def _by_mkl(head: _Head) -> None:
    logits, d_hidden, d_weight = head.results
    multiply(head.narrow_x, head.narrow_weight.t(), logits)
    for number, piece in enumerate(pieces(head.spent.copy_(head.gradient))):
        multiply(piece, head.narrow_weight, d_hidden, accumulate=number > 0)
        multiply(piece.t(), head.narrow_x, d_weight, accumulate=number > 0)


def _layer_in_fp32(head: _Head) -> None:
    torch.mm(head.x, head.weight.t())
    torch.mm(head.gradient, head.weight)
    torch.mm(head.gradient.t(), head.x)


def _layer_in_bf16(head: _Head) -> None:
    """As autocast does it: parameters in fp32 are cast once a step."""
    weight, gradient = head.weight.bfloat16(), head.gradient.bfloat16()
    torch.mm(head.narrow_x, weight.t())
    torch.mm(gradient, weight)
    torch.mm(gradient.t(), head.narrow_x)


_Contender = Callable[[_Head], None]


def _raced(fp32: _Contender, bf16: _Contender) -> tuple[float, float]:
    """How many times as long fp32 takes, and how far the results are apart, relative.

    In a thread of its own, where no dispatch mode, autocast or default of the caller's is in force.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_race_of, fp32, bf16).result()


@torch.no_grad()
def _race_of(fp32: _Contender, bf16: _Contender) -> tuple[float, float]:
    wide, narrow = _Head(), _Head()
    first = _seconds(fp32, wide), _seconds(bf16, narrow)  # both get their memory and threads
    if first[1] > _HOPELESS * first[0]:
        return first[0] / first[1], 0.0
    taken = [(_seconds(fp32, wide), _seconds(bf16, narrow)) for _ in range(_ROUNDS)]
    gain = statistics.median(one for one, _ in taken) / statistics.median(other for _, other in taken)
    apart = [float((a - b).norm() / b.norm().clamp(min=1)) for a, b in zip(narrow.results, wide.results, strict=True)]
    return gain, max(apart)


def _seconds(run: _Contender, head: _Head) -> float:
    start = time.perf_counter()
    run(head)
    return time.perf_counter() - start
