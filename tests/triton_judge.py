"""The Triton loss kernels interpreted on CPU tensors, whole rows or tiles, and held to the numerics contract."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from fastkd import reference
from fastkd.divergences import Divergence, of_spec
from fastkd.kernels import gpu
from fastkd.rows import RowSpec, Tile
from tests import cases, compare
from tests.triton_interpreter import Trace, interpreted


def judge(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    *,
    temperature: float = 2.0,
    hard: bool = True,
    labels: Tensor | None = None,
    grad: Tensor | None = None,
    widths: tuple[int, ...] = (),
    certain_rows: float = 0.0,
    **changes: float,
) -> Trace:
    """Interpret the kernel and hold value and gradient to the numerics contract. `widths` are those of tiles."""
    vocab, rows = student.shape[-1], student.numel() // student.shape[-1]
    if hard and labels is None:
        labels = cases.labels(rows, vocab)
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(0)) + 0.5
    spec = cases.spec(divergence, vocab, temperature, **changes)
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        s, t = student.to(dtype).reshape(rows, vocab), teacher.to(dtype).reshape(rows, vocab)
        out = torch.empty(s.shape, dtype=dtype)
        values = reference.kd_rows(s, t, labels, scale, scale if hard else None, spec, out)
        outcomes.append((*values, out))
    eager, truth = outcomes
    undecided = cases.undecided(student.reshape(rows, vocab), teacher.reshape(rows, vocab), spec)
    grad = torch.empty_like(student) if grad is None else grad
    arguments = (student, teacher, labels, scale, scale if hard else None, spec, grad)
    with interpreted() as trace:
        soft, cross_entropy = kd_rows_in_tiles(*arguments, widths) if widths else gpu.kd_rows(*arguments)
    compare.assert_value(soft, truth[0], eager[0], "soft loss")
    compare.assert_value(cross_entropy, truth[1], eager[1], "hard loss")
    grad = grad.reshape(rows, vocab)
    compare.assert_gradient(grad, eager[2].to(grad.dtype), truth[2], certain_rows=certain_rows, undecided=undecided)
    return trace


def kd_rows_in_tiles(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
    widths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """`gpu.kd_rows` on vocabulary tiles that are made anew for every stage, the gradient in place if its dtype allows.

    The tiles lie in buffers as wide as the widest, and all that is not yet written is NaN.
    """
    terms = soft_scale is not None and of_spec(spec.divergence, spec.parameters).normalised
    state = gpu.tile_state(len(student), student.device).fill_(torch.nan)
    values = torch.empty(0), torch.empty(0)
    for stage in ("statistics", "terms", "gradient"):
        if (stage == "terms" and not terms) or (stage == "gradient" and grad is None):
            continue
        for first, width in zip(accumulate(widths, initial=0), widths, strict=False):
            columns, sides = slice(first, first + width), []
            for side in (student, teacher):
                buffer = torch.full((len(student), max(widths)), torch.nan)
                sides.append(None if side is None else buffer[:, :width].copy_(side[:, columns]))
            out = None
            if stage == "gradient" and grad is not None:
                out = sides[0] if grad.dtype == student.dtype else torch.full_like(grad[:, columns], torch.nan)
            computed = gpu.kd_rows(
                sides[0], sides[1], labels, soft_scale, hard_scale, spec, out, Tile(stage, first, state)
            )
            if out is not None and grad is not None:
                grad[:, columns] = out
            else:
                values = computed
    return values
