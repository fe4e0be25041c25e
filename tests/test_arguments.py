"""What users pass: numpy's numbers, any layout, empty batches are taken; what cannot be meant is named at once."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import fastkd
from fastkd import backend
from tests import compare

N, V, H = 6, 40, 8
LABELS = torch.arange(N)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (N, V)), generator=torch.Generator().manual_seed(3))


STUDENT, TEACHER = logits(), logits() + 1
HIDDEN, WEIGHT = logits(N, H), logits(V, H)

# --- taken ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": np.float32(2), "soft_weight": np.float16(0.5), "hard_weight": np.float64(0.5)},
        {"temperature": np.int64(2), "ignore_index": np.int32(-100), "vocab_size": np.int64(V)},
        {"shift": np.False_, "mask_soft": np.True_, "memory_budget": np.int64(1 << 20)},
        {"divergence": fastkd.JSD(np.float32(0.5))},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_numbers_of_numpy_are_numbers(settings: dict[str, Any]) -> None:
    plain = {
        name: value.item() if isinstance(value, np.generic) else fastkd.JSD(0.5) for name, value in settings.items()
    }
    found = fastkd.kd_loss(STUDENT, TEACHER, LABELS, num_items=np.int64(5), **settings)
    assert torch.equal(found, fastkd.kd_loss(STUDENT, TEACHER, LABELS, num_items=5, **plain))
    assert torch.equal(
        fastkd.row_statistics(STUDENT, temperature=np.float32(2)).entropy,
        fastkd.row_statistics(STUDENT, temperature=2).entropy,
    )


@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"memory_budget": 90_000}], ids=str)
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_columns_that_lie_apart_beside_a_projection(which: str, settings: dict[str, Any], backend: str) -> None:
    apart = STUDENT.t().contiguous().t()
    assert apart.stride(-1) != 1
    projection = fastkd.Projection(HIDDEN, WEIGHT)
    results = []
    for one in (apart, STUDENT):
        leaf = one.clone(memory_format=torch.preserve_format).requires_grad_()
        hidden = fastkd.Projection(HIDDEN.clone().requires_grad_(), WEIGHT)
        pair = (leaf, projection) if which == "student" else (hidden, leaf.detach())
        wanted = leaf if which == "student" else hidden.hidden
        loss = fastkd.kd_loss(*pair, LABELS, **settings).sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=compare.VALUE, atol=1e-8)


@pytest.mark.parametrize("shape", [(2, 0), (0,), (0, 3), (3, 0)])
@pytest.mark.parametrize(
    "settings", [{}, {"shift": True}, {"reduction": "none"}, {"shift": True, "mask_soft": False}], ids=str
)
@pytest.mark.parametrize("side", ["logits", "projection"])
def test_a_batch_without_tokens_has_no_loss_and_empty_gradients(
    side: str, settings: dict[str, Any], shape: tuple[int, ...], backend: str
) -> None:
    if settings.get("shift") and len(shape) < 2:
        shape = (1, *shape)
    leaf = torch.zeros(*shape, V if side == "logits" else H, requires_grad=True)
    student = leaf if side == "logits" else fastkd.Projection(leaf, WEIGHT)
    labels = torch.zeros(shape, dtype=torch.int64)
    loss = fastkd.kd_loss(student, torch.zeros(*shape, V), labels, weights=torch.ones(shape), **settings)
    assert loss.sum() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.shape == leaf.shape


def test_rows_that_are_not_there_may_lie_anyhow() -> None:
    empty = torch.randn(19, 3, 0).movedim(0, -1).transpose(0, 1)
    labels = torch.zeros(empty.shape[:-1], dtype=torch.int64)
    assert fastkd.kd_loss(empty, empty.clone(), labels) == 0
    assert fastkd.log_softmax(empty).shape == empty.shape
    assert fastkd.row_statistics(empty).entropy.numel() == 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_teacher_of_inference_mode(reduction: Any, backend: str) -> None:
    with torch.inference_mode():
        teacher, hidden = TEACHER * 1, HIDDEN * 1
    for one, plain in (
        (teacher, TEACHER),
        (fastkd.Projection(hidden, WEIGHT), fastkd.Projection(HIDDEN, WEIGHT)),
    ):
        gradients = []
        for source in (one, plain):
            leaf = STUDENT.clone().requires_grad_()
            loss = fastkd.kd_loss(leaf, source, LABELS, reduction=reduction).sum()
            gradients += torch.autograd.grad(loss, leaf)
        assert torch.equal(*gradients)


def test_a_projection_of_two_dtypes_has_logits() -> None:
    mixed = fastkd.Projection(HIDDEN.bfloat16(), WEIGHT)
    torch.testing.assert_close(mixed.logits(), HIDDEN.bfloat16().float() @ WEIGHT.t())


# --- refused ----------------------------------------------------------------------------------------------------


class Output(dict):  # type: ignore[type-arg]
    """Like transformers' `ModelOutput`."""

    logits = STUDENT


def _distributed() -> Any:
    """As FSDP2 shards a model's parameters."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return DTensor.from_local(STUDENT, DeviceMesh("cpu", [0]), [Replicate()])
    finally:
        torch.distributed.destroy_process_group()


def call(**changes: Any) -> Callable[[], Any]:
    def run() -> Any:
        given = {"student": STUDENT, "teacher": TEACHER, "labels": LABELS, **changes}
        return fastkd.kd_loss(given.pop("student"), given.pop("teacher"), given.pop("labels"), **given)

    return run


def weights(value: float) -> torch.Tensor:
    return torch.tensor([1.0, value, 1, 1, 1, 1])


NAN, INF = math.nan, math.inf
NO_NUMBERS = (NAN, INF, "2", 2j)
NO_COUNTS = (torch.tensor(NAN), torch.tensor(-2), torch.tensor(2j), torch.ones(2))
SWITCHES = ("shift", "scale_t2", "mask_soft", "inplace", "return_parts")
TEMPERATURES, WEIGHTS = ("temperature", "teacher_temperature"), ("soft_weight", "hard_weight")
#: name in the message → (how to call, more of the message)
REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    *((name, call(**{name: value}), repr(value)) for name in SWITCHES for value in ("no", 1, None)),
    *((name, call(**{name: value}), "") for name in TEMPERATURES for value in (0, -1, 1e200, 1e-40, True, *NO_NUMBERS)),
    *((name, call(**{name: value}), "") for name in WEIGHTS for value in (-1, None, *NO_NUMBERS)),
    *(("ignore_index", call(ignore_index=value), "int") for value in (1.5, "x", None, True)),
    *(("ignore_index", call(ignore_index=value), "64 bits") for value in (2**64 - 100, -(2**63) - 1)),
    *(("vocab_size", call(vocab_size=value), "") for value in (0, 2.5, "9", V + 1)),
    *(("memory_budget", call(memory_budget=value), "") for value in (0, NAN, "1GB")),
    *(("weights", call(weights=weights(value)), str(value)) for value in (-1.0, NAN, INF)),
    ("weights", call(weights=torch.ones(N, dtype=torch.complex64)), "complex64"),
    *(("num_items", call(num_items=value), "") for value in (-1, *NO_NUMBERS, *NO_COUNTS)),
    *((name, call(**{name: Output()}), r"pass its \.logits") for name in ("student", "teacher")),
    *((name, call(**{name: STUDENT.to_sparse()}), "to_dense") for name in ("student", "teacher")),
    *((name, call(**{name: STUDENT.to("meta")}), "meta") for name in ("student", "teacher")),
    ("student", lambda: call(student=torch.quantize_per_tensor(STUDENT, 0.1, 0, torch.qint8))(), "qint8"),
    (
        "SparseTargets logprobs",
        lambda: fastkd.SparseTargets(torch.zeros(STUDENT.shape, dtype=torch.int64), _distributed(), "ghost", 2.0),
        r"DTensor.*to_local\(\).*full_tensor\(\)",
    ),
    ("float64", call(student=fastkd.Projection(HIDDEN.double(), WEIGHT.double())), "float32"),
    ("float64", call(teacher=fastkd.Projection(HIDDEN.double(), WEIGHT.double())), "float32"),
    ("float64", call(teacher=TEACHER.double()), "float32"),
    ("softcap", lambda: fastkd.Projection(HIDDEN, WEIGHT, softcap=-1), "-1"),
    ("logit_scale", lambda: fastkd.Projection(HIDDEN, WEIGHT, logit_scale=NAN), "nan"),
    ("temperature", lambda: fastkd.log_softmax(STUDENT, 1e200), r"1e\+200"),
    ("temperature", lambda: fastkd.row_statistics(STUDENT, None, "1"), "'1'"),  # type: ignore[arg-type]
    ("temperature", lambda: fastkd.SparseTargets(LABELS[:, None], logits(N, 1), "ghost", 0), "0"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("name", "run", "said"), [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(REFUSED)]
)
def test_what_cannot_be_meant_is_named_before_any_work(
    name: str, run: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("a backend was asked for")

    monkeypatch.setattr(backend, "select", work)
    for module in (fastkd.ops, fastkd.projection.loop):
        monkeypatch.setattr(module, "select", work)
    with pytest.raises((TypeError, ValueError), match=rf"(?s){name}.*{said}"):
        run()


def test_a_budget_too_small_for_the_backward_is_refused_by_the_forward() -> None:
    hidden, labels = logits(64, H).requires_grad_(), torch.zeros(64, dtype=torch.int64)
    student = fastkd.Projection(hidden, logits(4000, H).requires_grad_())
    kd = fastkd.KDLoss(soft_weight=0, reduction="none", memory_budget=9000)
    with pytest.raises(ValueError, match=r"memory_budget=\d+ bytes.*too small.*need (\d+) bytes") as error:
        kd(student, None, labels)
    kd.memory_budget = int(str(error.value).partition("need ")[2].split()[0])
    kd(student, None, labels).sum().backward()
    assert hidden.grad is not None


# --- typed ------------------------------------------------------------------------------------------------------


def test_both_ways_of_calling_show_the_same_parameters() -> None:
    made = inspect.signature(fastkd.KDLoss).parameters
    called = inspect.signature(fastkd.kd_loss).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in (*made.values(), *called.values()))
    for name, parameter in made.items():
        assert (called[name].default, called[name].annotation) == (parameter.default, parameter.annotation)
    forward = inspect.signature(fastkd.KDLoss.forward).parameters
    assert called.keys() == {*forward, *made} - {"self"}


USER = """
import torch
import fastkd

z = torch.zeros(2, 3)
fastkd.kd_loss(z, z, temperature=2.0, hard_weight=0.0, reduction="sum")
fastkd.KDLoss(2.0, divergence=fastkd.JSD(0.1))(z, z)
fastkd.kd_loss(z, z, temprature=2.0)
fastkd.KDLoss(reduction="avg")
"""


def test_checkers_see_the_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", "user.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    wrong = [line for line in found.stdout.splitlines() if "error:" in line]
    assert len(wrong) == 2, found.stdout + found.stderr
    assert 'user.py:8: error: Unexpected keyword argument "temprature" for "kd_loss"' in wrong[0]
    assert 'user.py:9: error: Argument "reduction" to "KDLoss" has incompatible type' in wrong[1]
