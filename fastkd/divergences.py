"""The divergence table: what a distillation loss can measure between teacher p and student q.

One row per divergence, a small frozen object carrying its parameters. Everything that iterates over divergences
(`KDLoss`, the kernels, the tests, the benchmarks) iterates over `TABLE`. ARCHITECTURE.md says what adding one takes.
A `Mix` is a weighted sum of rows.

`resolve` turns limits into the divergence they equal (`JSD(beta=0)` is forward KL), so that no kernel divides by zero.

What a loss hands to a backend is a name and numbers, and `of_spec` makes the divergence of them again. A mix is called
`+` and the name of each of its parts, as in `+forward_kl+tvd`. Its numbers are, for each part, the weight and
`PARAMETERS` numbers: the part's own, then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import ClassVar

from fastkd import arguments

__all__ = [
    "JSD",
    "MSE",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Mix",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "SymmetricKL",
]

#: The most parameters that a row of the table has, and the most parts of a mix: kernels keep room for so many.
PARAMETERS, PARTS = 2, 16
#: Of a part of a mix, so that its gradient is an fp32 number.
LARGEST_WEIGHT = 1e30


@dataclass(frozen=True)
class Divergence:
    """Base of the table's rows. `name` is what users write and what the kernels dispatch on."""

    name: ClassVar[str]
    #: Whether temperature applies (raw-logit MSE has neither temperature nor softmax).
    tempered: ClassVar[bool] = True
    #: Whether a term can only be computed once both softmaxes are normalised, which is one more sweep over the logits.
    normalised: ClassVar[bool] = True
    #: Whether the gradient of a row's logits stays small however far apart the two sides are.
    bounded: ClassVar[bool] = False

    @property
    def parameters(self) -> tuple[float, ...]:
        """The parameters in declaration order, as the kernels take them."""
        return tuple(float(value) for value in astuple(self))

    @property
    def parts(self) -> tuple[tuple[Divergence, float], ...]:
        """The divergences whose weighted sum this one is; itself where it is no sum."""
        return ((self, 1.0),)

    def canonical(self) -> Divergence:
        """The divergence this one equals at the limits of its parameters; itself elsewhere."""
        return self

    def __post_init__(self) -> None:
        for field in fields(self):
            arguments.real(f"{type(self).__name__} {field.name}", getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Raise ValueError where a parameter is out of its range."""

    def _check_range(self, field: str, low: float, high: float, *, open_high: bool = False) -> None:
        value = getattr(self, field)
        inside = low <= value < high if open_high else low <= value <= high
        if not inside:
            bracket = ")" if open_high else "]"
            raise ValueError(f"{type(self).__name__}({field}={value}): {field} must be in [{low:g}, {high:g}{bracket}")


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p ‖ q) = Σ p (log p − log q): the classical, mass-covering distillation loss (Hinton et al. 2015)."""

    name: ClassVar[str] = "forward_kl"
    bounded: ClassVar[bool] = True
    normalised: ClassVar[bool] = False


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q ‖ p) = Σ q (log q − log p): mode-seeking (MiniLLM, Gu et al. 2024)."""

    name: ClassVar[str] = "reverse_kl"
    normalised: ClassVar[bool] = False


@dataclass(frozen=True)
class JSD(Divergence):
    """β·KL(p ‖ m) + (1−β)·KL(q ‖ m) with m = βp + (1−β)q (GKD, Agarwal et al. 2024).

    β = 0 and β = 1 select forward and reverse KL, as GKD's implementation does.
    """

    name: ClassVar[str] = "jsd"
    bounded: ClassVar[bool] = True
    beta: float = 0.5

    def check(self) -> None:
        self._check_range("beta", 0, 1)

    def canonical(self) -> Divergence:
        if self.beta == 0:
            return ForwardKL()
        return ReverseKL() if self.beta == 1 else self


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p ‖ λp + (1−λ)q) (DistiLLM, Ko et al. 2024)."""

    name: ClassVar[str] = "skew_kl"
    bounded: ClassVar[bool] = True
    lam: float = 0.1

    def check(self) -> None:
        self._check_range("lam", 0, 1, open_high=True)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.lam == 0 else self


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q ‖ (1−λ)p + λq) (DistiLLM, Ko et al. 2024)."""

    name: ClassVar[str] = "skew_reverse_kl"
    bounded: ClassVar[bool] = True
    lam: float = 0.1

    def check(self) -> None:
        self._check_range("lam", 0, 1, open_high=True)

    def canonical(self) -> Divergence:
        return ReverseKL() if self.lam == 0 else self


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """weight·KL(p ‖ q) + (1−weight)·KL(q ‖ p)."""

    name: ClassVar[str] = "symmetric_kl"
    normalised: ClassVar[bool] = False
    weight: float = 0.5

    def check(self) -> None:
        self._check_range("weight", 0, 1)

    @property
    def parts(self) -> tuple[tuple[Divergence, float], ...]:
        return ((ForwardKL(), self.weight), (ReverseKL(), 1 - self.weight))

    def canonical(self) -> Divergence:
        if self.weight == 0:
            return ReverseKL()
        return ForwardKL() if self.weight == 1 else self


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance ½ Σ |p − q|, in [0, 1]."""

    name: ClassVar[str] = "tvd"
    bounded: ClassVar[bool] = True


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """½ Σ (√p − √q)² = 1 − Σ √(pq), in [0, 1]: the square of Hellinger's distance (Hellinger 1909).

    A quarter of `AlphaBeta(alpha=0.5, beta=0.5)`.
    """

    name: ClassVar[str] = "squared_hellinger"
    bounded: ClassVar[bool] = True


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """−1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] (Cichocki et al. 2010; ABKD, Wang et al. 2025).

    (1, 0) is forward KL and (0, 1) is reverse KL; α = 0, β = 0 and α + β = 0 take their limits.
    """

    name: ClassVar[str] = "alpha_beta"
    alpha: float = 0.2
    beta: float = 0.7

    def canonical(self) -> Divergence:
        if (self.alpha, self.beta) == (1, 0):
            return ForwardKL()
        return ReverseKL() if (self.alpha, self.beta) == (0, 1) else self


@dataclass(frozen=True)
class MSE(Divergence):
    """Mean over the vocabulary of (z_student − z_teacher)²: raw logits, no temperature, no softmax."""

    name: ClassVar[str] = "mse"
    normalised: ClassVar[bool] = False
    tempered: ClassVar[bool] = False


TABLE: dict[str, type[Divergence]] = {
    row.name: row
    for row in (
        ForwardKL,
        ReverseKL,
        JSD,
        SkewKL,
        SkewReverseKL,
        SymmetricKL,
        TVD,
        SquaredHellinger,
        AlphaBeta,
        MSE,
    )
}


@dataclass(frozen=True, init=False, repr=False)
class Mix(Divergence):
    """Σ weight · divergence: several divergences, computed in the same sweeps over the logits.

    `Mix({ForwardKL(): 0.5, TVD(): 0.5})`; a name (`"tvd"`) takes the default parameters. Weights are numbers in
    [0, 1e30], one of them above 0. They need not sum to 1: the value is the sum as it stands. In a text, such as an
    option of a command: `forward_kl:0.5+tvd:0.5`.

    A mix in a mix is its parts, equal parts are one, a part of weight 0 is none, and a single part of weight 1 is that
    divergence. Not to be confused with `Mixture`, which is one teacher made of several.

    Raises TypeError where `parts` is no mapping or a weight no number; ValueError for a wrong weight, an unknown name,
    no part or more than 16, and for `MSE`, which has neither softmax nor T².
    """

    given: tuple[tuple[Divergence, float], ...]

    def __init__(self, parts: Mapping[Divergence | str, float]) -> None:
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"Mix takes a mapping from divergences to weights, such as {{fastkd.ForwardKL(): 0.5, fastkd.TVD(): "
                f"0.5}}, got {type(parts).__name__}"
            )
        given = tuple((_row(key), arguments.real(f"Mix weight of {key}", weight)) for key, weight in parts.items())
        object.__setattr__(self, "given", given)
        self.check()

    def check(self) -> None:
        for part, weight in self.given:
            if not 0 <= weight <= LARGEST_WEIGHT:
                raise ValueError(f"Mix weight of {part} must be in [0, {LARGEST_WEIGHT:g}], got {weight}")
            if not part.tempered:
                raise ValueError(
                    f"{part} compares raw logits, without softmax and T², and cannot be a part of a Mix: add a second "
                    "loss in its place"
                )
        if not any(weight > 0 for _, weight in self.given):
            raise ValueError(f"a Mix needs a part with a weight above 0, got {self}")
        if len(self.given) > PARTS:
            raise ValueError(f"a Mix has at most {PARTS} parts, got {len(self.given)}")

    def __repr__(self) -> str:
        return f"Mix({{{', '.join(f'{part}: {weight!r}' for part, weight in self.given)}}})"

    @property
    def name(self) -> str:  # type: ignore[override]
        return "".join(f"+{part.name}" for part, _ in self.given)

    @property
    def parameters(self) -> tuple[float, ...]:
        padding = (0.0,) * PARAMETERS
        rows = ((weight, *(*part.parameters, *padding)[:PARAMETERS]) for part, weight in self.given)
        return tuple(number for row in rows for number in row)

    @property
    def normalised(self) -> bool:  # type: ignore[override]
        return any(part.normalised for part, _ in self.given)

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return all(part.bounded for part, _ in self.given)

    @property
    def parts(self) -> tuple[tuple[Divergence, float], ...]:
        return self.given

    def canonical(self) -> Divergence:
        total: dict[Divergence, float] = {}
        for part, weight in self.given:
            for row, share in part.canonical().parts:
                total[row] = total.get(row, 0.0) + weight * share
        rows = sorted((row for row in total if total[row] > 0), key=lambda row: (row.name, row.parameters))
        if len(rows) == 1 and total[rows[0]] == 1:
            return rows[0]
        return Mix({row: total[row] for row in rows})


def resolve(divergence: str | Divergence) -> Divergence:
    """A name of the table (default parameters), the text of a `Mix`, or an object → the canonical divergence.

    Raises ValueError for an unknown name and TypeError for anything else.
    """
    return _row(divergence).canonical()


def of_spec(name: str, parameters: Sequence[float]) -> Divergence:
    """The divergence that has this `name` and these `parameters`: what a backend is given, as an object again."""
    if not name.startswith("+"):
        return TABLE[name](*parameters)
    rows, step = [TABLE[part] for part in name[1:].split("+")], 1 + PARAMETERS
    each = [parameters[i : i + step] for i in range(0, len(parameters), step)]
    return Mix({row(*own[: len(fields(row))]): weight for row, (weight, *own) in zip(rows, each, strict=True)})


def _row(divergence: str | Divergence) -> Divergence:
    """The object of a name or a text."""
    if isinstance(divergence, str):
        if ":" in divergence or "+" in divergence:
            return _mix(divergence)
        if divergence not in TABLE:
            raise ValueError(
                f"unknown divergence {divergence!r}; choose one of {', '.join(TABLE)}, or a sum such as "
                "forward_kl:0.5+tvd:0.5"
            )
        return TABLE[divergence]()
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a name ({', '.join(TABLE)}) or an object such as fastkd.JSD(beta=0.5), "
            f"got {type(divergence).__name__}"
        )
    return divergence


def _mix(text: str) -> Mix:
    """`NAME:WEIGHT+NAME:WEIGHT`, where a weight that is left out is 1."""
    parts: dict[Divergence | str, float] = {}
    for part in text.split("+"):
        name, colon, weight = (piece.strip() for piece in part.partition(":"))
        if name not in TABLE:
            raise ValueError(f"unknown divergence {name!r} in {text!r}; choose one of {', '.join(TABLE)}")
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(
                f"the weight of {name} in {text!r} must be a number, got {weight!r}: write it as forward_kl:0.5+tvd:0.5"
            ) from None
        if name in parts:
            raise ValueError(f"{name} is twice in {text!r}: give it one weight")
        parts[name] = number
    return Mix(parts)
