"""The checks of arguments, once each, with their messages: numbers, switches and tensors.

Each raises TypeError or ValueError that names the argument and quotes the value, and returns the value as Python has
it: numpy's numbers and switches are taken like Python's own.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COLDEST",
    "FLOATING",
    "HOTTEST",
    "check_counts",
    "floating",
    "holds_values",
    "integer",
    "integers",
    "is_checked",
    "number",
    "real",
    "switch",
    "temperature",
    "tensor",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Temperatures at which every divergence and gradient is right: 1/T is an fp32 number, T² leaves the value its digits.
COLDEST, HOTTEST = 1e-30, 1e6


def real(name: str, value: Any) -> float:
    """A finite number. Raises TypeError for what is none, ValueError for infinities and NaN."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def number(name: str, value: Any, *, least: float = 0, above: bool = False) -> float:
    """A finite number ≥ `least`, or > with `above`."""
    if not _is_real(value) or not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{name} must be a finite number {'>' if above else '>='} {least:g}, got {value!r}")
    return float(value)


def temperature(name: str, value: Any) -> float:
    """A temperature in [COLDEST, HOTTEST]."""
    number(name, value, above=True)
    if not COLDEST <= value <= HOTTEST:
        raise ValueError(
            f"{name} must be in [{COLDEST:g}, {HOTTEST:g}], where the loss keeps its digits, got {value!r}"
        )
    return float(value)


def integer(name: str, value: Any, *, least: int | None = None) -> int:
    """An integer, ≥ `least` where that is given."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {value!r}")
        value = operator.index(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return int(value)


def switch(name: str, value: Any) -> bool:
    """True or False; neither 0 and 1 nor texts, since "no" would be True."""
    numpy_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not isinstance(value, bool) and not numpy_bool:
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def tensor(name: str, value: Any, *, also: str = "", placed: bool = False) -> Tensor:
    """A dense tensor of this process; a DTensor too where it may be `placed`. `also` says what else is taken."""
    if not isinstance(value, Tensor):
        hint = ": pass its .logits" if isinstance(getattr(value, "logits", None), Tensor) else ""
        raise TypeError(f"{name} must be a torch.Tensor{also}, got {type(value).__name__}{hint}")
    if type(value) is not Tensor and hasattr(value, "full_tensor") and not placed:
        raise TypeError(
            f"{name} is a {type(value).__name__}, which several processes hold: pass .to_local() where that has whole "
            "rows of the vocabulary, else .full_tensor()"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}: pass .to_dense()")
    return value


def holds_values(name: str, value: Any) -> None:
    """ValueError for a tensor, or a source made of some, on the meta device."""
    if value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, which holds no values")


def floating(name: str, value: Any, *, also: str = "", placed: bool = False) -> Tensor:
    """A tensor of floating-point numbers of a dtype that losses take. The others as of `tensor`."""
    found = tensor(name, value, also=also, placed=placed)
    if found.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {found.dtype}")
    return found


def integers(name: str, value: Any) -> Tensor:
    """A tensor of integers, such as token ids."""
    found = tensor(name, value)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(f"{name} must be integers (token ids), got {found.dtype}")
    return found


def is_checked(values: Tensor) -> bool:
    """Whether a tensor's values are looked at: on the CPU; on GPUs with FASTKD_DEBUG=1, since that synchronises."""
    if torch.compiler.is_compiling() or type(values) not in (Tensor, torch.nn.Parameter):
        return False
    return values.device.type == "cpu" or os.environ.get("FASTKD_DEBUG") == "1"


def check_counts(name: str, values: Tensor) -> None:
    """Real, and where values are looked at finite and ≥ 0: weights of tokens, or a number of them."""
    if values.is_complex():
        raise TypeError(f"{name} must be real numbers, got {values.dtype}")
    if not is_checked(values):
        return
    wrong = ~(values.isfinite() & (values >= 0))
    if wrong.any():
        raise ValueError(f"{name} must be finite and >= 0, got {values[wrong].flatten()[0].item()}")


def _is_real(value: Any) -> bool:
    # The types come first: torch.compile knows them, and most values have them.
    return type(value) in (int, float) or (isinstance(value, numbers.Real) and not isinstance(value, bool))
