"""Terms by their names, as configurations have them: `{"type": "hidden", "layers": "uniform", "weight": 0.5}`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastkd import arguments
from fastkd.terms.attention import AttentionTerm
from fastkd.terms.hidden import HiddenStateTerm
from fastkd.terms.multi_token import MultiTokenTerm
from fastkd.terms.term import Course, Term

__all__ = ["TERMS", "term_named", "terms_named"]

#: type → class; its arguments are the other keys.
TERMS: dict[str, type[Term]] = {
    "hidden": HiddenStateTerm,
    "attention": AttentionTerm,
    "multi_token": MultiTokenTerm,
}
#: Arguments that may change over the training.
_COURSES = ("weight", "temperature")


def term_named(given: str | Mapping[str, Any]) -> Term:
    """One term.

    Args:
        given: a type, `"hidden"`, or a mapping with `type` and arguments of the class. `weight` and `temperature` are
            numbers, or `{"start": 1.0, "end": 0.0, "shape": "linear"}` for one that changes over the training.

    Raises TypeError or ValueError for unknown types, keys and values, with those there are.
    """
    if isinstance(given, str):
        given = {"type": given}
    if not isinstance(given, Mapping):
        raise TypeError(f"a term is a type or a mapping with one, got {given!r}")
    if "type" not in given:
        raise ValueError(f"a term needs a type, {_listed(TERMS)}: {dict(given)!r} has none")
    options = {name: value for name, value in given.items() if name != "type"}
    kind = TERMS.get(given["type"]) if isinstance(given["type"], str) else None
    if kind is None:
        raise ValueError(f"there is no term of type {given['type']!r}{_meant(given['type'], TERMS)}")
    known = list(inspect.signature(kind).parameters)
    for name in options:
        if name not in known:
            raise ValueError(f"a term of type {given['type']!r} has no {name!r}{_meant(name, known)}")
    for name in _COURSES:
        if name in options:
            options[name] = _value(f"{name} of the term {given['type']!r}", options[name])
    return kind(**options)


def terms_named(given: Sequence[str | Mapping[str, Any]]) -> list[Term]:
    """Several, in order. Raises as `term_named`."""
    if isinstance(given, str | Mapping):
        raise TypeError(f"terms are a list, got {given!r}")
    return [term_named(one) for one in given]


def _value(what: str, given: Any) -> float | Course:
    if not isinstance(given, Mapping):
        return arguments.real(what, given)
    wrong = next((name for name in given if name not in ("start", "end", "shape")), None)
    if wrong is not None or not {"start", "end"} <= given.keys():
        raise ValueError(f"{what} is a number, or has start, end and shape, got {dict(given)!r}")
    start, end = (arguments.real(f"the {which} of {what}", given[which]) for which in ("start", "end"))
    return Course(start, end, given.get("shape", "linear"))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _meant(word: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f": it is one of {_listed(known)}"
