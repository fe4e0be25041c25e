"""How far is the gradient off, where it is easy and where it is a difference of near-equal numbers?

The gradient is a difference of two probability vectors: the nearer the student is to the teacher, the less is left
of it beside the rounding of either.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import fastkd
from bench.harness import check, machine
from bench.harness.check import SOFT, Batch
from bench.harness.contender import FRESH, TEMPERATURE
from bench.harness.question import Case, Question, Section, within
from bench.harness.race import Benchmark, measure
from bench.rivals import recipes
from bench.rivals.hidden import Hidden, hidden_loss
from bench.rivals.peers import PEERS
from bench.rivals.recipes import CHUNKED, HiddenLoss, Loss
from fastkd import Projection
from fastkd.divergences import resolve

_ROUNDED_TRUTH, _ALLOWED = "rounded truth", "2 × eager + 1e-6"


def _question(name: str, title: str) -> Question:
    about = (
        f"Relative L2 error against float64 on the same rounded inputs. `{_ROUNDED_TRUTH}` is float64's own gradient, "
        f"rounded to the inputs' dtype; `{_ALLOWED}` is what fastkd allows itself in float32. Of a student near its "
        "teacher the logits differ by the given fraction; `far` is an unrelated student, `peaked` one whose rows have "
        "nearly all their mass on one token, as the teacher's have; `flat` rows are nearly uniform."
    )
    return Question(name, Section.ACCURACY, title, about, unit="relative error", gated=True)


ACCURACY = _question("accuracy", "Of a divergence alone (T = 2), with respect to the student's logits")
PROJECTION_ACCURACY = _question(
    "projection_accuracy", "Of forward KL alone (T = 2), from hidden states: d hidden or d weight, whichever is worse"
)
#: The promise in fp32, where `_ALLOWED` is measured beside them, and in bf16: nothing but the rounding of the result.
_EXACT = {torch.float32: within(FRESH, _ALLOWED, 1.0), torch.bfloat16: within(FRESH, _ROUNDED_TRUTH, 1.1)}


def _cases(
    question: Question, *divergences: str, families: tuple[str, ...], hidden: tuple[int, ...] | None = None
) -> tuple[Case, ...]:
    """Families innermost: what is compiled serves all of them."""
    return tuple(
        Case(
            question,
            64,
            32768,
            dtype,
            (bar, within(FRESH, "eager")),
            divergence,
            hidden=hidden,
            family=family,
            in_quick=family == "near-equal 1e-3",
        )
        for divergence in divergences
        for dtype, bar in _EXACT.items()
        for family in families
    )


#: Family → the standard deviation of the logits, and how far the student's are from the teacher's, relatively; None:
#: they are unrelated.
_FAMILIES: dict[str | None, tuple[float, float | None]] = {
    "near-equal 1e-3": (3.0, 1e-3),
    "near-equal 1e-2": (3.0, 1e-2),
    "far": (3.0, None),
    "peaked": (15.0, None),
    "flat": (0.01, None),
}
#: What one token of each row gets on top, on both sides, where rows are peaked: it holds nearly all the mass.
_PEAK = 40.0


CASES = (
    *_cases(ACCURACY, "forward_kl", "jsd", families=tuple(_FAMILIES)),
    # Fewer families: each takes a quarter of a minute where no unit multiplies bf16.
    *_cases(PROJECTION_ACCURACY, "forward_kl", families=("near-equal 1e-3", "far", "peaked"), hidden=(256, 192)),
)


def bench_accuracy(benchmark: Benchmark, case: Case) -> None:
    measure(benchmark, case, lambda: _errors(case))


def _errors(case: Case) -> dict[str, float]:
    found = _logit_errors(case) if case.hidden is None else _hidden_errors(case)
    return found | {_ALLOWED: 2 * found["eager"] + 1e-6}


def _logits(case: Case) -> Batch:
    (deviation, distance), rows, vocab = _FAMILIES[case.family], case.rows, case.vocab
    generator = machine.generator()
    noise = functools.partial(torch.randn, rows, vocab, generator=generator)
    teacher = deviation * noise()
    student = deviation * noise() if distance is None else teacher * (1 + distance * noise())
    labels = torch.randint(vocab, (rows,), generator=generator)
    if case.family == "peaked":
        peak = torch.full((rows, 1), _PEAK)
        student, teacher = (logits.scatter_add(1, labels[:, None], peak) for logits in (student, teacher))
    return Batch(student.to(case.dtype).requires_grad_(), teacher.to(case.dtype), labels)


def _hidden(case: Case) -> Hidden:
    """As `_logits`. A near student shares the teacher's hidden states and weights, which have fewer columns than its
    own: in the others it differs, by an amount that no rounding of the inputs changes.
    """
    assert case.hidden is not None
    (deviation, distance), rows, vocab = _FAMILIES[case.family], case.rows, case.vocab
    generator = machine.generator()
    labels = torch.randint(vocab, (rows,), generator=generator)

    def projection(size: int, deviation: float) -> tuple[Tensor, Tensor]:
        states = torch.randn(rows, size, generator=generator)
        weight = torch.randn(vocab, size, generator=generator).mul_(deviation / size**0.5)
        if case.family == "peaked":
            states += _PEAK * weight[labels] / weight[labels].square().sum(-1, keepdim=True)
        return states, weight

    student_size, teacher_size = case.hidden
    teacher = projection(teacher_size, deviation)
    if distance is None:
        student = projection(student_size, deviation)
    else:
        own = projection(student_size - teacher_size, deviation)
        own[0].mul_(distance)
        student = tuple(torch.cat(parts, -1) for parts in zip(teacher, own, strict=True))
    states, weight = (tensor.to(case.dtype).requires_grad_() for tensor in student)
    return Hidden(Projection(states, weight), Projection(*(tensor.to(case.dtype) for tensor in teacher)), labels)


def _logit_errors(case: Case) -> dict[str, float]:
    """Contender → relative error of the gradient w.r.t. the student's logits."""
    batch = _logits(case)
    given = batch.student.detach(), batch.teacher, batch.labels
    _, truth = check.kd_rows(*given, resolve(case.divergence), TEMPERATURE, SOFT, kept=torch.float64)
    found = {}
    for name, loss in _logit_losses(case.divergence, case.dtype).items():
        batch.student.grad = None
        loss(batch.student, batch.teacher, batch.labels).backward()
        assert batch.student.grad is not None
        found[name] = check.error(batch.student.grad, truth)
    return found | {_ROUNDED_TRUTH: check.error(truth.to(case.dtype), truth)}


def _hidden_errors(case: Case) -> dict[str, float]:
    """Contender → relative error of d hidden or d weight, whichever is worse."""
    batch = _hidden(case)
    truth = batch.truth(SOFT, kept=torch.float64)
    x = batch.operands()

    def worse(d_hidden: Tensor, d_weight: Tensor) -> float:
        return max(check.error(d_hidden, truth.hidden), check.error(d_weight, truth.weight))

    found = {}
    for name, loss in _hidden_losses(case.dtype).items():
        x.hidden.grad = x.weight.grad = None
        recipes.differentiated(loss, x)
        assert x.hidden.grad is not None
        assert x.weight.grad is not None
        found[name] = worse(x.hidden.grad, x.weight.grad)
    return found | {_ROUNDED_TRUTH: worse(truth.hidden.to(case.dtype), truth.weight.to(case.dtype))}


# One set of losses serves all families: compiling takes most of the time. Before the next set what is compiled is
# forgotten, or torch.compile would give up recompiling the same code and run it as it is.


@functools.lru_cache(maxsize=1)
def _logit_losses(divergence: str, dtype: torch.dtype) -> dict[str, Loss]:
    torch._dynamo.reset()
    row = resolve(divergence)
    ours = fastkd.KDLoss(TEMPERATURE, divergence=row, soft_weight=SOFT.soft, hard_weight=SOFT.hard)
    losses: dict[str, Loss] = {FRESH: ours, "eager": recipes.kd_loss(row, TEMPERATURE, SOFT)}
    if dtype != torch.float32:
        losses["eager fp32"] = recipes.kd_loss_fp32(row, TEMPERATURE, SOFT)
    if recipes.can_compile():
        eager = {name: loss for name, loss in losses.items() if name != FRESH}
        losses |= {name.replace("eager", "compile"): recipes.compiled(loss) for name, loss in eager.items()}
    return losses


@functools.lru_cache(maxsize=1)
def _hidden_losses(dtype: torch.dtype) -> dict[str, HiddenLoss]:
    torch._dynamo.reset()
    peers = (name for name, peer in PEERS.items() if any(objective.soft for objective in peer.objectives))
    names = (FRESH, "eager", CHUNKED, "compile", *peers)
    losses = ((name, hidden_loss(name, SOFT)) for name in names)
    return {name: loss for name, loss in losses if loss is not None}
