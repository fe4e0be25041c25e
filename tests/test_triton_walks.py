"""The other ways to walk a row: the numerics contract, how often logits are read, and when each is taken."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton.language as tl  # noqa: E402

from fastkd import reference  # noqa: E402
from fastkd.divergences import TABLE, Divergence  # noqa: E402
from fastkd.kernels import gpu  # noqa: E402
from fastkd.kernels.gpu import tickets, walks  # noqa: E402
from fastkd.kernels.gpu.divergences import DIVERGENCES  # noqa: E402
from fastkd.kernels.gpu.launch import Block  # noqa: E402
from tests import cases  # noqa: E402
from tests.triton_interpreter import interpreted  # noqa: E402
from tests.triton_judge import judge  # noqa: E402
from tools.machine_code import static  # noqa: E402
from tools.machine_code.offline import TARGETS, stand_in_driver  # noqa: E402

#: Two rows whose last step is not full, that lie on vectors and that do not.
VOCABULARIES = (4 * 256 * 8 * 2 + 8 * 5, 5003)


@pytest.fixture(params=[walk for walk in walks.WALKS if walk != "sweeps"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FASTKD_WALK", request.param)
    # Slices so small that short rows get a cluster, whatever Triton is installed: the interpreter needs none.
    for slice in "_CLUSTER_SLICE", "_TICKET_SLICE":
        monkeypatch.setattr(walks, slice, 8 << 10)
    monkeypatch.setattr(walks, "CLUSTER_TRITON", (0, 0))
    return request.param


def _block(vocab: int, dtype: torch.dtype, target: str = "sm_90") -> Block:
    with stand_in_driver(TARGETS[target]):
        rows = torch.zeros(2, vocab, dtype=dtype)
        return walks.walk_for(walks.Swept([rows, rows], rows, vocab, DIVERGENCES["forward_kl"])).block


@pytest.mark.parametrize(
    ("divergence", "family"), list(zip(cases.KINDS, itertools.cycle(["near_equal", "peaked"]), strict=False)), ids=str
)
def test_contract(divergence: Divergence, family: str, walk: str) -> None:
    assert _block(5003, torch.float32).shared
    judge(*cases.logits(family, 1, 5003), divergence)


#: Every two of divergence, vocabulary and dtype meet.
LOW_PRECISION = [
    (divergence, VOCABULARIES[(i + j) % 2], dtype)
    for i, divergence in enumerate(["forward_kl", "jsd", "skew_kl", "mse"])
    for j, dtype in enumerate([torch.bfloat16, torch.float16])
]


@pytest.mark.parametrize(("divergence", "vocab", "dtype"), LOW_PRECISION, ids=str)
def test_low_precision(divergence: str, vocab: int, dtype: torch.dtype, walk: str) -> None:
    assert _block(vocab, dtype).shared
    student, teacher = cases.logits("far", 2, vocab, dtype)
    trace = judge(student, teacher, TABLE[divergence]())
    reads = 3 if TABLE[divergence].normalised else 2
    # The label's logit is read once more.
    assert (trace.loads(teacher).sum(-1) <= reads * vocab + 1).all()
    assert (trace.loads(teacher) >= reads).all()


def test_the_gradient_in_place(walk: str) -> None:
    student, teacher = cases.logits("far", 2, VOCABULARIES[1], torch.bfloat16)
    judge(student.clone(), teacher, TABLE["forward_kl"](), grad=(place := student.clone()))
    mine = student.clone()
    labels, scale = cases.labels(2, VOCABULARIES[1]), torch.ones(2)
    spec = cases.spec(TABLE["forward_kl"](), VOCABULARIES[1])
    with interpreted():
        gpu.kd_rows(student, teacher, labels, scale, scale, spec, place)
        gpu.kd_rows(mine, teacher, labels, scale, scale, spec, mine)
    assert torch.equal(mine, place)


def test_rows_that_are_skipped_and_rows_without_a_label(walk: str) -> None:
    vocab = VOCABULARIES[1]
    student, teacher = cases.logits("far", 3, vocab, torch.bfloat16)
    grad = torch.full_like(student, torch.nan)
    soft_scale, hard_scale = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    labels = torch.tensor([vocab - 1, 0, -100])
    arguments = student, teacher, labels, soft_scale, hard_scale, cases.spec(TABLE["forward_kl"](), vocab)
    with interpreted():
        values = gpu.kd_rows(*arguments, grad)
    wanted = torch.empty(student.shape, dtype=torch.float64)
    truth = reference.kd_rows(student.double(), teacher.double(), *arguments[2:], wanted)
    for value, true in zip(values, truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-2, atol=1e-7)
    assert (grad[1] == 0).all()


def test_cross_entropy_alone(walk: str) -> None:
    """Without a teacher no divergence has terms, whatever its name: each logit is read twice."""
    vocab = VOCABULARIES[1]
    student, _ = cases.logits("far", 2, vocab, torch.bfloat16)
    labels, scale, spec = cases.labels(2, vocab), torch.ones(2), cases.spec(TABLE["jsd"](), vocab)
    grad, wanted = torch.empty_like(student), torch.empty(student.shape, dtype=torch.float64)
    with interpreted() as trace:
        _, hard = gpu.kd_rows(student, None, labels, None, scale, spec, grad)
    _, truth = reference.kd_rows(student.double(), None, labels, None, scale, spec, wanted)
    torch.testing.assert_close(hard.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-2, atol=1e-7)
    assert (grad != 0).any()
    assert trace.loads(student).median() == 2


def test_a_walk_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_WALK", "crawl")
    student, teacher = cases.logits("far", 1, 100)
    with interpreted(), pytest.raises(ValueError, match="FASTKD_WALK='crawl': choose one of sweeps, cluster, tickets"):
        gpu.kd_rows(student, teacher, None, torch.ones(1), None, cases.spec(TABLE["forward_kl"](), 100), None)


@pytest.mark.parametrize(
    ("target", "version", "taken"),
    [
        ("sm_90", (3, 8), True),
        ("sm_100", (3, 9), True),
        ("sm_90", (3, 7), False),
        ("sm_80", (3, 9), False),
        ("gfx942", (3, 9), False),
    ],
)
def test_clusters_are_for_gpus_and_versions_that_have_them(
    target: str, version: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTKD_WALK", "cluster")
    monkeypatch.setattr(walks, "_triton", lambda: version)
    block = _block(50257, torch.bfloat16, target)
    assert (block.ctas > 1) == taken
    with stand_in_driver(TARGETS[target]):
        assert walks.offered() == ("sweeps", *(["cluster"] if taken else []), "tickets")
    if taken:
        assert 2 * 2 * 50257 <= block.ctas * walks._CLUSTER_SLICE < 2 * 2 * 2 * 50257


def test_the_default_is_the_walk_of_every_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTKD_WALK", raising=False)
    assert not _block(50257, torch.bfloat16).shared


# --- tickets ----------------------------------------------------------------------------------------------------


def _record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is done and waited for, in order: ("done" or "wait", phase, row)."""
    seen: list[tuple[str, int, int]] = []
    kept = dict(vars(tickets))
    for name, what in (("_report", "done"), ("_wait", "wait")):

        def note(queue: Any, phase: Any, row: Any, *rest: Any, what: str = what, run: str = name) -> None:
            seen.append((what, int(phase), int(row)))
            kept[run](queue, phase, row, *rest)

        monkeypatch.setattr(tickets, name, note)
    return seen


def _loss(divergence: str, rows: int = 5) -> list[torch.Tensor]:
    vocab = VOCABULARIES[1]
    student, teacher = cases.logits("far", rows, vocab, torch.bfloat16)
    labels, scale = cases.labels(rows, vocab), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])[:rows]
    grad = torch.full_like(student, torch.nan)
    spec = cases.spec(TABLE[divergence](), vocab)
    with interpreted():
        values = gpu.kd_rows(student, teacher, labels, scale, scale, spec, grad)
    return [*values, grad]


@pytest.fixture
def in_tickets(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("FASTKD_WALK", "tickets")
    monkeypatch.setattr(walks, "_TICKET_SLICE", 8 << 10)
    return monkeypatch


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_ticket_waits_only_for_tickets_before_it(divergence: str, in_tickets: pytest.MonkeyPatch) -> None:
    """One program alone serves them in their order, and finds everything done that it would wait for."""
    seen = _record(in_tickets)
    _loss(divergence)
    slices = _block(VOCABULARIES[1], torch.bfloat16).slices
    assert slices > 1
    assert any(what == "wait" for what, *_ in seen)
    for index, (what, *which) in enumerate(seen):
        if what == "wait":
            assert seen[:index].count(("done", *which)) == slices


@pytest.mark.parametrize(("divergence", "seed"), [("forward_kl", 0), ("skew_kl", 1)])
def test_any_order_that_waits_gives_the_same_bits(divergence: str, seed: int, in_tickets: pytest.MonkeyPatch) -> None:
    """Tickets are served as late or as early as their waiting allows: by chance, the last first where it can be."""
    in_order = _loss(divergence)
    block = _block(VOCABULARIES[1], torch.bfloat16)
    phases = 3 if TABLE[divergence].normalised else 2
    rows, slices, ahead = 5, block.slices, 2 * tickets.SHARING + block.slices
    generator = random.Random(seed)
    open_ = list(range(phases * (rows * slices + (phases - 1) * ahead)))
    done: Counter[tuple[int, int]] = Counter()

    def may_be_served(ticket: int) -> bool:
        phase, slot = ticket % phases, ticket // phases - ticket % phases * ahead
        live = 0 <= slot < rows * slices
        return not live or phase == 0 or done[phase - 1, slot // slices] == slices

    order = []
    while open_:
        free = [ticket for ticket in open_ if may_be_served(ticket)]
        ticket = free[-1] if generator.random() < 0.5 else generator.choice(free)
        open_.remove(ticket)
        order.append(ticket)
        done[ticket % phases, (ticket // phases - ticket % phases * ahead) // slices] += 1
    left = iter(order)
    in_tickets.setattr(tickets, "_claim", lambda queue: tl.full((), next(left, 1 << 30), tl.int32))
    assert order != sorted(order)
    for found, wanted in zip(_loss(divergence), in_order, strict=True):
        assert torch.equal(found, wanted)


def test_counters_are_left_at_zero(in_tickets: pytest.MonkeyPatch) -> None:
    """What one launch leaves, the next begins with."""
    counters = torch.zeros(100, dtype=torch.int32)
    in_tickets.setattr(tickets, "_zeros", lambda count, device: counters[:count])
    first = _loss("jsd")
    assert not counters.any()
    assert all(torch.equal(a, b) for a, b in zip(first, _loss("jsd"), strict=True))


def test_tickets_are_for_gradients(in_tickets: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(2, 50257)
    swept = walks.Swept([rows, rows], rows, 50257, DIVERGENCES["jsd"])
    with stand_in_driver(TARGETS["sm_90"]):
        assert walks.walk_for(swept).block.phases == 3
        assert not walks.walk_for(swept._replace(grad=None)).block.shared


# --- as compiled ------------------------------------------------------------------------------------------------

needs_clusters = pytest.mark.skipif(walks._triton() < walks.CLUSTER_TRITON, reason="Triton has no cluster reductions")
#: GB/s of a copy on an H100, which no kernel exceeds, though 3350 are published.
COPY = 3000
#: What reaches DRAM, relative to reading both rows and writing the gradient once.
ONCE = 1.15


#: Compiling takes seconds. Each case in one way, of which neighbours have another.
WAYS = itertools.cycle(itertools.product(static.CLUSTER_TARGETS, static.VOCABULARIES))
CLUSTERS = [(case, *way) for case, way in zip(static.CLUSTER_CASES, WAYS, strict=False)]


@needs_clusters
@pytest.mark.parametrize(("case", "target", "vocab"), CLUSTERS, ids=str)
def test_a_cluster_reads_rows_from_dram_once(case: static.Case, target: str, vocab: int) -> None:
    reading = static.read(case, target, vocab)
    assert not case.broken(reading)
    assert reading.estimate.dram_bytes <= ONCE * (2 * case.logits.itemsize + case.grad.itemsize)
    assert 0 < reading.barriers[1] <= 12


@needs_clusters
@pytest.mark.parametrize("vocab", static.OTHER_VOCABULARIES)
def test_other_vocabularies(vocab: int) -> None:
    # Rows of fp32 that are wider fill more than 16 slices.
    for dtype in (torch.bfloat16, torch.float32) if vocab < 200_000 else (torch.bfloat16,):
        case = static.kd("forward_kl", dtype, dtype, walk="cluster")
        reading = static.read(case, "sm_90", vocab)
        assert not case.broken(reading)
        assert reading.estimate.dram_bytes <= ONCE * (2 * case.logits.itemsize + case.grad.itemsize)


@needs_clusters
@pytest.mark.parametrize(("vocab", "milliseconds"), [(128256, 2.4), (50257, 0.95)])
def test_forward_kl_at_the_speed_of_a_copy(vocab: int, milliseconds: float) -> None:
    """8192 tokens in bf16 on an H100, by what reaches DRAM: an estimate, which nobody has measured."""
    found = static.read(static.kd("forward_kl", walk="cluster"), "sm_90", vocab).estimate
    assert found.bound == "DRAM"
    assert found.dram_bytes <= 6.5
    assert found.dram_bytes * 8192 * vocab / COPY * 1e-6 <= milliseconds


@pytest.mark.parametrize(
    ("divergence", "target", "vocab"),
    [
        ("forward_kl", "sm_90", 50257),
        ("jsd", "sm_90", 128256),
        ("forward_kl", "sm_80", 128256),
        ("jsd", "sm_100", 50257),
        ("alpha_beta", "gfx942", 128256),
    ],
)
def test_tickets_read_rows_from_dram_once(divergence: str, target: str, vocab: int) -> None:
    case = static.kd(divergence, walk="tickets")
    reading = static.read(case, target, vocab)
    assert not case.broken(reading)
    assert reading.estimate.dram_bytes <= ONCE * 6


def test_sweeps_read_again_what_the_cache_has_lost() -> None:
    """132 rows in flight are 68 MB at 128256 columns, more than an H100 keeps; at 32000 they are 17 MB."""
    found = {vocab: static.read(static.kd("forward_kl"), "sm_90", vocab).estimate for vocab in (32000, 128256)}
    assert all(estimate.bytes_per_logit == 10 for estimate in found.values())
    assert found[32000].dram_bytes == pytest.approx(6)
    assert 8 < found[128256].dram_bytes < 9
