"""The Triton kernels on a real GPU: the same contract, for the day there is one. `pytest -m gpu` selects these."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.divergences import Divergence
from fastkd.kernels import gpu
from fastkd.kernels.gpu.walks import WALKS, offered
from tests import cases, compare
from tests.sparse_targets import kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("vocab", [50257, 128256])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=str)
def test_contract(divergence: Divergence, family: str, dtype: torch.dtype, vocab: int) -> None:
    if family == "offset" and dtype != torch.float32:
        pytest.skip("an offset of 1e4 leaves nothing of the logits in 8 or 11 bits")
    if family == "peaked" and dtype == torch.float16 and divergence == fastkd.AlphaBeta(0.5, -0.5):
        pytest.skip("the gradient, a power of p/q, is beyond what float16 can hold")
    student, teacher = (x.cuda() for x in cases.logits(family, 8, vocab, dtype))
    labels, scale, spec = cases.labels(8, vocab).cuda(), torch.ones(8).cuda(), cases.spec(divergence, vocab)
    outcomes = []
    for backend, cast in ((gpu, dtype), (reference, torch.float32), (reference, torch.float64)):
        s, t = student.to(cast), teacher.to(cast)
        grad = torch.empty_like(s)
        outcomes.append((*backend.kd_rows(s, t, labels, scale, scale, spec, grad), grad))
    ours, eager, truth = outcomes
    compare.assert_value(ours[0], truth[0], eager[0])
    compare.assert_value(ours[1], truth[1], eager[1])
    undecided = cases.undecided(student, teacher, spec)
    compare.assert_gradient(ours[2], eager[2].to(dtype), truth[2], undecided=undecided)


@pytest.mark.parametrize("vocab", [50257, 128256])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_kl", "mse"])
@pytest.mark.parametrize("walk", WALKS)
def test_every_walk_again_and_again(
    walk: str, divergence: str, dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of the default walk; the same bits at every repetition and in a graph. Some rows are skipped."""
    student, teacher = (x.cuda() for x in cases.logits("far", 300, vocab, dtype))
    labels = cases.labels(300, vocab, ignored=(0, 7, 299)).cuda()
    kd = fastkd.KDLoss(2.0, divergence=divergence)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student.clone().requires_grad_()
        loss = kd(leaf, teacher, labels)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    wanted = run()
    if walk not in offered():
        pytest.skip("this GPU, or this Triton, cannot take it")
    monkeypatch.setenv("FASTKD_WALK", walk)
    first = run()
    torch.testing.assert_close(first[0], wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(first[1], wanted[1], rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-9)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("settings", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
def test_no_synchronisation_and_the_same_bits_twice(settings: dict[str, object]) -> None:
    student, teacher = (x.cuda() for x in cases.logits("far", 64, 50257, torch.bfloat16))
    labels, kd = cases.labels(64, 50257).cuda(), fastkd.KDLoss(2.0, **settings)  # type: ignore[arg-type]
    grads = []
    for warm in (False, True, True):
        leaf = student.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            (0.5 * kd(leaf * 1, teacher, labels).sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grads.append(leaf.grad)
    assert torch.equal(grads[1], grads[2])
    assert grads[1].abs().max() > 0


def test_cuda_graph() -> None:
    student, teacher = (x.cuda() for x in cases.logits("far", 16, 50257, torch.bfloat16))
    labels, kd = cases.labels(16, 50257).cuda(), fastkd.KDLoss(2.0)
    leaf = student.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            leaf.grad = None
            kd(leaf, teacher, labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    leaf.grad = None
    with torch.cuda.graph(graph):
        loss = kd(leaf, teacher, labels)
        loss.backward()
    graph.replay()
    expected = student.clone().requires_grad_()
    kd(expected, teacher, labels).backward()
    assert torch.equal(leaf.grad, expected.grad)


def projections(dtype: torch.dtype, rows: int = 512) -> tuple[list[torch.Tensor], fastkd.Projection, torch.Tensor]:
    """Hidden states and weight of a student, a teacher, labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 256), (50257, 256), (rows, 384), (50257, 384)
    hidden, weight, hidden_t, weight_t = (torch.randn(*shape, generator=generator) for shape in shapes)
    student = [x.to("cuda", dtype).requires_grad_() for x in (hidden, weight * 3 / 16)]
    teacher = fastkd.Projection(hidden_t.to("cuda", dtype), (weight_t * 3 / 384**0.5).to("cuda", dtype))
    return student, teacher, cases.labels(rows, 50257, ignored=(0, 7)).cuda()


@pytest.mark.parametrize("mib", [2048, 64, 16])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_projections(divergence: str, dtype: torch.dtype, mib: int) -> None:
    student, teacher, labels = projections(dtype)
    loss = fastkd.kd_loss(fastkd.Projection(*student), teacher, labels, divergence=divergence, memory_budget=mib << 20)
    ours = torch.autograd.grad(loss, student)
    leaves = [x.detach().double().requires_grad_() for x in student]
    logits = (teacher.hidden.double() @ teacher.weight.double().T).detach()
    truth = fastkd.kd_loss(leaves[0] @ leaves[1].T, logits, labels, divergence=divergence)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for a, b in zip(ours, torch.autograd.grad(truth, leaves), strict=True):
        assert compare.relative_error(a, b) < (1e-2 if dtype != torch.float32 else 5e-6)


def test_projections_do_not_synchronise_and_can_be_captured() -> None:
    student, teacher, labels = projections(torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        loss = fastkd.kd_loss(fastkd.Projection(*student), teacher, labels, memory_budget=64 << 20)
        return torch.autograd.grad(loss, student)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b, c in zip(expected, again, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def masked_half(rows: int = 4096) -> tuple[list[torch.Tensor], fastkd.Projection, torch.Tensor]:
    """The same, with half of the labels masked."""
    student, teacher, _ = projections(torch.bfloat16, rows)
    return student, teacher, cases.labels(rows, 50257, ignored=tuple(range(0, rows, 2)))


@pytest.mark.parametrize("known", ["live", "labels on the host"])
@pytest.mark.parametrize("mib", [None, 512, 32])
def test_masked_tokens_are_left_out_without_waiting(known: str, mib: int | None) -> None:
    student, teacher, labels = masked_half()
    options = {"memory_budget": None if mib is None else mib << 20}

    def step(labels: torch.Tensor, **more: int) -> tuple[torch.Tensor, ...]:
        loss = fastkd.kd_loss(fastkd.Projection(*student), teacher, labels, **options, **more)
        return loss.detach(), *torch.autograd.grad(loss, student)

    expected = step(labels.cuda())
    told = (labels.cuda(), {"live": 2048}) if known == "live" else (labels.pin_memory(), {})
    step(told[0], **told[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(told[0], **told[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, expected, strict=True):
        assert compare.relative_error(a, b) < 4e-3
    assert (found[1][::2] == 0).all()
    wrong = step(labels.cuda(), live=2047)
    assert all(value.isnan().any() for value in wrong)


@pytest.mark.parametrize("mib", [None, 1024, 256, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_memory_is_what_was_planned(dtype: torch.dtype, mib: int | None) -> None:
    student, teacher, labels = projections(dtype, 8192)
    budget = None if mib is None else mib << 20

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            fastkd.kd_loss(fastkd.Projection(*student), teacher, labels, memory_budget=budget), student
        )

    step()
    plan = fastkd.plan(8192, 50257, 256, 384, dtype=dtype, device="cuda", memory_budget=budget)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(plan.peak_bytes, rel=0.05)


@pytest.mark.parametrize("live", [None, 2048])
def test_a_graph_of_the_default_budget_is_what_ran_before(live: int | None) -> None:
    student, teacher, labels = masked_half()
    labels = labels.cuda()

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(fastkd.kd_loss(fastkd.Projection(*student), teacher, labels, live=live), student)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    with torch.no_grad():
        student[0].neg_()
    graph.replay()  # of the values that are there now
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiled_with_graphs() -> None:
    student, teacher, labels = masked_half()
    labels = labels.cuda()

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        loss = fastkd.kd_loss(fastkd.Projection(hidden, weight), teacher, labels, live=2048, memory_budget=512 << 20)
        assert isinstance(loss, torch.Tensor)
        return loss

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    expected = torch.autograd.grad(step(*student), student)
    for _ in range(4):  # the first two warm up and capture
        torch.compiler.cudagraph_mark_step_begin()
        found = [grad.clone() for grad in torch.autograd.grad(compiled(*student), student)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_projections_on_another_stream_and_twice_backward() -> None:
    student, teacher, labels = masked_half()
    expected = torch.autograd.grad(fastkd.kd_loss(fastkd.Projection(*student), teacher, labels), student)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = fastkd.kd_loss(fastkd.Projection(*student), teacher, labels)  # labels are copied on this stream too
        twice = [torch.autograd.grad(loss, student, retain_graph=True) for _ in range(2)]
    torch.cuda.current_stream().wait_stream(stream)
    for found in twice:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_projections_under_autocast() -> None:
    student, teacher, labels = projections(torch.float32)
    exact = torch.autograd.grad(fastkd.kd_loss(fastkd.Projection(*student), teacher, labels), student)
    with torch.autocast("cuda", torch.bfloat16):
        loss = fastkd.kd_loss(fastkd.Projection(*student), teacher, labels)
    for a, b in zip(torch.autograd.grad(loss, student), exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < compare.relative_error(a, b) < 5e-2


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("family", ["near_equal", "far", "flat"])
@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl", "jsd"])
def test_sparse_targets(divergence: str, family: str, dtype: torch.dtype) -> None:
    student, teacher = cases.logits(family, 8, 50257, dtype)
    labels, targets = cases.labels(8, 50257), kept(teacher, 64, shuffled=True)
    losses, gradients = [], []
    for device, cast in (("cuda", dtype), ("cpu", dtype), ("cpu", torch.float64)):
        z = student.to(device, cast).requires_grad_()
        with fastkd.use_backend(None if device == "cuda" else "reference"):
            losses.append(fastkd.kd_loss(z, targets.to(device), labels.to(device), divergence=divergence))
            gradients.append(torch.autograd.grad(losses[-1], z)[0].cpu())
    compare.assert_value(losses[0].cpu(), losses[2], losses[1])
    compare.assert_gradient(*gradients)


def test_sparse_targets_of_projections_do_not_synchronise() -> None:
    student, teacher, labels = projections(torch.bfloat16)
    targets = kept(teacher.logits().float().cpu(), 64).to("cuda")

    def step() -> tuple[torch.Tensor, ...]:
        loss = fastkd.kd_loss(fastkd.Projection(*student), targets, labels, memory_budget=32 << 20)
        return torch.autograd.grad(loss, student)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("projected", [False, True])
def test_mixtures(projected: bool, dtype: torch.dtype) -> None:
    """Value and gradients, the same at every call, without a synchronisation."""
    student, first, labels = projections(dtype)
    teachers = [first, fastkd.Projection(first.hidden.flip(0), first.weight.flip(0))]
    sources = teachers if projected else [teacher.logits() for teacher in teachers]
    mixture = fastkd.Mixture(sources, [0.3, 0.7])
    found = []
    for warm in (False, True):
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            loss = fastkd.kd_loss(fastkd.Projection(*student), mixture, labels, live=510)
            found.append((loss.detach(), *torch.autograd.grad(loss, student)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    outcomes = []
    for cast in (torch.float32, torch.float64):
        leaves = [x.detach().to(cast).requires_grad_() for x in student]
        wide = [x if isinstance(x, torch.Tensor) else (x.hidden, x.weight) for x in sources]
        rows = [x.to(cast) if isinstance(x, torch.Tensor) else x[0].to(cast) @ x[1].to(cast).T for x in wide]
        with fastkd.use_backend("reference"):
            loss = fastkd.kd_loss(leaves[0] @ leaves[1].T, fastkd.Mixture(rows, [0.3, 0.7]), labels)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    eager, truth = outcomes
    compare.assert_value(found[0][0], truth[0], eager[0])
    for ours, theirs, exact in zip(found[0][1:], eager[1:], truth[1:], strict=True):
        compare.assert_gradient(ours, theirs.to(ours.dtype), exact)


def test_statistics() -> None:
    logits = cases.logits("peaked", 16, 50257)[0]
    labels = cases.labels(16, 50257)
    ours = fastkd.row_statistics(logits.cuda(), labels.cuda())
    cpu = fastkd.row_statistics(logits, labels)
    for a, b in zip(ours, cpu, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.large
def test_rows_beyond_two_to_the_31() -> None:
    rows, vocab = (1 << 14) + 2, 1 << 17
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    last, teacher = (x.cuda() for x in cases.logits("far", 1, vocab, torch.bfloat16))
    student[-1] = last[0]
    weights = torch.zeros(rows, device="cuda")
    weights[-1] = 1
    labels = torch.full((rows,), 5, device="cuda")
    leaf = student.requires_grad_()
    fastkd.KDLoss(2.0, inplace=True)(leaf, teacher.expand(rows, vocab), labels, weights=weights).backward()
    small = last.clone().requires_grad_()
    fastkd.KDLoss(2.0)(small, teacher, labels[:1]).backward()
    assert torch.equal(leaf.grad[-1], small.grad[0])
