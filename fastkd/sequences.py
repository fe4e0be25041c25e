"""Labels of sequences that are not one row of one process: several packed into a row, or one cut over processes.

    labels = next_token_labels(batch["labels"], position_ids=batch["position_ids"], group=group)
    loss = kd(student, teacher, labels, num_items=count_items(labels, group=group))  # a KDLoss with shift=False

`shift=True` of a loss reads a row as one sequence, and its next column as the next token. Neither holds where documents
are packed (the last token of one would be scored against the first of the next), nor where a process has a part of a
sequence (the label of its last position is with another process).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from fastkd import arguments

__all__ = ["count_items", "document_starts", "next_token_labels", "next_token_weights"]

Layout = Literal["contiguous", "zigzag"]
#: (rank, processes) → the numbers of the chunks that a process holds one after the other, counted along the sequence.
_CHUNKS: dict[Layout, Callable[[int, int], tuple[int, ...]]] = {
    "contiguous": lambda rank, world: (rank,),
    "zigzag": lambda rank, world: (rank, 2 * world - 1 - rank),
}


def next_token_labels(
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    layout: Layout = "contiguous",
) -> Tensor:
    """Labels moved to the positions that predict them, for a loss with `shift=False`.

    Args:
        labels: token ids `[..., tokens]`, each at its own token. With `group`, this process' part of them.
        position_ids: the same shape, or one that expands to it: where they do not continue by 1 a document begins, as
            transformers reads rows of several. The token before predicts nothing.
        ignore_index: the label of what predicts nothing: the last token of the sequence, and of each document.
        group: the processes that hold the sequence among them (context parallelism), such as `mesh["cp"].get_group()`,
            in the order of their ranks in it. One `all_gather` of one column per chunk, which every process of the
            group has to call. None: nothing is cut, whatever other processes do.
        layout: which parts each process has. `"contiguous"`: process r has the r-th. `"zigzag"`: chunks r and
            2n − 1 − r of 2n equal ones, as `torch.distributed.tensor.experimental.context_parallel` deals them out
            unless its load balancing is off. In the contiguous layout parts may differ in length.

    Returns:
        int64, of the shape of `labels`, on their device.

    Raises TypeError for labels or positions that are no integers, and a group that is none. ValueError for another
    layout, positions of another shape, a process that is not in the group, an empty part, or one of an odd length in
    zigzag.
    """
    arguments.integers("labels", labels)
    arguments.integer("ignore_index", ignore_index)
    return _moved("labels", labels.to(torch.int64), position_ids, ignore_index, group, layout)


def next_token_weights(
    weights: Tensor,
    *,
    position_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    layout: Layout = "contiguous",
) -> Tensor:
    """Weights of tokens `[..., tokens]`, real numbers, moved as `next_token_labels` moves labels; 0 where it ignores.

    Weights of 1 leave out of a loss with `mask_soft=False` what predicts nothing. Gives float64 where weights are
    float64, else fp32, without gradient. Raises as `next_token_labels` does.
    """
    arguments.tensor("weights", weights)
    if weights.is_complex():
        raise TypeError(f"weights must be real numbers, got {weights.dtype}")
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    return _moved("weights", weights.detach().to(dtype), position_ids, 0, group, layout)


def count_items(
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """How many tokens count, in all processes of a group: the `num_items` of a mean over all that they hold.

    Args:
        labels: what `next_token_labels` gives; for a loss with `shift=True`, `labels[..., 1:]`.
        weights: what `next_token_weights` gives of the weights that the loss is given: then their sum.
        ignore_index: the label that does not count.
        group: every process that holds a part of the batch, of the sequence or other rows: one `all_reduce`, which each
            of them has to call. None: this process alone.

    Returns:
        A scalar on the labels' device, the same in every process: int64, with weights float64. The host does not wait
        for it, but where the group's backend makes it wait.

    With it the losses of all processes add up to the loss of the whole, and so do their gradients. DDP and FSDP do not
    add up gradients: they divide the sum by the number of processes. So multiply each loss by that number, of all
    processes that gradients are averaged over, before `backward()`.

    Raises TypeError for labels that are no integers and a group that is none. ValueError for weights of another shape,
    and a process that is not in the group.
    """
    arguments.integers("labels", labels)
    arguments.integer("ignore_index", ignore_index)
    _check_group(group)
    counted = labels != ignore_index
    if weights is None:
        count = counted.sum()
    else:
        arguments.tensor("weights", weights)
        if weights.shape != labels.shape:
            raise ValueError(f"weights must be of the labels' shape {tuple(labels.shape)}, got {tuple(weights.shape)}")
        arguments.check_counts("weights", weights)
        count = torch.where(counted, weights.detach().to(torch.float64), 0.0).sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return count


def document_starts(position_ids: Tensor) -> Tensor:
    """Bool of the shape of `position_ids` `[..., tokens]`: where these do not continue by 1, and the first of a row."""
    return pad(position_ids[..., 1:] != position_ids[..., :-1] + 1, (1, 0), value=True)


def _moved(
    name: str,
    values: Tensor,
    position_ids: Tensor | None,
    fill: int,
    group: dist.ProcessGroup | None,
    layout: Layout,
) -> Tensor:
    """`values` of the next token at each position, `fill` where its document has none."""
    if values.dim() == 0:
        raise ValueError(f"{name} must be of shape [..., tokens], got a scalar")
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    positions = None if position_ids is None else _expanded(position_ids, name, values.shape)
    _check_group(group)
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    numbers = (0,) if group is None else _CHUNKS[layout](rank, world)
    if group is not None and (values.shape[-1] == 0 or values.shape[-1] % len(numbers)):
        raise ValueError(
            f"{name} must be of {len(numbers)} or a multiple of {len(numbers)} tokens in each process in the {layout} "
            f"layout, got {tuple(values.shape)}: pad the sequence"
        )
    if not values.numel() and group is None:
        return values
    columns = [values] if positions is None else [values, positions]
    chunks = [column.chunk(len(numbers), dim=-1) for column in columns]
    firsts = _first_columns(chunks, group, world, layout)
    found = []
    for slot, number in enumerate(numbers):
        after = firsts.get(number + 1, torch.full_like(firsts[number], fill))
        moved, *beyond = (
            torch.cat((parts[slot][..., 1:], column.unsqueeze(-1).to(parts[slot].dtype)), dim=-1)
            for parts, column in zip(chunks, after, strict=True)
        )
        for following in beyond:
            moved = torch.where(following == chunks[1][slot] + 1, moved, fill)
        found.append(moved)
    return torch.cat(found, dim=-1)


def _first_columns(
    chunks: list[tuple[Tensor, ...]], group: dist.ProcessGroup | None, world: int, layout: Layout
) -> dict[int, Tensor]:
    """The number of each chunk of the sequence → its first column of values, and of positions: `[1 or 2, ...]`."""
    wide = torch.float64 if chunks[0][0].is_floating_point() else torch.int64  # which holds both without rounding
    mine = torch.stack([torch.stack([part[..., 0].to(wide) for part in parts]) for parts in chunks], dim=1)
    if group is None:
        return {0: mine[0]}
    everyones = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyones, mine, group=group)
    return {
        number: everyones[rank][slot]
        for rank in range(world)
        for slot, number in enumerate(_CHUNKS[layout](rank, world))
    }


def _expanded(position_ids: Tensor, name: str, shape: torch.Size) -> Tensor:
    arguments.integers("position_ids", position_ids)
    try:
        return position_ids.to(torch.int64).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"position_ids must be of the shape of {name}, {tuple(shape)}, or expand to it, got "
            f"{tuple(position_ids.shape)}"
        ) from None


def _check_group(group: dist.ProcessGroup | None) -> None:
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup of which this process is a member, got {group!r}: of a "
            'DeviceMesh pass mesh.get_group("cp")'
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group, so it has no part of the sequence")
