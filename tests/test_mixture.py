"""Several teachers mixed in probability space, judged by the formula in float64."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.call import call_for
from fastkd.divergences import TABLE, Divergence
from fastkd.projection.sides import Head
from fastkd.sources import LogProbabilities
from tests import cases, compare
from tests.memory import printed

N, V, H = 23, 1100, 16
TEMPERED = [*(row() for row in TABLE.values() if row.tempered), cases.MIXES[0]]
WEIGHTS = [0.2, 0.5, 0.3]


def heads(rows: int = N, vocab: int = V, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(hidden, weight, bias) of a student and of three teachers of other widths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    widths = (H, 24, 8, 12)
    return [(normal(rows, width), 3 * normal(vocab, width) / width**0.5, normal(vocab)) for width in widths]


def teachers_of(kinds: str, operands: list[tuple[Tensor, Tensor, Tensor]]) -> list[Any]:
    """A `Projection` for each p, logits for each l; the first projection has a softcap."""
    found: list[Any] = [
        fastkd.Projection(*own, softcap=5.0 if i == 0 else None) for i, own in enumerate(operands[1 : 1 + len(kinds)])
    ]
    return [source if kind == "p" else source.logits() for source, kind in zip(found, kinds, strict=True)]


def by_the_formula(
    student: Tensor, teachers: list[Tensor], weights: list[float], divergence: Divergence, scale: Tensor, **numbers: Any
) -> tuple[Tensor, Tensor]:
    """Loss and d logits: p = Σ w·softmax(z / T) as a tensor, the divergence's definition and cross-entropy."""
    temperature, labels, weight = numbers["temperature"], numbers["labels"], numbers["soft_weight"]
    leaf = student.detach().requires_grad_()
    with torch.no_grad():
        p = sum(w * torch.softmax(z / temperature, -1) for w, z in zip(weights, teachers, strict=True))
    log_q = torch.log_softmax(leaf / temperature, -1)
    own = ((reference.DIVERGENCES[part.name], part.parameters, w) for part, w in divergence.canonical().parts)
    term = sum(w * function(torch.log(p), log_q, parameters)[0] for function, parameters, w in own)
    hard = torch.nn.functional.cross_entropy(leaf, labels.clamp(min=0), reduction="none")
    loss = (scale * (weight * temperature**2 * term.sum(-1) + (1 - weight) * hard)).sum() / scale.sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("on", "kinds"), [("cpu", "ll"), ("cpu", "pp"), ("cpu", "lpl"), ("reference", "lpl")])
@pytest.mark.parametrize("divergence", TEMPERED, ids=str)
def test_value_and_gradients_are_the_formulas(on: str, kinds: str, divergence: Divergence) -> None:
    """Masked tokens, weights of tokens, shifted labels; the student as a projection where a teacher is."""
    fastkd.use_backend(on)
    operands, weights = heads(), [w / sum(WEIGHTS[: len(kinds)]) for w in WEIGHTS[: len(kinds)]]
    labels, own = cases.labels(N, V, ignored=(2, 3)).view(1, N), torch.rand(1, N) + 0.5
    kd = fastkd.KDLoss(2.0, alpha=0.7, alpha_on="soft", divergence=divergence, shift=True)
    leaves = [x.clone().requires_grad_() for x in operands[0]]
    mixture = fastkd.Mixture([_sequence(teacher) for teacher in teachers_of(kinds, operands)], weights)
    student: Any = fastkd.Projection(leaves[0][None], *leaves[1:])
    loss = kd(student if "p" in kinds else student.logits(), mixture, labels, weights=own)
    gradients = torch.autograd.grad(loss, leaves)

    outcomes = []
    for dtype in (torch.float64, torch.float32):
        hidden, weight, bias = (x.to(dtype) for x in operands[0])
        wide = [tuple(x.to(dtype) for x in some) for some in operands]
        moved = torch.cat((labels[0, 1:], torch.tensor([-100])))
        scale = torch.where(moved == -100, 0.0, torch.cat((own[0, 1:], torch.zeros(1)))).to(dtype)
        logits = [teacher if isinstance(teacher, Tensor) else teacher.logits() for teacher in teachers_of(kinds, wide)]
        numbers = {"temperature": 2.0, "labels": moved, "soft_weight": 0.7}
        value, dz = by_the_formula(hidden @ weight.t() + bias, logits, weights, divergence, scale, **numbers)
        outcomes.append((value, dz @ weight, dz.t() @ hidden, dz.sum(0)))
    truth, eager = outcomes
    compare.assert_value(loss, truth[0], eager[0])
    for name, ours, theirs, exact in zip(("hidden", "weight", "bias"), gradients, eager[1:], truth[1:], strict=True):
        compare.assert_gradient(ours.view(theirs.shape), theirs, exact, f"d {name}")


def _sequence(source: Any) -> Any:
    """With a batch dimension of 1."""
    if isinstance(source, Tensor):
        return source[None]
    return fastkd.Projection(source.hidden[None], source.weight, source.bias, source.softcap, source.logit_scale)


def both_ways(mixture: Any, teacher: Any, backend: str = "cpu", **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of the same student beside the one and the other."""
    student, labels = cases.logits("far", N, V)[0], cases.labels(N, V)
    found = []
    for source in (mixture, teacher):
        leaf = student.clone().requires_grad_()
        loss = fastkd.KDLoss(**settings)(leaf, source, labels)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    return found


@pytest.mark.parametrize("kind", ["p", "l"])
def test_one_teacher_is_the_plain_result(backend: str, kind: str) -> None:
    """Bit for bit, beside others of weight 0 too, which are not computed: one is all NaN."""
    (teacher,) = teachers_of(kind, heads())
    broken = torch.full((N, V), torch.nan)
    for mixture in (fastkd.Mixture([teacher]), fastkd.Mixture([broken, teacher, broken], [0, 1, 0.0])):
        (loss, gradient), (expected, slope) = both_ways(mixture, teacher, divergence="jsd")
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, slope)


def test_equal_teachers_are_one(backend: str) -> None:
    """Mixed, unlike the above, and by default in equal parts."""
    teacher = cases.logits("peaked", N, V)[1]
    (loss, gradient), (expected, slope) = both_ways(fastkd.Mixture([teacher, teacher, teacher]), teacher)
    compare.assert_value(loss, expected)
    compare.assert_gradient(gradient, slope, slope.double())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_extreme_logits_and_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Offsets of 1e4, a token of all the mass, tokens without probability, 16 bits."""
    teachers = [(cases.logits("peaked", N, V, seed=i)[1] + offset).to(dtype) for i, offset in ((0, 1e4), (1, -1e4))]
    teachers[0][:, 5:300] = -torch.inf
    teachers[1][:, 200:400] = -torch.inf  # 200 to 300 in neither
    p = sum(torch.softmax(z.double(), -1) for z in teachers) / 2
    (loss, gradient), (expected, slope) = both_ways(
        fastkd.Mixture(teachers), torch.log(p).float(), temperature=1.0, hard_weight=0.0, divergence=fastkd.JSD()
    )
    assert gradient.isfinite().all()
    compare.assert_value(loss, expected)
    compare.assert_gradient(gradient, slope, slope.double())


def test_a_broken_teacher_is_not_hidden(backend: str) -> None:
    teachers = [x.clone() for x in cases.logits("far", N, V)]
    teachers[1][4, 7] = torch.nan
    ((loss, _), _) = both_ways(fastkd.Mixture(teachers), teachers[0], reduction="none")
    assert loss.isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("kinds", ["ll", "pl"])
@pytest.mark.parametrize("settings", [{"reduction": "none"}, {"return_parts": True}, {"inplace": True}], ids=str)
def test_every_form_of_the_loss(kinds: str, settings: dict[str, Any]) -> None:
    """Each is the fresh mean, or its parts: of logits, with padded columns and rows that do not count."""
    teachers, labels = teachers_of(kinds, heads()), cases.labels(N, V - 100, ignored=(0, 5, 6))
    mixture = fastkd.Mixture(teachers, [0.25, 0.75])
    found = []
    for extra in ({}, settings):
        leaf = cases.logits("far", N, V)[0].requires_grad_()
        loss = fastkd.KDLoss(vocab_size=V - 100, **extra)(leaf * 1, mixture, labels)
        if extra.get("reduction"):
            loss = loss.sum() / (labels != -100).sum()
        if extra.get("return_parts"):
            torch.testing.assert_close(0.5 * loss.soft + 0.5 * loss.hard, loss.loss)
            loss = loss.loss
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(found[0], found[1])
    assert not found[0][1][:, V - 100 :].any()
    assert not found[0][1][[0, 5, 6]].any()


def test_chunks_are_no_other_result(backend: str, few_tokens_stand_for_many: None) -> None:
    """A budget for a few tokens, rows that are gathered, and the operator's own check."""
    operands = heads()
    labels = cases.labels(N, V, ignored=(1, 8))
    mixture = fastkd.Mixture(teachers_of("pp", operands), [0.4, 0.6])
    found = []
    for budget in (None, 17 * 3 * 4 * 1104 + 80_000):
        leaves = [x.clone().requires_grad_() for x in operands[0]]
        loss = fastkd.KDLoss(memory_budget=budget)(fastkd.Projection(*leaves), mixture, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(found[0], found[1])


def test_compiled() -> None:
    student, teacher = cases.logits("far", 4, 60)
    other, labels = cases.logits("flat", 4, 60)[1], cases.labels(4, 60)
    kd = fastkd.KDLoss()

    def loss(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return kd(z, fastkd.Mixture([first, second], [0.3, 0.7]), labels)  # type: ignore[return-value]

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = student.clone().requires_grad_()
        value = function(leaf, teacher, other)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", ["kd_loss", "kd_loss_per_row"])
def test_the_operators_own_checks(name: str) -> None:
    """`opcheck`, from logits and a projection; and teachers that autograd could not keep, made in inference mode."""
    operands = heads(rows=4, vocab=70)
    with torch.inference_mode():
        teachers = teachers_of("lp", operands)
    student, scale = cases.logits("far", 4, 70)[0].requires_grad_(), torch.rand(4)
    spec = cases.spec(fastkd.ForwardKL(), 70)
    call = call_for(student, fastkd.Mixture(teachers_of("lp", operands)), cases.labels(4, 70), scale, scale, spec)
    more = ([True, False, False],) if name == "kd_loss" else ()
    torch.library.opcheck(getattr(torch.ops.fastkd, name).default, (*call, *more))
    reduction: Any = "mean" if more else "none"
    loss: Any = fastkd.kd_loss(student, fastkd.Mixture(teachers), cases.labels(4, 70), reduction=reduction)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0


def test_float64_on_the_reference() -> None:
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    mixture = fastkd.Mixture([torch.randn(3, 7).double(), torch.randn(3, 7).double()])
    assert torch.autograd.gradcheck(lambda z: fastkd.kd_loss(z, mixture, hard_weight=0.0, divergence="jsd"), student)


def test_a_cache_of_whole_rows_takes_part() -> None:
    first, second = cases.logits("far", N, V)
    kept = torch.log_softmax(first, -1).as_subclass(LogProbabilities)
    (ours, expected) = both_ways(fastkd.Mixture([kept, second]), fastkd.Mixture([first, second]))
    torch.testing.assert_close(ours, expected)


def test_a_teacher_that_requires_a_gradient_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("fastkd.gradients.warn_once", warned.append)
    student = torch.randn(2, 5, requires_grad=True)
    fastkd.kd_loss(student, fastkd.Mixture([torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)]), hard_weight=0.0)
    assert "teacher requires a gradient" in warned[0]


Z = torch.zeros(2, 5)
SPARSE = fastkd.SparseTargets(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), "ghost", 2.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "at least one teacher, got none"),
        ((Z,), TypeError, "sequence of teachers, got Tensor"),
        (([Z, "a"],), TypeError, r"teachers\[1\] must be a torch.Tensor of logits or a fastkd.Projection, got str"),
        (([Z, Z.long()],), TypeError, r"teachers\[1\] must be float32.* got torch.int64"),
        (([Z, SPARSE],), TypeError, r"teachers\[1\] is a SparseTargets, which keeps some tokens only"),
        (([Z, fastkd.Mixture([Z])],), TypeError, r"teachers\[1\] is a Mixture: pass its teachers"),
        (([Z, torch.zeros(2, 6)],), ValueError, r"teachers\[1\] has a vocabulary of 6 and teachers\[0\] one of 5"),
        (([Z, torch.zeros(3, 5)],), ValueError, r"leading shape \(3,\), but teachers\[0\] has \(2,\)"),
        (([Z, torch.zeros(1, 2, 5)],), ValueError, r"leading shape \(1, 2\), but teachers\[0\] has \(2,\)"),
        (([Z, Z.to("meta")],), ValueError, r"teachers\[1\] is on meta, but teachers\[0\] is on cpu"),
        (([Z, Z.double()],), TypeError, "all be float64 or none, got torch.float32 and torch.float64"),
        (([Z, Z], [1.0]), ValueError, r"2 teachers, but weights has 1: \[1.0\]"),
        (([Z, Z], [1.5, -0.5]), ValueError, r"weights\[1\] must be a finite number >= 0, got -0.5"),
        (([Z, Z], [0.5, 0.6]), ValueError, r"must sum to 1, got \[0.5, 0.6\], whose sum is 1.1"),
        (([Z, Z], [float("nan"), 1]), ValueError, r"weights\[0\] must be a finite number >= 0, got nan"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastkd.Mixture(*arguments)


def test_what_a_loss_refuses() -> None:
    mixture = fastkd.Mixture([Z, Z + 1])
    with pytest.raises(ValueError, match=r"MSE.* compares raw logits, and a 'mixture' teacher has the probabilities"):
        fastkd.kd_loss(Z, mixture, hard_weight=0.0, divergence="mse")
    with pytest.raises(ValueError, match=r"teacher has leading shape \(2,\).*\(3, 5\)"):
        fastkd.kd_loss(torch.zeros(3, 5), mixture, hard_weight=0.0)
    with pytest.raises(ValueError, match="student has 6 vocabulary columns and teacher 5"):
        fastkd.kd_loss(torch.zeros(2, 6), mixture, hard_weight=0.0)
    with pytest.raises(
        TypeError, match=r"student must be a torch\.Tensor of logits or a fastkd.Projection, got Mixture"
    ):
        fastkd.kd_loss(mixture, Z, hard_weight=0.0)  # type: ignore[arg-type]
    student = torch.zeros(2, 5, requires_grad=True)
    shared = fastkd.Mixture([Z, student.detach()])
    with pytest.raises(ValueError, match=re.escape("write the gradient over the teacher")):
        fastkd.kd_loss(student, shared, hard_weight=0.0, inplace=True)


MEMORY = """
import torch
import fastkd
from tests.memory import peak
torch.set_num_threads(1)
vocab, budget, kind = 16384, 8 << 20, {kind!r}
def inputs(rows):
    student = [torch.randn(rows, 32, requires_grad=True), torch.randn(vocab, 32, requires_grad=True)]
    teachers = [fastkd.Projection(torch.randn(rows, width), torch.randn(vocab, width)) for width in (64, 96)]
    if kind == "logits":
        return [torch.randn(rows, vocab, requires_grad=True)], [teacher.logits() for teacher in teachers]
    return student, teachers
kd = fastkd.KDLoss(memory_budget=budget, hard_weight=0)
def run(student, teachers):
    kd(student[0] if kind == "logits" else fastkd.Projection(*student), fastkd.Mixture(teachers)).backward()
run(*inputs(64))
student, teachers = inputs(512)
print(peak(lambda: run(student, teachers)), fastkd.plan(512, vocab, 32, [64, 96], memory_budget=budget).peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_chunk_and_the_gradients() -> None:
    """From hidden states what the plan says, from logits little beside the gradient: a teacher's logits are 32 MiB."""
    highest, planned = printed(MEMORY.format(kind="projections"))
    assert planned <= (8 << 20) + 4 * 32 * (16384 + 512)
    assert highest <= 1.1 * planned + (1 << 20)
    highest, _ = printed(MEMORY.format(kind="logits"))
    assert highest <= (32 << 20) + (6 << 20)


def test_each_teachers_logits_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[int] = []
    logits = Head.logits

    def counted(self: Head, which: slice, part: slice) -> Tensor:
        columns.append((part.stop - part.start) * (which.stop - which.start))
        return logits(self, which, part)

    monkeypatch.setattr(Head, "logits", counted)
    operands = heads()
    fastkd.KDLoss(hard_weight=0)(fastkd.Projection(*operands[0]), fastkd.Mixture(teachers_of("ppp", operands)))
    assert sum(columns) == 4 * N * V


def test_a_plan_counts_every_teacher() -> None:
    one, two = (fastkd.plan(1024, 49152, 256, widths) for widths in (576, [576, 384]))
    assert two.flops - one.flops == 2 * 1024 * 49152 * 384
    assert two.chunk < one.chunk
    assert fastkd.plan(1024, 49152, 256, [576]) == one
    small = [fastkd.plan(1024, 49152, 256, widths, memory_budget=16 << 20) for widths in (576, [576], [576, 384])]
    assert [plan.strategy for plan in small] == ["tiles", "chunks", "chunks"]  # the second: beside logits
    narrow = {"dtype": torch.bfloat16, "device": "cuda", "gpu": "H100"}
    times = [fastkd.plan(1024, 49152, 256, widths, **narrow).milliseconds for widths in (576, [576, 384])]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="teacher_hidden must be >= 1, got 0"):
        fastkd.plan(1024, 49152, 256, [576, 0])
