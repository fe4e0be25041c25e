"""One batch of a loss whose vocabulary is spread over ranks, and the same on one process, for tests to compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from tests import sparse_targets

__all__ = ["Batch", "Cut", "cut", "outcome", "student", "teacher"]

N, V, H, H_TEACHER = 23, 2201, 16, 20


class Cut(NamedTuple):
    """A rank's columns."""

    first: int
    width: int

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + self.width)


def cut(rank: int, world: int, uneven: bool = False, vocab: int = V) -> Cut:
    """As torch.chunk cuts, or with a first rank that has a fraction of what the last one has."""
    step = -(-vocab // world)
    starts = [min(step * r, vocab) for r in range(world + 1)]
    if uneven:
        starts[1:world] = [start - step // 3 for start in starts[1:world]]
    return Cut(starts[rank], starts[rank + 1] - starts[rank])


class Batch(NamedTuple):
    """Student and teacher as logits and as operands of them; the latter's logits are others."""

    student: Tensor
    teacher: Tensor
    student_head: tuple[Tensor, Tensor, Tensor]
    teacher_head: tuple[Tensor, Tensor, Tensor]
    labels: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype = torch.float32, near: bool = False) -> Batch:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        logits = 3 * normal(N, V)
        taught = logits + 1e-2 * normal(N, V) if near else 3 * normal(N, V)
        heads = [(normal(N, width), normal(V, width), normal(V)) for width in (H, H_TEACHER)]
        labels = torch.randint(V, (N,), generator=generator)
        labels[2] = -100
        labels[5] = V - 1
        first, second = (tuple(x.to(dtype) for x in head) for head in heads)
        return cls(logits.to(dtype), taught.to(dtype), first, second, labels)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers in another dtype."""
        first, second = (tuple(x.to(dtype) for x in head) for head in (self.student_head, self.teacher_head))
        return Batch(self.student.to(dtype), self.teacher.to(dtype), first, second, self.labels)  # type: ignore[arg-type]


def student(batch: Batch, form: str, own: slice = slice(None)) -> tuple[list[Tensor], Any]:
    """Its leaves, of which some columns are taken, and the source they make."""
    hidden, weight, bias = batch.student_head
    given = (batch.student[:, own],) if form == "logits" else (hidden, weight[own], bias[own])
    leaves = [x.clone().requires_grad_() for x in given]
    return leaves, leaves[0] if form == "logits" else fastkd.Projection(*leaves, softcap=20.0)


def teacher(batch: Batch, form: str, kind: str, own: slice = slice(None)) -> Any:
    """None, sparse targets, or a source in some columns."""
    if kind == "absent":
        return None
    if kind == "sparse":
        return sparse_targets.kept(batch.teacher, 7)
    hidden, weight, bias = batch.teacher_head
    return batch.teacher[:, own] if form == "logits" else fastkd.Projection(hidden, weight[own], bias[own])


def outcome(
    batch: Batch, sources: tuple[list[Tensor], Any], taught: Any, call: dict[str, Any], **settings: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients of the leaves."""
    leaves, source = sources
    if taught is None:
        settings["soft_weight"] = 0
    loss = fastkd.KDLoss(**settings)(source, taught, batch.labels, **call)
    assert isinstance(loss, Tensor)
    upstream = torch.linspace(0.5, 1.5, N).to(loss.dtype) if loss.dim() else None
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream)
