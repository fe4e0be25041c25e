"""In place the gradient is written over the logits: nothing that is still read may lie on the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.overlap import may_overlap_itself, may_share_memory

V = 10
LABELS = torch.tensor([1, 2, 0, 3])


def student_and(rest: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Four rows of logits in the midst of a buffer, and another part of it."""
    buffer = torch.rand(12, V, requires_grad=True) * 1
    return buffer[4:8], rest(buffer.detach())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.unfold(0, V, 1)[:4],
        lambda x: x.as_strided((4, V), (V - 1, 1)),
        lambda x: x.as_strided((2, 2, V), (V, 5, 1)),
        lambda x: x[:V].expand(4, V),
    ],
)
def test_logits_that_overlap_themselves_are_refused(backend: str, view: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8 * V, requires_grad=True)
    with pytest.raises(ValueError, match=r"rows do not overlap.*\.contiguous\(\)"):
        fastkd.KDLoss(inplace=True)(view(x * 1), torch.randn(view(x).shape), LABELS.view(view(x).shape[:-1]))


@pytest.mark.parametrize(
    "rest",
    [
        lambda buffer: buffer[4:8],  # the same
        lambda buffer: buffer[3:7],  # the previous row
        lambda buffer: buffer[7:11],
        lambda buffer: buffer.flatten()[1:].as_strided((4, V), (V, 1), 4 * V + 5),  # from mid-row to mid-row
        lambda buffer: buffer[5:6].expand(4, V),
    ],
)
def test_a_teacher_in_the_students_memory_is_refused(backend: str, rest: Callable[[Tensor], Tensor]) -> None:
    student, teacher = student_and(rest)
    before = student.detach().clone()
    with pytest.raises(ValueError, match=r"over the teacher, which shares memory.*teacher\.clone\(\)"):
        fastkd.KDLoss(inplace=True)(student, teacher, LABELS)
    assert torch.equal(student, before)


def test_whatever_else_is_read_is_refused_too(backend: str) -> None:
    student, rest = student_and(lambda buffer: buffer)
    kd = fastkd.KDLoss(inplace=True)
    hidden = fastkd.Projection(rest[4:8, :4], torch.randn(V, 4))
    head = fastkd.Projection(torch.randn(4, V), rest[2:])
    sparse = fastkd.SparseTargets(torch.arange(3).expand(4, 3), rest[4:8, 2:5], kind="renormalize", temperature=2.0)
    for teacher in (hidden, fastkd.Projection(torch.randn(4, 5), rest.flatten()[60:110].view(V, 5)), sparse):
        with pytest.raises(ValueError, match="over the teacher"):
            kd(student, teacher, LABELS)
    assert head.shape == student.shape
    with pytest.raises(ValueError, match="over the teacher"):
        kd(student, head, LABELS)
    with pytest.raises(ValueError, match="over the weights"):
        kd(student, torch.randn(4, V), LABELS, weights=rest[4:8, 3])
    with pytest.raises(ValueError, match="over the labels"):
        kd(student, torch.randn(4, V), rest[4:8].view(torch.int64)[:, 0])


@pytest.mark.parametrize(
    "halves",
    [
        lambda buffer: (buffer[:4, :V], buffer[4:, :V]),
        lambda buffer: (buffer[:, :V], buffer[:, V:]),  # interleaved: row for row beside each other
        lambda buffer: (buffer[::2, :V], buffer[1::2, :V]),
    ],
)
def test_parts_of_one_buffer_that_do_not_meet_are_welcome(
    backend: str, halves: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    leaf = torch.randn(8, 2 * V, requires_grad=True)
    student, teacher = halves(leaf * 1)
    student, teacher = student[:4], teacher.detach()[:4]
    expected = torch.autograd.grad(fastkd.KDLoss()(student, teacher.clone(), LABELS), leaf, retain_graph=True)[0]
    loss = fastkd.KDLoss(inplace=True)(student, teacher, LABELS)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


def test_overlap_agrees_with_counting() -> None:
    """Against the set of places every element occupies: none is missed, contiguous rows are judged exactly."""
    generator = torch.Generator().manual_seed(0)
    memory, places = torch.zeros(64), torch.arange(64)
    found = {False: 0, True: 0}

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def layout() -> tuple[tuple[int, ...], tuple[int, ...], int]:
        return (number(1, 4), number(1, 4)), (number(0, 9), 1), number(0, 36)

    for _ in range(2000):
        a, b = layout(), layout()
        mine, yours = places.as_strided(*a).flatten().tolist(), places.as_strided(*b).flatten().tolist()
        repeats = len(set(mine)) < len(mine)
        assert may_overlap_itself(memory.as_strided(*a)) or not repeats
        if may_overlap_itself(memory.as_strided(*a)):
            continue
        shared = bool(set(mine) & set(yours))
        assert may_share_memory(memory.as_strided(*a), memory.as_strided(*b)) == shared, (a, b)
        found[shared] += 1
    assert min(found.values()) > 200
