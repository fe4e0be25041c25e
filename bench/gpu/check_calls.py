"""Ways of calling: without a synchronisation, captured into a graph, compiled, on another stream, twice backward, …"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from bench.gpu.check_hidden import Sizes, budgets
from bench.gpu.visit import Visit
from fastkd.backend import select
from fastkd.divergences import TABLE, ForwardKL
from tests import cases, compare

Step = Callable[[], tuple[Tensor, ...]]
_SIZES, _DRY = Sizes(512, 50257, 256, 384), Sizes(128, 523, 16, 24)
_SETTINGS: tuple[dict[str, Any], ...] = (
    *({"divergence": name} for name in TABLE),
    {"inplace": True},
    {"reduction": "none"},
    {"shift": True},
)


class _Inputs:
    """A batch of logits and one of hidden states, and steps on them."""

    def __init__(self, visit: Visit) -> None:
        self.device, self.sizes = visit.device, _DRY if visit.small else _SIZES
        rows, vocab = 8 if visit.small else 64, self.sizes.vocab
        self.student, self.teacher = (self.device.normal(rows, vocab, dtype=torch.bfloat16, scale=3) for _ in range(2))
        self.labels = self.device.labels(rows, vocab)
        self.labels[3] = -100

    def from_logits(self, **settings: Any) -> Step:
        """The upstream gradient is no 1, as with accumulation."""
        kd = fastkd.KDLoss(2.0, **settings)

        def step() -> tuple[Tensor, ...]:
            leaf = self.student.clone().requires_grad_()
            loss = 0.5 * kd(leaf, self.teacher, self.labels).sum()
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return step

    def from_hidden(self, way: str = "default", dtype: torch.dtype = torch.bfloat16) -> Step:
        sizes, device = self.sizes, self.device
        budget = budgets(sizes, dtype, device.kind, ForwardKL())[way]
        operands = [
            device.normal(*shape, dtype=dtype, scale=scale)
            for width in (sizes.student, sizes.teacher)
            for shape, scale in (((sizes.rows, width), 1.0), ((sizes.vocab, width), 3 / width**0.5))
        ]
        leaves, teacher = [x.requires_grad_() for x in operands[:2]], fastkd.Projection(*operands[2:])
        labels = device.labels(sizes.rows, sizes.vocab)

        def step() -> tuple[Tensor, ...]:
            loss = fastkd.kd_loss(fastkd.Projection(*leaves), teacher, labels, memory_budget=budget)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return step

    def from_mixture(self) -> Step:
        """Teachers as logits of two dtypes and as a projection, so that rows lie at different strides."""
        device, (rows, vocab) = self.device, self.student.shape
        hidden, weight = (device.normal(count, 32, dtype=torch.bfloat16) for count in (rows, vocab))
        other = device.normal(rows, vocab, dtype=torch.float32, scale=3)
        mixture = fastkd.Mixture([self.teacher, other, fastkd.Projection(hidden, weight)], [0.2, 0.3, 0.5])

        def step() -> tuple[Tensor, ...]:
            leaf = self.student.clone().requires_grad_()
            loss = fastkd.kd_loss(leaf, mixture, self.labels)
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return step

    def half_masked(self, **options: Any) -> tuple[Tensor, ...]:
        """Loss and gradients from hidden states where every other label is masked, and `options` say how many."""
        sizes, normal = self.sizes, partial(self.device.normal, dtype=torch.bfloat16)
        self.device.generator.manual_seed(0)
        leaves = [normal(sizes.rows, 32).requires_grad_(), normal(sizes.vocab, 32, scale=0.5).requires_grad_()]
        teacher = fastkd.Projection(normal(sizes.rows, 32), normal(sizes.vocab, 32, scale=0.5))
        labels = self.device.labels(sizes.rows, sizes.vocab)
        labels[::2] = -100
        if options.pop("on_host", False):
            labels = labels.cpu()
        loss = fastkd.kd_loss(fastkd.Projection(*leaves), teacher, labels, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)


def _same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert expected[-1].abs().max() > 0, "there is nothing to compare"
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), f"not the same bits: {compare.relative_error(a, b):.1e} off"


def _live(inputs: _Inputs, **options: Any) -> None:
    expected = inputs.half_masked()
    for a, b in zip(inputs.half_masked(**options), expected, strict=True):
        assert (off := compare.relative_error(a, b)) < compare.LOW_PRECISION, f"{off:.1e} off"


def _quiet(inputs: _Inputs, step: Step) -> None:
    expected = step()
    with inputs.device.no_synchronisation():
        found = step()
    _same(found, expected)


def _graph(inputs: _Inputs, step: Step) -> None:
    expected = step()
    _same(inputs.device.replayed(step), expected)


def _stream(inputs: _Inputs, step: Step) -> None:
    expected = step()
    _same(inputs.device.elsewhere(step), expected)


def _compiled(inputs: _Inputs, **options: Any) -> None:
    """Beside other operations, so that there is something to compile; twice, since graphs are replayed from then on."""
    kd = fastkd.KDLoss(2.0)

    def loss(student: Tensor) -> Tensor:
        return kd(student * 1.5, inputs.teacher, inputs.labels)

    torch._dynamo.reset()
    outcomes = []
    for function in (loss, torch.compile(loss, fullgraph=True, **options)):
        for _ in range(3):
            leaf = inputs.student.clone().requires_grad_()
            value = function(leaf)
            value.backward()
            outcomes.append((value.detach().clone(), leaf.grad.clone()))  # a graph's memory is used again
    (value, gradient), *_ = outcomes
    for again in outcomes[1:]:
        compare.assert_value(again[0], value.double())
        assert (off := compare.relative_error(again[1], gradient)) < compare.LOW_PRECISION, f"{off:.1e} off"


def _second_backward(inputs: _Inputs, step_of: str) -> None:
    """The first gradients are kept as they were; the second, of three times the loss, are three times as large."""
    if step_of == "logits":
        leaves = [inputs.student.clone().requires_grad_()]
        loss = fastkd.kd_loss(*leaves, inputs.teacher, inputs.labels)
    else:
        sizes, normal = inputs.sizes, partial(inputs.device.normal, dtype=torch.bfloat16)
        leaves = [normal(sizes.rows, 32).requires_grad_(), normal(sizes.vocab, 32, scale=0.5).requires_grad_()]
        teacher = fastkd.Projection(normal(sizes.rows, 32), normal(sizes.vocab, 32, scale=0.5))
        labels = inputs.device.labels(sizes.rows, sizes.vocab)
        loss = fastkd.kd_loss(fastkd.Projection(*leaves), teacher, labels)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * loss, leaves)
    for before, after, tripled in zip(kept, first, second, strict=True):
        assert torch.equal(before, after), "the second backward changed the first gradient"
        assert compare.relative_error(tripled, 3 * before.double()) < compare.LOW_PRECISION


def _all_masked(inputs: _Inputs, **settings: Any) -> None:
    leaf = inputs.student.clone().requires_grad_()
    loss = fastkd.kd_loss(leaf, inputs.teacher, torch.full_like(inputs.labels, -100), **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert not loss.any(), f"the loss is {loss}"
    assert not gradient.any(), "there is a gradient"


def _no_rows(inputs: _Inputs) -> None:
    leaf = inputs.student[:0].clone().requires_grad_()
    loss = fastkd.kd_loss(leaf, inputs.teacher[:0], inputs.labels[:0])
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None


def _autocast(inputs: _Inputs) -> None:
    leaf = inputs.student.float().requires_grad_()
    with torch.autocast(inputs.device.kind, torch.bfloat16):
        loss = fastkd.kd_loss(leaf, inputs.teacher.float(), inputs.labels)
    loss.backward()
    expected = fastkd.kd_loss(leaf, inputs.teacher.float(), inputs.labels)
    assert (loss.dtype, leaf.grad.dtype) == (torch.float32, torch.float32)
    assert torch.equal(loss, expected), "a loss on fp32 logits changes under autocast"


def _stray_label(inputs: _Inputs) -> None:
    """An id outside the vocabulary gives NaN on a GPU, which does not look at ids first, and an error on a CPU."""
    labels = inputs.labels.clone()
    labels[2] = inputs.sizes.vocab + 5
    if inputs.device.dry:
        try:
            fastkd.kd_loss(inputs.student, inputs.teacher, labels)
        except ValueError:
            return
        raise AssertionError("a label outside the vocabulary is accepted")
    assert fastkd.kd_loss(inputs.student, inputs.teacher, labels).isnan().item(), "a stray label does not give NaN"


def _functions(inputs: _Inputs) -> None:
    logits = inputs.device.normal(*inputs.student.shape, dtype=torch.float32, scale=3)  # no two are equal: one arg-max
    found = fastkd.row_statistics(logits, inputs.labels)
    with fastkd.use_backend("reference"):
        expected = fastkd.row_statistics(logits.double(), inputs.labels)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    leaf = logits.clone().requires_grad_()
    out = fastkd.log_softmax(leaf, 2.0)
    out.backward(inputs.teacher.float())
    wide = logits.double().requires_grad_()
    truth = torch.log_softmax(wide / 2, -1)
    truth.backward(inputs.teacher.double())
    assert compare.relative_error(out, truth) < 1e-6
    assert compare.relative_error(leaf.grad, wide.grad) < 1e-5


def _mixed(inputs: _Inputs) -> None:
    """Three teachers, two of them in 16 bits, against the formula in float64."""
    rows, vocab = inputs.student.shape
    teachers = [inputs.teacher, inputs.student, inputs.device.normal(rows, vocab, dtype=torch.float32, scale=3)]
    weights, out = [0.2, 0.3, 0.5], torch.empty(rows, vocab, dtype=torch.float32, device=inputs.device.kind)
    select(out).mix_rows(teachers, weights, 2.0, None, out)
    truth = sum(w * torch.softmax(z.double() / 2, -1) for w, z in zip(weights, teachers, strict=True))
    assert isinstance(truth, Tensor)
    assert compare.relative_error(torch.softmax(out.double() / 2, -1), truth) < 1e-6
    assert (torch.log_softmax(out.double() / 2, -1) - truth.log()).abs().max() < 1e-5


def _beyond_two_to_the_31(inputs: _Inputs) -> None:
    """The last of so many elements, in place: 4.3 GB. All rows before are masked by their weight."""
    rows, vocab = (5, 1024) if inputs.device.dry else ((1 << 14) + 2, 1 << 17)
    last, teacher = (x.to(inputs.device.kind) for x in cases.logits("far", 1, vocab, torch.bfloat16))
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=inputs.device.kind)
    student[-1] = last[0]
    weights = torch.zeros(rows, dtype=torch.float32, device=inputs.device.kind)
    weights[-1] = 1
    labels = torch.full((rows,), 5, dtype=torch.int64, device=inputs.device.kind)
    leaf = student.requires_grad_()
    fastkd.KDLoss(2.0, inplace=True)(leaf, teacher.expand(rows, vocab), labels, weights=weights).backward()
    alone = last.clone().requires_grad_()
    fastkd.KDLoss(2.0)(alone, teacher, labels[:1]).backward()
    assert not leaf.grad[:-1:999].any(), "a masked row has a gradient"
    assert torch.equal(leaf.grad[-1], alone.grad[0]), "the last row's gradient differs"


def _checks(inputs: _Inputs) -> dict[str, Callable[[], None]]:
    backend = "eager" if inputs.device.dry else "inductor"  # which needs a compiler on CPUs
    steps: dict[str, Callable[[], Step]] = {
        **{f"logits {settings}": partial(inputs.from_logits, **settings) for settings in _SETTINGS},
        **{f"hidden, {way}": partial(inputs.from_hidden, way) for way in ("default", "several chunks", "tiles")},
        "a mixture": inputs.from_mixture,
    }
    ways = {"no synchronisation": _quiet, "a CUDA graph": _graph, "another stream": _stream}
    compiled: dict[str, dict[str, Any]] = {"torch.compile": {"backend": backend}}
    if not inputs.device.dry:
        compiled["torch.compile(mode=reduce-overhead)"] = {"mode": "reduce-overhead"}
    return {
        **{
            f"{way}: {name}": lambda judge=judge, make=make: judge(inputs, make())
            for way, judge in ways.items()
            for name, make in steps.items()
        },
        **{name: partial(_compiled, inputs, **options) for name, options in compiled.items()},
        **{f"second backward: {of}": partial(_second_backward, inputs, of) for of in ("logits", "hidden")},
        "half masked, live=": partial(_live, inputs, live=inputs.sizes.rows // 2),
        "half masked, labels on the host": partial(_live, inputs, on_host=True),
        "all masked": partial(_all_masked, inputs),
        "all masked, per token": partial(_all_masked, inputs, reduction="none"),
        "no rows": partial(_no_rows, inputs),
        "autocast": partial(_autocast, inputs),
        "a stray label": partial(_stray_label, inputs),
        "statistics and log-softmax": partial(_functions, inputs),
        "mixed rows": partial(_mixed, inputs),
        "beyond 2^31 elements": partial(_beyond_two_to_the_31, inputs),
    }


def run(visit: Visit) -> None:
    checks = _checks(_Inputs(visit))
    for name in visit.mine(list(checks)):
        with visit.check(f"calls: {name}"):
            checks[name]()
