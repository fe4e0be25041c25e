"""Which divergences a teacher can serve that is not whole logits, and at which temperature: one table.

The loss, a cache and the options of the commands all ask `refusal`.
"""

from __future__ import annotations

from typing import NamedTuple

from fastkd.divergences import TABLE, Divergence

__all__ = ["FORMATS", "SERVES", "Served", "refusal"]


class Served(NamedTuple):
    """What a kind of teacher can be used for, and why not for more."""

    divergences: tuple[str, ...]
    any_temperature: bool  # False: that at which it was made
    why: str


_TEMPERED = tuple(name for name, row in TABLE.items() if row.tempered)

#: `LogProbabilities`, the kinds of `SparseTargets`, and `Mixture`.
SERVES: dict[str, Served] = {
    "dense": Served(
        _TEMPERED, True, "holds log-probabilities, which are its teacher's logits up to a constant per row"
    ),
    "ghost": Served(_TEMPERED, False, "holds the probabilities of some tokens, and no logits"),
    "renormalize": Served(("forward_kl",), False, "does not have the tokens that it left out"),
    "sampled": Served(("forward_kl",), False, "does not have the tokens that it left out"),
    "mixture": Served(_TEMPERED, True, "has the probabilities of several teachers, and no logits"),
}
#: What a cache of each format is read as.
FORMATS = {"sampled": "sampled", "topk": "ghost", "dense": "dense"}
_CACHES = {kind: format for format, kind in FORMATS.items()}


def refusal(kind: str, divergence: Divergence) -> str | None:
    """Why a teacher of this kind cannot serve the divergence, and what could; None where it can."""
    serves = SERVES[kind]
    if _serves(serves, divergence):
        return None
    if not divergence.tempered:
        return (
            f"{divergence} compares raw logits, and a {kind!r} teacher {serves.why}: use a live teacher, or another "
            "divergence"
        )
    able = [name for name, other in SERVES.items() if name in _CACHES and _serves(other, divergence)]
    return (
        f"{divergence} needs every token's probability, and a {kind!r} teacher {serves.why}: use "
        f"{' or '.join(map(repr, serves.divergences))}, or a teacher of kind "
        f"{' or '.join(map(repr, able))} (a cache of format {' or '.join(repr(_CACHES[name]) for name in able)})"
    )


def _serves(served: Served, divergence: Divergence) -> bool:
    """What a teacher adds to the value where it serves some divergences only is theirs, and not a mix's."""
    return divergence.name in served.divergences or (divergence.tempered and served.divergences == _TEMPERED)
