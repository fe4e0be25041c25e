"""Labels of packed rows, and of sequences that several processes hold: the whole is the judge."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel

import fastkd
from tests.processes import run

V, ROWS, TOKENS = 40, 2, 16
#: Documents of each row: one ends at the cut of two processes, one at no cut, one spans several cuts of four.
LENGTHS = [[8, 3, 5], [1, 14, 1]]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Labels, positions and weights of packed rows; some labels are not to be learnt."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(V, (ROWS, TOKENS), generator=generator)
    labels[0, 3:6] = labels[1, 2] = -100
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    return labels, positions, torch.rand(ROWS, TOKENS, generator=generator) + 0.5


def by_documents(values: Tensor, fill: float) -> Tensor:
    """What moving each document of a row by itself gives."""
    rows = []
    for row, lengths in zip(values, LENGTHS, strict=True):
        rows.append(torch.cat([torch.cat((part[1:], part.new_tensor([fill]))) for part in row.split(lengths)]))
    return torch.stack(rows)


def cut(values: Tensor, rank: int, world: int, layout: str) -> Tensor:
    """The part of one process."""
    if layout == "contiguous":
        return values.chunk(world, 1)[rank]
    chunks = values.chunk(2 * world, 1)
    return torch.cat((chunks[rank], chunks[2 * world - 1 - rank]), 1)


def test_a_document_ends_where_positions_begin_again() -> None:
    labels, positions, weights = batch()
    assert torch.equal(fastkd.next_token_labels(labels, position_ids=positions), by_documents(labels, -100))
    assert torch.equal(fastkd.next_token_weights(weights, position_ids=positions), by_documents(weights, 0.0))
    whole = torch.cat((labels[:, 1:], torch.full((ROWS, 1), -100)), 1)
    assert torch.equal(fastkd.next_token_labels(labels), whole)
    assert torch.equal(fastkd.next_token_labels(labels.int(), position_ids=torch.arange(TOKENS)), whole)
    later = positions + torch.tensor([[7], [0]])
    later[0, :8] -= 7
    assert torch.equal(fastkd.next_token_labels(labels, position_ids=later)[0, 7:8], torch.tensor([-100]))
    assert fastkd.next_token_labels(labels[:, :0]).shape == (ROWS, 0)


def test_packed_rows_lose_what_the_documents_alone_lose() -> None:
    """As transformers' own collator for flattened batches says with labels, and as rows of their own say."""
    labels, positions, weights = batch()
    student = torch.randn(ROWS, TOKENS, V, requires_grad=True)
    teacher = torch.randn(ROWS, TOKENS, V)
    shifted = fastkd.next_token_labels(labels, position_ids=positions)
    kd, weighted = fastkd.KDLoss(), fastkd.next_token_weights(weights, position_ids=positions)
    found = kd(student, teacher, shifted, weights=weighted)

    apart = fastkd.KDLoss(shift=True, reduction="sum")
    total: Tensor = torch.zeros(())
    for row, lengths in enumerate(LENGTHS):
        parts = zip(*(x[row].split(lengths) for x in (student, teacher, labels, weights)), strict=True)
        total = total + sum(apart(*one, weights=weight) for *one, weight in parts)
    items = fastkd.count_items(shifted, weights=weighted)
    torch.testing.assert_close(found, total / items.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(kd(student, teacher, shifted, weights=weighted, num_items=items), found)
    ours, theirs = (torch.autograd.grad(loss, student)[0] for loss in (found, total / items.float()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)

    transformers = pytest.importorskip("transformers")
    first = [{"input_ids": part} for part in labels.clamp(min=0)[0].split(LENGTHS[0])]
    flat = transformers.DataCollatorWithFlattening()(first)
    ours = fastkd.next_token_labels(flat["input_ids"], position_ids=flat["position_ids"])
    assert torch.equal(ours, fastkd.next_token_labels(flat["labels"]))
    assert torch.equal(fastkd.count_items(ours), torch.tensor(sum(LENGTHS[0]) - len(LENGTHS[0])))


def test_unmasked_soft_terms_leave_ends_out_by_weight() -> None:
    labels, positions, _ = batch()
    student, teacher = torch.randn(2, ROWS, TOKENS, V)
    shifted = fastkd.next_token_labels(labels, position_ids=positions)
    weights = fastkd.next_token_weights(torch.ones(ROWS, TOKENS), position_ids=positions)
    kd = fastkd.KDLoss(mask_soft=False, reduction="none", soft_weight=1.0, hard_weight=0.0)
    found = kd(student, teacher, shifted, weights=weights)
    ends = by_documents(torch.zeros(ROWS, TOKENS), 1.0).bool()
    assert (found[ends] == 0).all()
    assert (found[~ends] > 0).all()


def moved_in_parts(rank: int, world: int) -> None:
    """Every layout, with and without positions and weights, in the whole group and in one of two."""
    labels, positions, weights = batch()
    everyone = dist.group.WORLD
    for layout in ("contiguous", "zigzag"):

        def part(values: Tensor, layout: str = layout) -> Tensor:
            return cut(values, rank, world, layout)

        options = {"group": everyone, "layout": layout}
        found = fastkd.next_token_labels(part(labels), position_ids=part(positions), **options)
        assert torch.equal(found, part(by_documents(labels, -100))), (layout, found)
        found = fastkd.next_token_labels(part(labels), **options)
        assert torch.equal(found, part(fastkd.next_token_labels(labels)))
        moved = fastkd.next_token_weights(part(weights), position_ids=part(positions), **options)
        assert torch.equal(moved, part(by_documents(weights, 0.0)))
        shifted = part(by_documents(labels, -100))
        count = fastkd.count_items(shifted, group=everyone)
        assert count.dtype == torch.int64
        assert count == (by_documents(labels, -100) != -100).sum()
        items = fastkd.count_items(shifted, weights=moved, group=everyone)
        whole = torch.where(by_documents(labels, -100) != -100, by_documents(weights, 0.0).double(), 0.0)
        torch.testing.assert_close(items, whole.sum(), rtol=1e-12, atol=0)
    given = labels.clone()  # torch itself cuts as the second layout says
    mesh = init_device_mesh("cpu", (world,))
    with context_parallel(mesh, buffers=[given], buffer_seq_dims=[1], no_restore_buffers={given}):
        assert torch.equal(given, cut(labels, rank, world, "zigzag"))
    # Parts of different lengths.
    bounds = [0, 1, 6, 7, TOKENS] if world == 4 else [0, 3, TOKENS]
    mine = labels[:, bounds[rank] : bounds[rank + 1]]
    whole = fastkd.next_token_labels(labels)
    found = fastkd.next_token_labels(mine, group=everyone)
    assert torch.equal(found, whole[:, bounds[rank] : bounds[rank + 1]])
    if world == 4:  # each half of the processes has rows of its own
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        group, half = mesh.get_group("cp"), labels + 100 * (labels >= 0) * (rank // 2)
        found = fastkd.next_token_labels(half.chunk(2, 1)[rank % 2], group=group)
        assert torch.equal(found, fastkd.next_token_labels(half).chunk(2, 1)[rank % 2])
        with pytest.raises(ValueError, match="a multiple of 2"):
            fastkd.next_token_labels(labels[:, :3], group=group, layout="zigzag")
    with pytest.raises(ValueError, match=r"got \(2, 0\)"):
        fastkd.next_token_labels(labels[:, :0], group=everyone)


Call = tuple[str, dict[str, object]]


def wrong_alone() -> list[tuple[Call, Call, type[Exception], str, str]]:
    """(The call of one process, that of the other, what the first raises, with which words, words of the other)."""
    labels, positions, weights = batch()
    part = {"labels": labels, "position_ids": positions}
    items = {"labels": labels, "weights": weights}

    def moved(**changed: object) -> Call:
        return "next_token_labels", {**part, **changed}

    def counted(**changed: object) -> Call:
        return "count_items", {**items, **changed}

    wrong = [
        (moved(labels=labels[:, :0], position_ids=None), ValueError, r"got \(2, 0\)"),
        (moved(labels=labels[:, :3], position_ids=None, layout="zigzag"), ValueError, "a multiple of 2"),
        (moved(position_ids=positions[:, 1:]), ValueError, "position_ids must be of the shape"),
        (moved(position_ids=positions.to("meta")), ValueError, "on cpu, got meta"),
        (moved(position_ids=positions / 2), TypeError, "position_ids must be integers"),
        (moved(labels=labels.float()), TypeError, "labels must be integers"),
        (moved(labels=labels.tolist()), TypeError, "labels must be a torch.Tensor"),
        (moved(ignore_index=2**70), Exception, "Overflow"),  # of a type that torch chooses
        (moved(layout="ring"), ValueError, "layout must be"),
        (("next_token_weights", {"weights": weights * 1j}), TypeError, "weights must be real"),
        (counted(weights=-weights), ValueError, "finite and >= 0"),
        (counted(weights=weights[0]), ValueError, "labels' shape"),
        (counted(labels=weights), TypeError, "labels must be integers"),
    ]
    differing = [
        (moved(position_ids=None), moved(), "whether position_ids, or weights of the items, are given$"),
        (moved(labels=labels[:1], position_ids=positions[:1]), moved(), "the shape without its last dimension$"),
        (moved(layout="zigzag"), moved(), "differ in layout$"),
        (moved(layout="zigzag", ignore_index=-1), moved(), "differ in layout, and in ignore_index$"),
        (("next_token_weights", {"weights": weights}), moved(position_ids=None, ignore_index=0), "which function"),
        (counted(weights=None), counted(), "are given$"),
        (counted(), moved(), "which function they call"),
    ]
    found: list[tuple[Call, Call, type[Exception], str, str]] = []
    for one, error, words in wrong:
        right = {"count_items": counted(), "next_token_weights": ("next_token_weights", {"weights": weights})}
        found.append((one, right.get(one[0], moved()), error, words, "the arguments of rank {} of the group are wrong"))
    return found + [(one, other, ValueError, words, words) for one, other, words in differing]


def refused_everywhere(rank: int, world: int) -> None:
    """What is wrong in one process, or differs, is refused in both, and the next call is right."""
    for one, other, error, words, others_words in wrong_alone():
        for mistaken in range(world):
            name, given = one if rank == mistaken else other
            expected = (error, words) if rank == mistaken else (ValueError, others_words.format(mistaken))
            with pytest.raises(expected[0], match=expected[1]):
                getattr(fastkd, name)(**given, group=dist.group.WORLD)
            assert fastkd.count_items(torch.ones(rank + 1, 2, dtype=torch.int64), group=dist.group.WORLD) == 6
    moved_in_parts(rank, world)


def test_what_one_process_gets_wrong_all_refuse() -> None:
    run(2, refused_everywhere, 2)


@pytest.mark.parametrize("world", [2, 4])
def test_parts_are_moved_as_the_whole(world: int) -> None:
    run(world, moved_in_parts, world)


class Tokenwise(nn.Module):
    """A model without attention: what it says of a part of a sequence is what it says of that part of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(V, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, V, bias=False)
        self.kd = fastkd.KDLoss(2.0)

    def forward(self, ids: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor | None, items: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        return self.kd(fastkd.Projection(hidden, self.head.weight), teacher, labels, weights=weights, num_items=items)


def model_and_batch() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    labels, positions, weights = batch()
    labels[:, : TOKENS // 2][labels[:, : TOKENS // 2] % 2 == 0] = -100  # processes have unequal numbers of live tokens
    model = Tokenwise()
    ids, teacher = torch.randint(V, (ROWS, TOKENS)), torch.randn(ROWS, TOKENS, V)
    return model, [ids, teacher, labels, positions, weights]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}


def losses_in_parts(rank: int, world: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The sum of all losses, and what DDP or FSDP makes of the gradients, of each layout and kind, weighted or not."""
    everyone, found = dist.group.WORLD, []
    for layout in ("contiguous", "zigzag"):
        for kind in ("ddp", "fsdp") if world == 2 else ("ddp",):
            for weighted in (False, True):
                model, tensors = model_and_batch()
                ids, teacher, labels, positions, weights = (cut(x, rank, world, layout) for x in tensors)
                options = {"position_ids": positions, "group": everyone, "layout": layout}
                labels = fastkd.next_token_labels(labels, **options)
                given = fastkd.next_token_weights(weights, **options) if weighted else None
                items = fastkd.count_items(labels, weights=given, group=everyone)
                if kind == "fsdp":
                    fsdp.fully_shard(model)
                    wrapped: nn.Module = model
                else:
                    wrapped = DistributedDataParallel(model)
                loss = wrapped(ids, teacher, labels, given, items)
                (world * loss).backward()  # both average over processes what is to be added up
                total = loss.detach().clone()
                dist.all_reduce(total)
                found.append((total, gradients_of(model)))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_of_the_parts_add_up_to_those_of_the_whole(world: int) -> None:
    found = run(world, losses_in_parts, world)
    expected = []
    for weighted in (False, True):
        model, (ids, teacher, labels, positions, weights) = model_and_batch()
        labels = fastkd.next_token_labels(labels, position_ids=positions)
        given = fastkd.next_token_weights(weights, position_ids=positions) if weighted else None
        loss = model(ids, teacher, labels, given, None)  # the mean, as one process computes it
        loss.backward()
        expected.append((loss.detach(), gradients_of(model)))
    for process in found:
        for (loss, gradients), (whole, wanted) in zip(process, expected * (len(process) // 2), strict=True):
            torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
            for name, gradient in wanted.items():
                largest = float(gradient.abs().max())
                assert largest > 0
                # An element is a sum over tokens, whose parts may nearly cancel: it is as right as the largest.
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-6 * largest)


def test_the_host_reads_no_value() -> None:
    """For which it would wait, on a GPU: tensors without values raise where one is read."""
    with FakeTensorMode():
        labels, weights = torch.zeros(ROWS, TOKENS, dtype=torch.int64), torch.ones(ROWS, TOKENS)
        shifted = fastkd.next_token_labels(labels, position_ids=labels)
        moved = fastkd.next_token_weights(weights, position_ids=labels)
        items = fastkd.count_items(shifted, weights=moved)
    assert (shifted.shape, moved.shape, items.shape) == (labels.shape, labels.shape, ())


REFUSED = [
    (TypeError, "labels must be integers", lambda x: fastkd.next_token_labels(x.float())),
    (TypeError, "position_ids must be integers", lambda x: fastkd.next_token_labels(x, position_ids=x / 2)),
    (ValueError, r"position_ids .* \(2, 16\), .*got \(2, 15\)", lambda x: _positions(x[:, 1:])),
    (ValueError, "layout must be .*'ring'", lambda x: fastkd.next_token_labels(x, layout="ring")),
    (ValueError, "got a scalar", lambda x: fastkd.next_token_labels(x[0, 0])),
    (TypeError, "ProcessGroup .*got 'cp'", lambda x: fastkd.next_token_labels(x, group="cp")),
    (TypeError, "ProcessGroup .*got 'cp'", lambda x: fastkd.count_items(x, group="cp")),
    (TypeError, "weights must be real", lambda x: fastkd.next_token_weights(x * 1j)),
    (ValueError, r"labels' shape \(2, 16\), got \(2,\)", lambda x: fastkd.count_items(x, weights=torch.ones(2))),
    (ValueError, "weights must be finite and >= 0", lambda x: fastkd.count_items(x, weights=-torch.ones(2, 16))),
]


def _positions(positions: Tensor) -> Tensor:
    return fastkd.next_token_labels(batch()[0], position_ids=positions)


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_wrong_arguments_are_refused(error: type[Exception], message: str, call) -> None:
    with pytest.raises(error, match=message):
        call(batch()[0])
