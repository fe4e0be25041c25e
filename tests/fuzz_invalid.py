"""Random calls that cannot be meant, by the documentation: one thing is wrong with each, and the error must name it."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.kernels import cpu
from tests.fuzz_calls import LossCall, Operands, Sparse, untouched
from tests.fuzz_formulas import token_scales
from tests.fuzz_random import loss_call

NAN, INF = math.nan, math.inf
NOT_A_NUMBER = ("2", True, 2j, [2.0], NAN, INF, np.float32("nan"))
NOT_A_SWITCH = ("no", "false", None, 2, NAN, [])
#: Values no setting of that name can have.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, -1.5, None, np.int64(0), *NOT_A_NUMBER),
    "teacher_temperature": (0, -1, np.float64(-2), *NOT_A_NUMBER),
    "soft_weight": (-0.1, None, np.float32(-1), *NOT_A_NUMBER),
    "hard_weight": (-2, None, *NOT_A_NUMBER),
    "alpha": (-0.1, 1.2, *NOT_A_NUMBER),
    "alpha_on": ("both", "teacher", 1, None),
    "divergence": ("kl", "", 3, None, fastkd.JSD, ["jsd"]),
    "reduction": ("avg", "", None, 3, True),
    "ignore_index": (1.5, "x", None, NAN, [0]),
    "vocab_size": (0, -1, 2.5, "10", True, 10**6),
    "memory_budget": (0, -5, NAN, "1GB", True),
    **dict.fromkeys(("scale_t2", "shift", "mask_soft", "inplace", "return_parts"), NOT_A_SWITCH),
}
#: Parameters of divergences, with what must be named.
PARAMETERS = (
    (fastkd.JSD, "beta", (-0.1, 1.1)), (fastkd.SkewKL, "lam", (-0.1, 1)), (fastkd.SkewReverseKL, "lam", (1.0, 2)),
    (fastkd.SymmetricKL, "weight", (-1, 1.5)), (fastkd.AlphaBeta, "alpha", ()), (fastkd.AlphaBeta, "beta", ()),
)  # fmt: skip


@dataclass
class Broken:
    """A valid call of which `changes` are made, by what argument they replace."""

    name: str
    named: str  # a pattern that must be in the message
    call: LossCall
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Any] | None = None  # in place of the whole call
    attribute: bool = False  # settings are set on a loss that was made with valid ones

    def describe(self) -> str:
        changes = {**self.settings, **{k: _brief(v) for k, v in self.arguments.items()}}
        return f"{self.name}: {changes} in {self.call.describe()}"

    def run(self) -> Any:
        if self.make is not None:
            return self.make()
        call, settings = self.call, {**self.call.settings, **self.settings}
        arguments = {name: getattr(call, name) for name in ("student", "teacher", "labels", "weights", "num_items")}
        arguments.update(self.arguments)
        for name in ("student", "teacher"):
            if isinstance(arguments[name], Operands | Sparse):
                arguments[name] = arguments[name].source()
        with fastkd.use_backend(call.backend) if call.backend else contextlib.nullcontext():
            if self.attribute:
                kd = fastkd.KDLoss(**call.settings)
                for name, value in self.settings.items():
                    setattr(kd, name, value)
            else:
                kd = fastkd.KDLoss(**settings)
            student, teacher, labels = (arguments.pop(name) for name in ("student", "teacher", "labels"))
            return kd(student, teacher, labels, **arguments)


def _brief(value: Any) -> str:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


# --- judging ----------------------------------------------------------------------------------------------------


def needed_bytes(error: ValueError) -> int | None:
    """The budget that the refusal of a smaller one asks for."""
    found = re.search(r"memory_budget.*need (\d+) bytes", str(error))
    return int(found[1]) if found else None


class Worked(Exception):
    """A kernel was called."""


@contextlib.contextmanager
def _no_work() -> Iterator[None]:
    def work(*_: Any) -> None:
        raise Worked

    functions = ("kd_rows", "row_statistics", "log_softmax")
    with contextlib.ExitStack() as stack:
        for module in (cpu, reference):
            for function in functions:
                stack.enter_context(mock.patch.object(module, function, work))
        yield


def check(broken: Broken) -> None:
    """Raise AssertionError unless there is one TypeError or ValueError that names what is wrong, before any work."""
    call = broken.call
    tensors = [x for side in (call.student, call.teacher) if isinstance(side, Operands) for x in side.tensors]
    tensors += [x for x in (call.labels, call.weights) if x is not None]
    versions = [x._version for x in tensors]
    with untouched(tensors), _no_work():
        error = _error_of(broken)
    assert error is not None, f"no error although {broken.named!r} is wrong"
    assert not isinstance(error, Worked), f"work began although {broken.named!r} is wrong"
    assert isinstance(error, TypeError | ValueError), f"{type(error).__name__} for a wrong {broken.named!r}: {error}"
    assert re.search(broken.named, str(error)), f"{error!r} does not name {broken.named!r}"
    chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert chained is None, f"{error!r} comes with {chained!r}"
    assert versions == [x._version for x in tensors], "a version counter moved"


def _error_of(broken: Broken) -> Exception | None:
    try:
        broken.run()
    except Exception as error:
        return error
    return None


# --- making -----------------------------------------------------------------------------------------------------


def broken_call(draw: random.Random) -> Broken:
    """One invalid call."""
    while True:
        call = loss_call(draw)
        call.settings.pop("memory_budget", None)
        if "poisoned" in call.notes:
            continue  # what does not count might count in the changed call
        kind = draw.choice((_setting, _setting, _parameter, *BREAKS))
        broken = kind(draw, call)
        if broken is not None:
            return broken


def _setting(draw: random.Random, call: LossCall) -> Broken:
    name = draw.choice(tuple(SETTINGS))
    value = draw.choice(SETTINGS[name])
    if name.startswith("alpha"):
        for other in ("soft_weight", "hard_weight"):
            call.settings.pop(other, None)
        return Broken(name, name, call, {"alpha": 0.3, "alpha_on": "soft", name: value})
    if name.endswith("_weight"):
        for other in ("alpha", "alpha_on"):
            call.settings.pop(other, None)
    constructor = name in ("divergence", "soft_weight", "hard_weight")
    return Broken(name, name, call, {name: value}, attribute=not constructor and draw.random() < 0.3)


def _parameter(draw: random.Random, call: LossCall) -> Broken:
    kind, name, outside = draw.choice(PARAMETERS)
    value = draw.choice((*outside, NAN, INF, "0.5", None, True))
    return Broken(f"{kind.__name__}.{name}", name, call, make=lambda: kind(**{name: value}))


BREAKS: list[Callable[[random.Random, LossCall], Broken | None]] = []


def _breaks(function: Callable[[random.Random, LossCall], Broken | None]) -> Any:
    BREAKS.append(function)
    return function


def _replaced(name: str, call: LossCall, value: Any, what: str = "") -> Broken:
    return Broken(f"{name} {what or _brief(value)}", name, call, arguments={name: value})


class Output(dict):  # type: ignore[type-arg]
    """Like transformers' `ModelOutput`."""

    logits = torch.zeros(2, 3)


@_breaks
def student_or_teacher(draw: random.Random, call: LossCall) -> Broken | None:
    name = draw.choice(("student", "teacher"))
    shape = call.student.shape
    logits = torch.randn(shape)
    wrong = [
        logits.tolist(), logits.numpy(), Output(), "logits", 3.0, logits.long(), logits.to(torch.complex64),
        logits.bool(), torch.zeros(()), logits[..., :0], logits.to_sparse(), logits.to("meta"),
    ]  # fmt: skip
    if name == "student" or call.term_weights[0] > 0:
        wrong.append(None)
    if name == "teacher":
        wrong += [torch.zeros(*shape[:-1], 1, shape[-1]), torch.zeros(7, *shape)]
    return _replaced(name, call, draw.choice(wrong))


@_breaks
def vocabularies(draw: random.Random, call: LossCall) -> Broken | None:
    """Of two sizes, without a word which columns count."""
    wider = torch.zeros(*call.student.shape[:-1], call.student.shape[-1] + 1)
    wider = wider.double() if call.student.tensors[0].dtype == torch.float64 else wider
    return Broken("two vocabularies", "vocab_size", call, {"vocab_size": None}, {"teacher": wider})


@_breaks
def labels(draw: random.Random, call: LossCall) -> Broken | None:
    if call.labels is None or call.term_weights[1] == 0:
        return None
    right = call.labels
    wrong = [right.float(), right.bool(), right.tolist(), right.numpy(), right[None], None, 3, right.to("meta")]
    return _replaced("labels", call, draw.choice(wrong))


@_breaks
def labels_outside(draw: random.Random, call: LossCall) -> Broken | None:
    if call.labels is None or call.term_weights[1] == 0:
        return None
    live = (token_scales(call)[1] != 0).nonzero()
    if not len(live):
        return None
    value = draw.choice([x for x in (call.columns, -3, 30_000, -101) if x != call.setting("ignore_index")])
    changed = call.labels.long().clone()
    call.predicted(changed)[tuple(live[draw.randrange(len(live))])] = value
    return Broken("labels outside", f"labels.*{value}", call, arguments={"labels": changed})


@_breaks
def weights(draw: random.Random, call: LossCall) -> Broken | None:
    leading = call.student.shape[:-1]
    right = torch.ones(leading)
    wrong = [right.tolist(), right.numpy(), right[None], 0.5, "1", right.to(torch.complex64), right.to("meta")]
    if right.numel():
        for bad in (NAN, -1.0, INF, -INF):
            changed = right.clone()
            changed.view(-1)[-1] = bad  # the last, which is the one that counts under shift too
            wrong.append(changed)
    value = draw.choice(wrong)
    return _replaced("weights", call, value, repr(value.view(-1)[-1:]) if isinstance(value, Tensor) else "")


@_breaks
def num_items(draw: random.Random, call: LossCall) -> Broken | None:
    call.settings["reduction"] = "mean"
    tensors = (torch.tensor(NAN), torch.tensor(-2.0), torch.tensor(INF), torch.ones(2), torch.tensor(2j))
    return _replaced("num_items", call, draw.choice((-1, *NOT_A_NUMBER, *tensors)))


@_breaks
def num_items_without_mean(draw: random.Random, call: LossCall) -> Broken | None:
    call.settings["reduction"] = "sum"
    return _replaced("num_items", call, 5)


@_breaks
def both_weights_zero(draw: random.Random, call: LossCall) -> Broken:
    for other in ("alpha", "alpha_on"):
        call.settings.pop(other, None)
    return Broken("both weights 0", "soft_weight.*hard_weight", call, {"soft_weight": 0, "hard_weight": 0.0})


@_breaks
def alpha_and_weights(draw: random.Random, call: LossCall) -> Broken:
    changes = {"alpha": 0.3, "alpha_on": "soft", "soft_weight": 0.7}
    return Broken("alpha and weights", "alpha.*soft_weight", call, changes)


@_breaks
def unknown_setting(draw: random.Random, call: LossCall) -> Broken:
    name = draw.choice(("temprature", "T", "alpha_soft", "beta", "ignore_idx"))
    return Broken("unknown setting", name, call, {name: 1})


@_breaks
def too_few_dimensions(draw: random.Random, call: LossCall) -> Broken:
    row = torch.randn(5)
    setting = draw.choice(({"shift": True}, {"reduction": "batchmean"}))
    name = next(iter(setting))

    def make() -> Any:
        return fastkd.kd_loss(row, row, torch.tensor(1), **setting)  # type: ignore[arg-type]

    return Broken(f"{name} of one token", name, call, make=make)


@_breaks
def in_place(draw: random.Random, call: LossCall) -> Broken | None:
    """Where the gradient cannot go: over rows that overlap each other or the teacher, or that lie irregularly."""
    memory = torch.randn(400)
    overlapping = {
        "expanded": memory[:10].expand(4, 10),
        "unfolded": memory.unfold(0, 10, 1)[:4],
        "columns apart": memory[:80].view(4, 20)[:, ::2],
    }
    teacher = torch.randn(4, 10)
    form = draw.choice((*overlapping, "teacher's memory", "reduction"))
    settings: dict[str, Any] = {"inplace": True, "hard_weight": 0}
    student = overlapping.get(form, memory[10:50].view(4, 10))
    named = "inplace"
    if form == "teacher's memory":
        teacher = memory[:40].view(4, 10)  # each the student's previous row
    if form == "reduction":
        settings["reduction"] = "none"
    student = student.requires_grad_() if student.is_leaf else student.detach().requires_grad_()
    return Broken(f"in place, {form}", named, call, make=lambda: fastkd.kd_loss(student, teacher, **settings))


@_breaks
def projection(draw: random.Random, call: LossCall) -> Broken:
    hidden, weight, bias = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("hidden", {"hidden": hidden[:, :3]}), ("hidden", {"hidden": hidden.long()}), ("hidden", {"hidden": None}),
        ("hidden", {"hidden": torch.tensor(1.0)}), ("weight", {"weight": weight[0]}), ("weight", {"weight": [1.0]}),
        ("weight", {"weight": weight[:0]}), ("weight", {"weight": weight.to("meta")}), ("bias", {"bias": bias[:5]}),
        ("bias", {"bias": weight}), ("bias", {"bias": 0.5}), ("float64", {"weight": weight.double()}),
        *((name, {name: value}) for name in ("softcap", "logit_scale") for value in (0, -1.0, *NOT_A_NUMBER)),
    ]  # fmt: skip
    name, change = draw.choice(wrong)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, **change}
    return Broken(f"Projection {_brief(change)}", name, call, make=lambda: fastkd.Projection(**arguments))


@_breaks
def sparse_targets(draw: random.Random, call: LossCall) -> Broken:
    ids, logprobs = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0.6, 0.3], [0.5, 0.4]]).log()
    rest, T = torch.tensor([0.1, 0.1]).log(), 2.0
    student = torch.randn(2, 5)
    wrong: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("ids", {"ids": ids.float()}, {}), ("ids", {"ids": ids[:, :1]}, {}), ("ids", {"ids": None}, {}),
        ("ids", {"ids": ids[:, :0], "logprobs": logprobs[:, :0]}, {}), ("logprobs", {"logprobs": ids}, {}),
        ("logprobs", {"logprobs": logprobs.tolist()}, {}), ("kind", {"kind": "top"}, {}), ("kind", {"kind": None}, {}),
        ("rest", {"kind": "sampled", "rest": rest}, {}), ("entropy", {"entropy": rest}, {}),
        ("rest", {"rest": rest[:1]}, {}), ("rest", {"rest": ids[0]}, {}), ("logprobs", {"logprobs": logprobs[0]}, {}),
        *(("temperature", {"temperature": value}, {}) for value in (0, -1, None, *NOT_A_NUMBER)),
        ("ids.*5", {"ids": torch.tensor([[0, 2], [1, 5]])}, {}),
        ("ids.*-1", {"ids": torch.tensor([[0, -1], [1, 2]])}, {}),
        ("ids.*2.*twice", {"ids": torch.tensor([[0, 1], [2, 2]])}, {}), ("temperature", {"temperature": 1.0}, {}),
        ("probabilities", {"logprobs": logprobs + 0.5}, {}),
        ("probabilities", {"rest": rest - 2, "logprobs": logprobs - 2}, {}),
        ("mse|MSE", {}, {"divergence": "mse"}), ("forward_kl", {"kind": "renormalize"}, {"divergence": "jsd"}),
        ("forward_kl", {"kind": "sampled"}, {"divergence": "reverse_kl"}),
        ("leading shape", {"ids": ids[:1], "logprobs": logprobs[:1]}, {}),
    ]  # fmt: skip
    name, change, settings = draw.choice(wrong)
    parts = {"ids": ids, "logprobs": logprobs, "kind": "ghost", "temperature": T, **change}
    settings = {"temperature": T, "hard_weight": 0, **settings}

    def make() -> Any:
        return fastkd.kd_loss(student, fastkd.SparseTargets(**parts), **settings)

    return Broken(f"SparseTargets {sorted(change)} {settings.get('divergence', '')}", name, call, make=make)


@_breaks
def statistics(draw: random.Random, call: LossCall) -> Broken:
    logits, ids = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("int64", lambda: fastkd.log_softmax(ids[None])),
        ("logits", lambda: fastkd.log_softmax(logits.tolist())),  # type: ignore[arg-type]
        ("vocab", lambda: fastkd.log_softmax(logits[:, :0])),
        ("labels", lambda: fastkd.row_statistics(logits, ids[:1])),
        ("labels", lambda: fastkd.row_statistics(logits, ids.float())),
        ("labels", lambda: fastkd.row_statistics(logits, [0, 1])),  # type: ignore[arg-type]
        ("logits|student|source", lambda: fastkd.row_statistics(None)),  # type: ignore[arg-type]
        ("logits|student|source", lambda: fastkd.row_statistics(Output())),  # type: ignore[arg-type]
    ]
    value = draw.choice((0, -1.0, None, *NOT_A_NUMBER))
    function = draw.choice((fastkd.log_softmax, fastkd.row_statistics))
    wrong.append(("temperature", lambda: function(logits, temperature=value)))
    number = draw.randrange(len(wrong) + 4)  # temperatures more often
    name, make = wrong[min(number, len(wrong) - 1)]
    return Broken(f"statistics {min(number, len(wrong) - 1)} {value!r}", name, call, make=make)
