"""The divergence table: what a distillation loss can measure between teacher p and student q.

One row per divergence, a small frozen object carrying its parameters. Everything that iterates over divergences
(`KDLoss`, the kernels, the tests, the benchmarks) iterates over `TABLE`. ARCHITECTURE.md says what adding one takes.

`resolve` turns limits into the divergence they equal (`JSD(beta=0)` is forward KL), so that no kernel divides by zero.
"""

from __future__ import annotations

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
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "SymmetricKL",
]


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


def resolve(divergence: str | Divergence) -> Divergence:
    """A name of the table (default parameters) or a parameter object → the canonical divergence to compute.

    Raises ValueError for an unknown name and TypeError for anything else.
    """
    if isinstance(divergence, str):
        if divergence not in TABLE:
            raise ValueError(f"unknown divergence {divergence!r}; choose one of {', '.join(TABLE)}")
        divergence = TABLE[divergence]()
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a name ({', '.join(TABLE)}) or an object such as fastkd.JSD(beta=0.5), "
            f"got {type(divergence).__name__}"
        )
    return divergence.canonical()
