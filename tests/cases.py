"""What the tests run over: distributions of logits, divergences, dtypes. Deterministic, made on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastkd
from fastkd.divergences import TABLE, Divergence
from fastkd.rows import RowSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: A closed part beside another, several others, both directions of KL, parts of one name, one part, and every row.
MIXES: tuple[Divergence, ...] = (
    fastkd.Mix({fastkd.ForwardKL(): 0.5, fastkd.TVD(): 0.5}),
    fastkd.Mix({fastkd.JSD(beta=0.1): 0.3, fastkd.ReverseKL(): 0.5, fastkd.SquaredHellinger(): 1.5}),
    fastkd.Mix({fastkd.ForwardKL(): 0.25, fastkd.SymmetricKL(): 0.5}),
    fastkd.Mix({fastkd.SkewKL(): 0.7, fastkd.SkewKL(lam=0.7): 0.6}),
    fastkd.Mix({fastkd.SkewReverseKL(): 2.0}),
    fastkd.Mix({row(): 0.1 for row in TABLE.values() if row.tempered}),
)
#: What a user can write as a text: every row of the table, and mixes.
NAMES = (*TABLE, "forward_kl:0.5+tvd:0.5", "jsd:0.3+reverse_kl:0.5+squared_hellinger:1.5", "forward_kl+reverse_kl:2")
#: Every row of the table with default parameters, and the parameters at which formulas change shape.
DIVERGENCES: tuple[Divergence, ...] = (
    *(row() for row in TABLE.values()),
    fastkd.JSD(beta=0.1),
    fastkd.JSD(beta=0.9),
    fastkd.SkewKL(lam=0.7),
    fastkd.SkewReverseKL(lam=0.7),
    fastkd.SymmetricKL(weight=0.9),
    fastkd.AlphaBeta(alpha=0.5, beta=0.5),
    fastkd.AlphaBeta(alpha=0.0, beta=0.5),
    fastkd.AlphaBeta(alpha=0.5, beta=0.0),
    fastkd.AlphaBeta(alpha=0.5, beta=-0.5),
    fastkd.AlphaBeta(alpha=0.0, beta=0.0),
    *MIXES,
)

#: One divergence for each way through a kernel, for tests of how rows are walked: that does not depend on formulas.
KINDS: tuple[Divergence, ...] = (
    fastkd.ForwardKL(),
    fastkd.ReverseKL(),
    fastkd.SymmetricKL(),
    fastkd.JSD(),
    fastkd.SkewKL(),
    fastkd.TVD(),
    fastkd.AlphaBeta(),
    fastkd.MSE(),
    MIXES[1],
    MIXES[2],
    MIXES[5],
)


def near_equal(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """The student has almost become the teacher: every gradient is a difference of near-equal numbers."""
    teacher = 3 * torch.randn(rows, vocab, generator=generator)
    return teacher + 1e-2 * torch.randn(rows, vocab, generator=generator), teacher


def far(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Unrelated rows, as at the start of training."""
    return 3 * torch.randn(rows, vocab, generator=generator), 3 * torch.randn(rows, vocab, generator=generator)


def peaked(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """One token holds nearly all the mass, on both sides; most other probabilities underflow."""
    student = 15 * torch.randn(rows, vocab, generator=generator)
    teacher = 15 * torch.randn(rows, vocab, generator=generator)
    tops = torch.randint(vocab, (rows, 1), generator=generator)
    return student.scatter_add(1, tops, torch.full((rows, 1), 40.0)), teacher.scatter_add(
        1, tops, torch.full((rows, 1), 50.0)
    )


def flat(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Nearly uniform rows."""
    return 0.01 * torch.randn(rows, vocab, generator=generator), 0.01 * torch.randn(rows, vocab, generator=generator)


def offset(generator: torch.Generator, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """A large common offset, another on each side, which must change nothing."""
    student, teacher = far(generator, rows, vocab)
    return student + 1e4, teacher - 1e4


FAMILIES: dict[str, Callable[[torch.Generator, int, int], tuple[Tensor, Tensor]]] = {
    function.__name__: function for function in (near_equal, far, peaked, flat, offset)
}


def logits(
    family: str, rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher `[rows, vocab]` of a family, rounded to `dtype`."""
    student, teacher = FAMILIES[family](torch.Generator().manual_seed(seed), rows, vocab)
    return student.to(dtype), teacher.to(dtype)


def labels(rows: int, vocab: int, ignored: tuple[int, ...] = (), seed: int = 1) -> Tensor:
    """Labels `[rows]`, −100 at the rows in `ignored`."""
    result = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    result[list(ignored)] = -100
    return result


def spec(divergence: Divergence, vocab: int, temperature: float = 2.0, **changes: float) -> RowSpec:
    """The numbers a backend gets, for tests that call one directly."""
    canonical = divergence.canonical()
    numbers = {
        "temperature": temperature,
        "teacher_temperature": temperature,
        "soft_weight": 0.5 * temperature**2,
        "hard_weight": 0.5,
        **changes,
    }
    return RowSpec(canonical.name, canonical.parameters, vocab_size=vocab, **numbers)


def undecided(student: Tensor, teacher: Tensor, spec: RowSpec) -> Tensor | None:
    """Where the total variation's gradient, which jumps where p = q, has the sign that rounding gives it."""
    if "tvd" not in spec.divergence.split("+"):
        return None
    log_q = torch.log_softmax(student.double() / spec.temperature, -1)
    log_p = torch.log_softmax(teacher.double() / spec.teacher_temperature, -1)
    return (log_q - log_p).abs() < 1e-7
