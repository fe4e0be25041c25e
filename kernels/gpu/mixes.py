"""A mix of divergences as one `divergences.Divergence`, whose functions are made of those of its parts.

In these functions a is a chain of the parts' numbers, ((weight, a, b), the other parts), and b the ratio that parts
take which are `about_top`. Each function calls that of the first part and the one made of all others, so only the parts
of a mix are compiled, in a straight line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import triton

from fastkd.divergences import PARAMETERS
from fastkd.kernels.gpu.divergences import DIVERGENCES, Divergence
from fastkd.rows import RowSpec

__all__ = ["divergence_of", "parameters_of"]

# --- templates: what the names FIRST, SECOND and OTHERS stand for is said when a function is made of one ----------
# ruff: noqa: F821


def _sum(p, q, gap, log_p, log_q, d, parts, ratio):
    """Of terms or slopes."""
    weight, a, b = parts[0]
    more = OTHERS(p, q, gap, log_p, log_q, d, parts[1], ratio)
    return weight * FIRST(p, q, gap, log_p, log_q, d, a, SECOND(b, ratio)) + more


def _close(forward, reverse, parts, ratio):
    weight, a, b = parts[0]
    value, slope_sum = FIRST(forward, reverse, a, b)
    more, more_slope_sum = OTHERS(forward, reverse, parts[1], ratio)
    return weight * value + more, weight * slope_sum + more_slope_sum


@triton.jit
def _no_sum(p, q, gap, log_p, log_q, d, parts, ratio):
    return 0.0


@triton.jit
def _no_close(forward, reverse, parts, ratio):
    return 0.0, 0.0


@triton.jit
def _own(b, ratio):
    return b


@triton.jit
def _ratio(b, ratio):
    return ratio


# --- what is made of them ---------------------------------------------------------------------------------------


def _made(template: Callable[..., Any], name: str, **functions: Any) -> Any:
    """A device function of its own name: Triton tells functions apart by theirs, within a kernel.

    Its globals are its own. Triton follows a function's globals where it compiles it, and where it decides whether what
    it compiled before is still right; it does not follow closures where it interprets.
    """
    assert isinstance(template, FunctionType)
    made = FunctionType(template.__code__, {**template.__globals__, **functions}, template.__name__)
    made.__module__, made.__qualname__ = template.__module__, name
    return triton.jit(made)


def _chain(field: str, names: list[str], parts: list[Divergence]) -> Any:
    """The function that has the place of `field`, a term or a slope, in the mix of these parts."""
    made: Any = _no_sum
    for i in reversed(range(len(parts))):
        second = _ratio if parts[i].about_top else _own
        name = "_".join((field, *names[i:]))
        made = _made(_sum, name, FIRST=getattr(parts[i], field), SECOND=second, OTHERS=made)
    return made


def _closed_chain(names: list[str], parts: list[Divergence]) -> Any:
    made: Any = _no_close
    for i in reversed(range(len(parts))):
        made = _made(_close, "_".join(("close", *names[i:])), FIRST=parts[i].term, OTHERS=made)
    return made


@functools.cache
def divergence_of(name: str) -> Divergence:
    """The row of that name, or the mix: `+` and the name of each part."""
    if not name.startswith("+"):
        return DIVERGENCES[name]
    names = name[1:].split("+")
    parts = [DIVERGENCES[part] for part in names]
    slope = _chain("slope", names, parts)
    if all(part.sweeps == "closed" for part in parts):
        forward, reverse = any(part.forward for part in parts), any(part.reverse for part in parts)
        return Divergence(_closed_chain(names, parts), slope, "closed", forward=forward, reverse=reverse)
    return Divergence(
        _chain("in_mix", names, parts),
        slope,
        about_top=any(part.about_top for part in parts),
        vectors=1 if len(parts) > 1 else parts[0].vectors,
    )


def parameters_of(spec: RowSpec) -> tuple[Any, float]:
    """a and b of a divergence's functions."""
    if not spec.divergence.startswith("+"):
        a, b = (*spec.parameters, *(0.0,) * PARAMETERS)[:PARAMETERS]
        return a, b
    chain: Any = 0.0
    step = 1 + PARAMETERS
    for i in reversed(range(0, len(spec.parameters), step)):
        chain = (spec.parameters[i : i + step], chain)
    return chain, 0.0
