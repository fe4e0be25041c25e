"""Whether elements of tensors lie on the same bytes: what writing over one of them would destroy.

Exact for rows that are contiguous; where the last dimension is strided, a row counts as all the bytes it spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["may_overlap_itself", "may_share_memory"]


def may_overlap_itself(tensor: Tensor) -> bool:
    """Whether two elements can be one place in memory. False is certain; True only means that strides do not nest."""
    reach = 1  # elements spanned by the dimensions of smaller stride
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return tensor.numel() > 0
        reach += (size - 1) * stride
    return False


def may_share_memory(written: Tensor, other: Tensor) -> bool:
    """Whether an element of `other` lies on bytes of `written`, whose own elements must not overlap."""
    if written.device != other.device or 0 in (written.numel(), other.numel()):
        return False
    a, b = ((tensor.data_ptr(), tensor.data_ptr() + _span(tensor)) for tensor in (written, other))
    if a[1] <= b[0] or b[1] <= a[0]:
        return False
    starts, length = _rows(written)
    starts = starts.sort().values
    other_starts, other_length = _rows(other)
    # Of the rows that begin before one of the others ends, the last reaches furthest.
    before = torch.searchsorted(starts, other_starts + other_length)
    ends = starts[(before - 1).clamp(min=0)] + length
    return bool(((before > 0) & (ends > other_starts)).any())


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Where the rows of the last dimension begin, as addresses `[rows]` on the CPU, and the bytes each spans."""
    if tensor.dim() == 0:
        tensor = tensor[None]
    starts = torch.full((1,), tensor.data_ptr(), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        steps = torch.arange(size if stride else 1, dtype=torch.int64, device="cpu") * (stride * tensor.element_size())
        starts = (starts[:, None] + steps).flatten()
    return starts, ((tensor.shape[-1] - 1) * tensor.stride(-1) + 1) * tensor.element_size()
