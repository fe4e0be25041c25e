"""The formulas of docs/scale.md: the bytes that collectives of 2 and 4 processes are given, and one rank's memory."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastkd
from bench.scale import formulas, tables
from bench.scale.formulas import FP32, Loss, Moved
from fastkd import ranks
from fastkd.divergences import resolve
from fastkd.kernels import cpu
from fastkd.projection.plan import HeadSize, plan_for
from fastkd.rows import STATE_BYTES, RowSpec, SparseRows, Wants
from tests import shards
from tests.collectives import Counting, counting
from tests.memory import printed
from tests.processes import run

ROOT = pathlib.Path(__file__).parent.parent
N, V, H = shards.N, shards.V, shards.H
ENTRIES = 7  # of `shards.teacher`
LIVE = N - 1  # one label of its batch is masked

# --- exchanged --------------------------------------------------------------------------------------------------


def counted(group: Counting) -> Moved:
    return Moved(**group.moved())


def losses(rank: int, world: int) -> None:
    group, batch, at = counting(), shards.Batch.of(), shards.cut(rank, world, uneven=True)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "mse", "forward_kl+tvd"):
        for form, rows in (("logits", N), ("projection", LIVE)):
            for kind in ("dense", "sparse"):
                if kind == "sparse" and divergence == "mse":
                    continue
                for labels in (True, False):
                    settings = {"divergence": divergence, "hard_weight": 0.5 * labels}
                    leaves, source = shards.student(batch, form, at.own)
                    taught = shards.teacher(batch, form, kind, at.own)
                    if kind == "dense":
                        taught = fastkd.VocabShard(taught, at.first, V, group)
                    student = fastkd.VocabShard(source, at.first, V, group)
                    shards.outcome(batch, (leaves, student), taught, {}, **settings)
                    told = formulas.of_loss(rows, world, Loss(divergence, kind, ENTRIES, labels), cpu, checked=True)
                    told += formulas.hidden_gradient(N, H) if form == "projection" else Moved()
                    assert counted(group) == told, f"{divergence}, {form}, {kind}, labels={labels}"


class Head(nn.Linear):
    """The loss is computed in its forward, where its weight is whole."""

    def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return fastkd.kd_loss(fastkd.Projection(hidden, self.weight), teacher, labels)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(V, H), nn.Linear(H, H), Head(H, V, bias=False)

    def forward(self, tokens: Tensor, teacher: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)), teacher, tokens)


def steps(rank: int, world: int) -> dict[str, tuple[Moved, Moved]]:
    """Engine → (counted, by formula), of the third step: DDP makes its buckets anew after the first."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    group, found = counting(), {}
    tokens, teacher = torch.arange(N), torch.randn(N, V)
    for engine in ("DDP", "FSDP2"):
        student = Student()
        head = student.head.weight.numel()
        parameters = sum(weight.numel() for weight in student.parameters())
        model: nn.Module = student
        if engine == "DDP":
            model, told = DistributedDataParallel(student, process_group=group), formulas.ddp(parameters, FP32)
        else:
            mesh, told = DeviceMesh.from_group(group, "cpu"), formulas.fsdp(parameters - head, head, FP32)
            for unit in (student.embedding, student.body):
                fully_shard(unit, mesh=mesh)
            fully_shard(student.head, mesh=mesh, reshard_after_forward=False)
            fully_shard(student, mesh=mesh)
        for _ in range(3):
            group.moved()
            model(tokens, teacher).backward()
            model.zero_grad()
        found[engine] = (counted(group), told)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_spread_vocabulary_exchanges_what_the_formula_says_to_the_byte(world: int) -> None:
    run(world, losses, world)


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_and_fsdp2_exchange_what_the_formulas_say(world: int) -> None:
    for found in run(world, steps, world):
        for engine, (seen, told) in found.items():
            for kind, size in vars(told).items():  # parts that do not divide are padded
                assert size <= getattr(seen, kind) <= 1.01 * size, f"{engine}, {kind}: {seen}, by formula {told}"


def test_gpus_exchange_fp32() -> None:
    gpu = pytest.importorskip("fastkd.kernels.gpu.state", exc_type=ImportError)
    told = {loss: loss.row_bytes(gpu) for loss in (Loss(), Loss("jsd"), Loss(teacher="sparse", entries=12))}
    assert list(told.values()) == [4 * 8, 4 * (8 + 2), 4 * (4 + 12)]


# --- held -------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, torch, torch.distributed as dist, fastkd
from tests.memory import peak
rank, folder, form, divergence, kind = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1)
N, W, H, H_TEACHER, K = 512, 32768, 64, 96, 64
leaves = [torch.randn(N, W)] if form == "logits" else [torch.randn(N, H), torch.randn(W, H)]
taught = [torch.randn(N, W)] if form == "logits" else [torch.randn(N, H_TEACHER), torch.randn(W, H_TEACHER)]
for leaf in leaves:
    leaf.requires_grad_()
def source(tensors, rows, columns):
    own = tensors[0][:rows, :columns] if form == "logits" else None
    own = fastkd.Projection(tensors[0][:rows], tensors[1][:columns]) if own is None else own
    return fastkd.VocabShard(own, rank * columns, 2 * columns)
def run(rows, columns):
    teacher = source(taught, rows, columns)
    if kind == "sparse":
        ids = torch.arange(K).expand(rows, K).contiguous()
        teacher = fastkd.SparseTargets(ids, torch.full((rows, K), -6.0), "ghost", 2.0)
    labels = torch.arange(rows)
    loss = fastkd.kd_loss(source(leaves, rows, columns), teacher, labels, divergence=divergence)
    return torch.autograd.grad(loss, leaves)
for _ in range(2):
    run(16, 4500)  # threads, autograd and gloo are set up, and the buffers the matrix products keep for good:
if form == "projection":
    with torch.no_grad():
        logits = leaves[0] @ leaves[1].T
        logits @ leaves[1], logits.T @ leaves[0], taught[0] @ taught[1].T
        del logits
dist.barrier()
print(peak(lambda: run(N, W)))
dist.barrier()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("divergence", "kind"), [("forward_kl", "dense"), ("jsd", "dense"), ("forward_kl", "sparse")])
@pytest.mark.parametrize("form", ["logits", "projection"])
def test_a_rank_holds_what_is_planned(form: str, divergence: str, kind: str, tmp_path: pathlib.Path) -> None:
    tokens, columns, hidden, hidden_of_teacher = 512, 32768, 64, 96
    shared = ranks.exchanged_bytes(2, 64 if kind == "sparse" else 0)
    teacher = None if kind == "sparse" else hidden_of_teacher
    plan = fastkd.plan(tokens, columns, hidden, teacher, divergence=divergence)
    predicted = 4 * tokens * columns if form == "logits" else plan.peak_bytes
    predicted += tokens * (shared + STATE_BYTES)
    with ThreadPoolExecutor(2) as pool:
        arguments = (str(tmp_path), form, divergence, kind)
        measured = [one for (one,) in pool.map(lambda rank: printed(MEMORY, str(rank), *arguments), range(2))]
    for one in measured:
        assert 0.95 * predicted <= one <= 1.05 * predicted


EXCHANGE = """
import torch
from fastkd import ranks
from fastkd.divergences import resolve
from fastkd.kernels import cpu
from fastkd.rows import RowSpec, SparseRows
from tests.memory import peak
torch.set_num_threads(1)
WORLD, ROWS, K = 128, 1024, 16
ranks.gathered = lambda values, group: values.expand(WORLD, *values.shape).contiguous()  # all ranks are this one
layout = ranks.Layout("", 0, (*range(WORLD),), (1,) * WORLD)
state, labels = cpu.tile_state(ROWS, torch.device("cpu")).zero_(), torch.zeros(ROWS, dtype=torch.int64)
ids, rest = torch.arange(K).expand(ROWS, K).contiguous(), torch.zeros(ROWS)
for name in ("forward_kl", "jsd", "mse"):
    shared = ranks.Rows(layout, cpu, RowSpec(name, resolve(name).parameters, 2.0, 2.0, 1.0, 1.0, WORLD))
    for teacher in (torch.empty(0), SparseRows(ids, torch.zeros(ROWS, K), rest, rest, torch.zeros(ROWS, K))):
        run = lambda: shared.exchange("statistics", state, labels, teacher)
        run()
        entries = K if isinstance(teacher, SparseRows) else 0
        print(peak(run) / (ROWS * ranks.exchanged_bytes(WORLD, entries)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_an_exchange_of_many_ranks_holds_no_more_than_is_planned() -> None:
    shares = printed(EXCHANGE)
    assert len(shares) == 6
    assert max(shares) <= 1, shares
    assert max(shares) >= 0.7, f"it is planned too high: {shares}"


def test_many_ranks_exchange_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside logits no plan makes chunks. What is merged does not depend on it."""
    world, rows, entries, device = 4, 21, 3, torch.device("cpu")
    layout = ranks.Layout("", 0, (*range(world),), (1,) * world)
    spec = RowSpec("jsd", resolve("jsd").parameters, 2.0, 2.0, 1.0, 1.0, world)
    shared, at_once = ranks.Rows(layout, cpu, spec), []

    def everyone(values: Tensor, group: str) -> Tensor:
        at_once.append(len(values))
        return torch.stack([values + rank for rank in range(world)])

    def exchanged() -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        state, labels = cpu.tile_state(rows, device).zero_(), torch.randint(world, (rows,), generator=draw)
        fields = cpu.state_fields(state, spec, "sparse", True, "statistics").fields
        for field in fields.values():
            field.copy_(torch.rand(rows, generator=draw))
        ids = torch.tensor([[0, 2, 3]], dtype=torch.int64, device=device).expand(rows, entries)
        rest, picked = torch.zeros(rows), torch.rand(rows, entries, generator=draw)
        shared.exchange("statistics", state, labels, SparseRows(ids, picked, rest, rest, picked))
        return [state, picked]

    monkeypatch.setattr(ranks, "gathered", everyone)
    whole = exchanged()
    monkeypatch.setattr(ranks, "_EXCHANGED_AT_ONCE", 8 * ranks.exchanged_bytes(world, entries))
    parts = exchanged()
    assert at_once == [21, 8, 8, 5]
    assert all(map(torch.equal, whole, parts))


def test_what_ranks_exchange_is_in_the_plan() -> None:
    """Of 256 ranks it is more than the logits: fewer tokens at a time."""
    size, budget, columns = HeadSize(64, 4, 4, 4, 4, 4), 64 << 20, 512
    asked = (8192, columns, size, (size,), Wants(True, True, False), fastkd.ForwardKL(), torch.device("cpu"), budget)
    alone, shared = plan_for(*asked), plan_for(*asked, shared=ranks.exchanged_bytes(256))
    assert 4 * shared.chunk < alone.chunk
    assert shared.working_bytes <= budget
    assert shared.working_bytes >= shared.chunk * (8 * columns + ranks.exchanged_bytes(256)) + 8192 * STATE_BYTES


# --- the command and its page -----------------------------------------------------------------------------------


def printed_by(*options: str) -> str:
    command = [sys.executable, "-m", "bench.scale", *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True).stdout


def test_the_page_says_what_the_command_prints() -> None:
    pytest.importorskip("triton")
    page = (ROOT / "docs" / "scale.md").read_text()
    begin, end = "<!-- python -m bench.scale -->\n", "<!-- end -->"
    assert page.split(begin)[1].split(end)[0].strip() == tables.text(tables.Setting()).strip()
    assert tables.text(tables.Setting()).strip() == printed_by().strip()


def test_options_are_what_is_computed(tmp_path: pathlib.Path) -> None:
    options = ["--ranks", "2,4", "--vocab", "1000", "--model", "S=5000:16:tied", "--pairs", "S:8B", "--fp32"]
    rows = json.loads(printed_by(*options, "--device", "cpu", "--group", "2", "--json"))
    found = {(row["table"], row.get("ranks")): row for row in rows}
    step = found["Exchanged in a step: the whole student", 4]
    assert step["DDP"] == 2 * 3 / 4 * 4 * (5000 + 1000 * 16)
    assert step["FSDP2"] == 3 / 4 * 4 * (3 * 5000 + 2 * 1000 * 16)
    head = found["Exchanged in a step: head and loss alone", 2]
    assert head["vocabulary-parallel"] == 2 * 8192 * 8 * 8 + 2 * (1 / 2) * 2 * 8192 * 16 * 4
    printed_by("--plot", str(tmp_path / "scale.svg"), "--device", "cpu")
    assert "vocabulary-parallel" in (tmp_path / "scale.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--pairs", "9B:70B"), "names 9B"), (("--ranks", "12"), "no multiple"), (("--tokens", "0"), "must be >= 1")],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        printed_by(*options)
    assert message in error.value.stderr
