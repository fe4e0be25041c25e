"""Labels of sequences that are not one row of one process: several packed into a row, or one cut over processes.

    labels = next_token_labels(batch["labels"], position_ids=batch["position_ids"], group=group)
    loss = kd(student, teacher, labels, num_items=count_items(labels, group=group))  # a KDLoss with shift=False

`shift=True` of a loss reads a row as one sequence, and its next column as the next token. Neither holds where documents
are packed (the last token of one would be scored against the first of the next), nor where a process has a part of a
sequence (the label of its last position is with another process).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from fastkd import arguments

__all__ = ["count_items", "document_starts", "next_token_labels", "next_token_weights"]

Layout = Literal["contiguous", "zigzag"]
Result = TypeVar("Result")
#: (rank, processes) → the numbers of the chunks that a process holds one after the other, counted along the sequence.
_CHUNKS: dict[Layout, Callable[[int, int], tuple[int, ...]]] = {
    "contiguous": lambda rank, world: (rank,),
    "zigzag": lambda rank, world: (rank, 2 * world - 1 - rank),
}
_CALLS = ("labels", "weights", "items")
#: What all processes of a group must share, each as one number.
_SHARED = (
    "which function they call",
    "the shape without its last dimension",
    "whether position_ids, or weights of the items, are given",
    "layout",
    "ignore_index",
)


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
            in the order of their ranks in it. Every process of the group has to call this, on one type of device.
            None: nothing is cut, whatever other processes do.
        layout: which parts each process has. `"contiguous"`: process r has the r-th. `"zigzag"`: chunks r and
            2n − 1 − r of 2n equal ones, as `torch.distributed.tensor.experimental.context_parallel` deals them out
            unless its load balancing is off. In the contiguous layout parts may differ in length.

    Returns:
        int64, of the shape of `labels`, on their device.

    With `group` there is one `all_gather` of one column per chunk. On CPUs, and on GPUs with FASTKD_DEBUG=1 (in all
    processes), six numbers are gathered before it: so where the arguments of one process are wrong, or differ from the
    others' in what must be the same, all raise. Otherwise GPUs gather nothing that the host would wait for: a process
    whose arguments are wrong raises alone there, and the others wait for it.

    Raises TypeError for labels or positions that are no integers, and a group that is none. ValueError for another
    layout, positions of another shape or device, a process that is not in the group, an empty part, one of an odd
    length in zigzag, and where the arguments of another process are wrong or differ.
    """
    return _moved("labels", _ids, labels, position_ids, ignore_index, group, layout)


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
    return _moved("weights", _real, weights, position_ids, 0, group, layout)


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
            of them has to call, after the `all_gather` of six numbers where `next_token_labels` makes it. None: this
            process alone.

    Returns:
        A scalar on the labels' device, the same in every process: int64, with weights float64. The host does not wait
        for it, but where the group's backend makes it wait.

    With it the losses of all processes add up to the loss of the whole, and so do their gradients. DDP and FSDP do not
    add up gradients: they divide the sum by the number of processes. So multiply each loss by that number, of all
    processes that gradients are averaged over, before `backward()`.

    Raises TypeError for labels that are no integers and a group that is none. ValueError for weights of another shape,
    a process that is not in the group, and where the arguments of another process are wrong or differ.
    """
    _check_group(group)

    def own() -> tuple[Tensor, list[int]]:
        arguments.integers("labels", labels)
        fill = arguments.integer("ignore_index", ignore_index)
        said = [_CALLS.index("items"), 0, int(weights is not None), 0, fill]  # rows may differ in number and length
        return _count(labels, weights, fill), said

    count = _agreed(own, labels, group)
    if group is not None:
        dist.all_reduce(count, group=group)
    return count


def document_starts(position_ids: Tensor) -> Tensor:
    """Bool of the shape of `position_ids` `[..., tokens]`: where these do not continue by 1, and the first of a row."""
    return pad(position_ids[..., 1:] != position_ids[..., :-1] + 1, (1, 0), value=True)


def _ids(labels: Tensor) -> Tensor:
    return arguments.integers("labels", labels).to(torch.int64)


def _real(weights: Tensor) -> Tensor:
    arguments.tensor("weights", weights)
    if weights.is_complex():
        raise TypeError(f"weights must be real numbers, got {weights.dtype}")
    return weights.detach().to(torch.float64 if weights.dtype == torch.float64 else torch.float32)


def _count(labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    counted = labels != ignore_index
    if weights is None:
        return counted.sum()
    arguments.tensor("weights", weights)
    if weights.shape != labels.shape:
        raise ValueError(f"weights must be of the labels' shape {tuple(labels.shape)}, got {tuple(weights.shape)}")
    arguments.check_counts("weights", weights)
    return torch.where(counted, weights.detach().to(torch.float64), 0.0).sum()


def _moved(
    name: str,
    take: Callable[[Tensor], Tensor],
    given: Tensor,
    position_ids: Tensor | None,
    fill: int,
    group: dist.ProcessGroup | None,
    layout: Layout,
) -> Tensor:
    """The values of the next token at each position, `fill` where its document has none."""
    _check_group(group)
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def own() -> tuple[list[Tensor], list[int]]:
        columns = _columns(name, take(given), position_ids, group, layout)
        leading = zlib.crc32(repr(tuple(columns[0].shape[:-1])).encode()) if group is not None else 0
        shared = [leading, len(columns), get_args(Layout).index(layout), arguments.integer("ignore_index", fill)]
        return columns, [_CALLS.index(name), *shared]

    columns = _agreed(own, given, group)
    if not columns[0].numel() and group is None:
        return columns[0]
    numbers = (0,) if group is None else _CHUNKS[layout](rank, world)
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


def _columns(
    name: str, values: Tensor, position_ids: Tensor | None, group: dist.ProcessGroup | None, layout: Layout
) -> list[Tensor]:
    """Values, and positions if there are some, of one shape; of a length that the layout can cut."""
    if values.dim() == 0:
        raise ValueError(f"{name} must be of shape [..., tokens], got a scalar")
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    parts = 1 if group is None else len(_CHUNKS[layout](0, 1))
    if group is not None and (values.shape[-1] == 0 or values.shape[-1] % parts):
        raise ValueError(
            f"{name} must be of {parts} or a multiple of {parts} tokens in each process in the {layout} layout, got "
            f"{tuple(values.shape)}: pad the sequence"
        )
    return [values] if position_ids is None else [values, _expanded(position_ids, name, values)]


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


def _expanded(position_ids: Tensor, name: str, values: Tensor) -> Tensor:
    arguments.integers("position_ids", position_ids)
    if position_ids.device != values.device:
        raise ValueError(f"position_ids must be where {name} are, on {values.device}, got {position_ids.device}")
    try:
        return position_ids.to(torch.int64).expand(values.shape)
    except RuntimeError:
        raise ValueError(
            f"position_ids must be of the shape of {name}, {tuple(values.shape)}, or expand to it, got "
            f"{tuple(position_ids.shape)}"
        ) from None


def _agreed(work: Callable[[], tuple[Result, list[int]]], given: Any, group: dist.ProcessGroup | None) -> Result:
    """What `work` makes of this process' arguments. It returns what all must share too, a number for each of `_SHARED`.

    A process that raised alone would leave the others in the collective that comes next. So all tell first whether
    they raise. The host waits for that, hence only where values are looked at.
    """
    if group is None or not _tells(given):
        return work()[0]
    device = given.device if isinstance(given, Tensor) else torch.device("cpu")
    result, error = None, None
    try:
        result, said = work()
        mine = torch.tensor([0, *said], dtype=torch.int64, device=device)
    except Exception as raised:  # whatever it is, the others would wait
        error, mine = raised, torch.tensor([1] + [0] * len(_SHARED), dtype=torch.int64, device=device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    if error is not None:
        raise error
    told = [one.tolist() for one in everyones]
    wrong = [str(rank) for rank, one in enumerate(told) if one[0]]
    if wrong:
        raise ValueError(f"the arguments of rank {', '.join(wrong)} of the group are wrong: see the error there")
    for rank, one in enumerate(told):
        differ = [what for what, ours, theirs in zip(_SHARED, told[0][1:], one[1:], strict=True) if ours != theirs]
        if differ:
            raise ValueError(f"the arguments of ranks 0 and {rank} of the group differ in {', and in '.join(differ)}")
    assert result is not None
    return result


def _tells(given: Any) -> bool:
    """Whether a process tells the others of its arguments: by the type of device alone, which all share.

    Also where this one's are no tensor, or a DTensor; without a GPU those of the others are on the CPU.
    """
    if isinstance(given, Tensor) and not hasattr(given, "full_tensor"):
        return arguments.is_checked(given)
    return not torch.compiler.is_compiling() and not torch.cuda.is_available()


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
