"""torch's default dtype and device change nothing: kernels write where and as the package says, not as torch would."""

from __future__ import annotations

import ast
import functools
import json
import math
import pathlib
import subprocess
import sys

import pytest
from torch.utils._device import _device_constructors

from fastkd.divergences import TABLE

ROOT = pathlib.Path(__file__).resolve().parents[1]

#: Runs everything that allocates for a kernel or computes on the reference, under each default in turn, and prints the
#: numbers of each as a line. A process of its own: where a kernel is handed too small a buffer, its heap is lost.
VALUES = """
import json, sys, tempfile
import torch
import fastkd, fastkd.cache
from fastkd.backend import select
from fastkd.divergences import TABLE
from tests import cases

N, V, H = 6, 1100, 16
STUDENT, TEACHER = cases.logits("far", N, V)
LABELS = cases.labels(N, V, ignored=(2,))
HIDDEN, OTHER_HIDDEN = torch.randn(N, H), torch.randn(N, H)
WEIGHT, OTHER_WEIGHT, BIAS = torch.randn(V, H), torch.randn(V, H), torch.randn(V)
UNIFORMS = torch.rand(N, dtype=torch.float64)
TOKENS = torch.randint(V, (4, 8), generator=torch.Generator().manual_seed(3))
EMBEDDING = torch.randn(V, H)
UPSTREAM = torch.randn(N, V)


def number(tensor):
    assert tensor.device.type == "cpu", tensor.device
    flat = tensor.detach().double().nan_to_num(0.25).flatten()
    return (flat * torch.arange(1, 1 + len(flat), dtype=torch.float64, device="cpu").sin()).sum().item()


def loss(student, teacher, leaves, **settings):
    out = fastkd.KDLoss(2.0, **settings)(student, teacher, LABELS)
    return [number(out), *map(number, torch.autograd.grad(out.sum(), leaves))]


def on_logits():
    for name in TABLE:
        for settings in ({}, {"reduction": "none"}, {"inplace": True}):
            z = STUDENT.clone().requires_grad_()
            yield f"{name} {settings}", loss(z, TEACHER, [z], divergence=name, **settings)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        z = STUDENT.to(dtype).requires_grad_()
        yield f"of {dtype}", loss(z, TEACHER.to(dtype), [z])
    z = (STUDENT / 4).half().requires_grad_()
    weights = torch.full_like(LABELS, 1e-6, dtype=torch.float32)
    out = fastkd.KDLoss(reduction="sum")(z, TEACHER, LABELS, weights=weights)
    yield "tiny fp16 gradients", [number(out), number(torch.autograd.grad(out * 1e6, z)[0])]


def from_hidden_states():
    other = fastkd.Projection(OTHER_HIDDEN, OTHER_WEIGHT)
    for name in TABLE:
        for budget in (None, 190_000):
            leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, BIAS)]
            settings = {"divergence": name, "memory_budget": budget}
            yield f"{name} {budget}", loss(fastkd.Projection(*leaves), other, leaves, **settings)
    leaves = [x.clone().half().requires_grad_() for x in (HIDDEN, WEIGHT, BIAS)]
    yield "mixed", loss(fastkd.Projection(*leaves, softcap=9.0), TEACHER, leaves)
    yield "statistics of a projection", [number(x) for x in fastkd.row_statistics(other, LABELS)]
    yield "rows of a view", loss(STUDENT.requires_grad_(), fastkd.Projection(OTHER_HIDDEN, OTHER_WEIGHT), [STUDENT])


def beside():
    yield "statistics", [number(x) for x in fastkd.row_statistics(STUDENT, LABELS, 1.5)]
    z = STUDENT.detach().clone().requires_grad_()
    out = fastkd.log_softmax(z, 1.5)
    yield "log-softmax", [number(out), number(torch.autograd.grad(out, z, UPSTREAM)[0])]


def sparse():
    backend = select(TEACHER)
    ids, logprobs, rest = backend.top_k(TEACHER, 12, 2.0)
    sampled = backend.sample(TEACHER, 12, 2.0, UNIFORMS)
    yield "selection", [number(x) for x in (ids, logprobs, rest, *sampled)]
    for targets in (
        fastkd.SparseTargets(ids, logprobs, "ghost", 2.0, rest=rest),
        fastkd.SparseTargets(ids, logprobs, "ghost", 2.0),
        fastkd.SparseTargets(ids, logprobs, "renormalize", 2.0),
        fastkd.SparseTargets(*sampled[:2], "sampled", 2.0, entropy=sampled[2]),
    ):
        z = STUDENT.detach().clone().requires_grad_()
        yield f"{targets.kind} {targets.rest is None}", loss(z, targets, [z])
        leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
        yield f"{targets.kind} projection", loss(fastkd.Projection(*leaves), targets, leaves, memory_budget=190_000)


def teacher_of(batch):
    return fastkd.Projection(EMBEDDING[batch["input_ids"]], OTHER_WEIGHT)


def cached():
    for form in ("sampled", "topk", "dense"):
        with tempfile.TemporaryDirectory() as directory:
            fastkd.cache.write(teacher_of, [{"input_ids": TOKENS}], directory, format=form)
            examples = [{"input_ids": row.tolist()} for row in TOKENS]
            batch = fastkd.cache.Collator(fastkd.cache.open(directory), pad_token_id=0)(examples)
            teacher = batch["teacher"]
            parts = (teacher,) if form == "dense" else (teacher.ids, teacher.logprobs)
            yield form, [number(x) for x in (batch["input_ids"], batch["labels"], *parts)]


def values():
    found = {}
    for backend in (None, "reference"):
        fastkd.use_backend(backend)
        for part in (on_logits, from_hidden_states, beside, sparse, cached):
            for name, numbers in part():
                found[f"{backend} {part.__name__} {name}"] = numbers
    fastkd.use_backend(None)
    return found


for mode in json.loads(sys.argv[1]):
    if mode.startswith("dtype "):
        torch.set_default_dtype(getattr(torch, mode.split()[1]))
        found = values()
        torch.set_default_dtype(torch.float32)
    elif mode == "inside torch.device('meta')":
        with torch.device("meta"):
            found = values()
    else:
        torch.set_default_device("meta" if "meta" in mode else "cpu")
        found = values()
        torch.set_default_device("cpu")
    print(json.dumps([mode, found]), flush=True)
"""

PLAIN = "plain"
MODES = ("dtype float64", "dtype bfloat16", "dtype float16", "inside torch.device('meta')", "device meta")


@functools.cache
def values_of(*modes: str) -> tuple[dict[str, dict[str, list[float]]], str]:
    """The numbers under each default that the process lived to print, and what it said at the end."""
    child = subprocess.run(
        [sys.executable, "-c", VALUES, json.dumps(modes)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    ending = f"exit status {child.returncode}\n{child.stderr[-2000:]}"
    return dict(json.loads(line) for line in child.stdout.splitlines()), ending


@pytest.mark.parametrize("mode", MODES)
def test_every_entry_point_gives_the_same_numbers(mode: str) -> None:
    found, ending = values_of(PLAIN, *MODES)
    assert mode in found, ending
    plain, ours = found[PLAIN], found[mode]
    assert len(plain) > 8 * len(TABLE)
    assert all(math.isfinite(number) for numbers in plain.values() for number in numbers)
    wrong = {name: (ours[name], plain[name]) for name in plain if ours[name] != plain[name]}
    assert not wrong, f"{len(wrong)} of {len(plain)} differ, as {next(iter(wrong.items()))}"


def _trusting(tree: ast.AST) -> list[str]:
    """Calls that make a tensor and leave its dtype or device to torch."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id not in ("torch", "Tensor"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if node.func.attr in _CONSTRUCTORS and not {"dtype", "device"} <= given:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


_CONSTRUCTORS = {function.__name__ for function in _device_constructors()} | {"Tensor", "FloatTensor", "normal"}


def test_every_allocation_states_dtype_and_device() -> None:
    assert _trusting(ast.parse("torch.empty(3, dtype=torch.float32)"))
    assert _trusting(ast.parse("torch.tensor(0.5, device='cpu')"))
    assert not _trusting(ast.parse("torch.zeros(3, dtype=torch.float32, device='cpu'); torch.zeros_like(x)"))
    paths = [path for folder in ("fastkd", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 40
    wrong = [f"{path.relative_to(ROOT)}:{call}" for path in paths for call in _trusting(ast.parse(path.read_text()))]
    assert not wrong, "\n".join(wrong)
