"""Layer maps: which block of the teacher a block of the student learns from.

Blocks are counted from 0, without the embedding: the output of block i is `hidden_states[i + 1]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastkd import arguments
from fastkd.rows import row_dtype
from fastkd.students.layers import spread

__all__ = ["LayerMap", "LearnedLayers", "check_layers", "is_learned", "layer_pairs"]

#: `"uniform"`, `"last"`, `"last:4"`, `"learned"`, or pairs (block of the student, block of the teacher).
LayerMap = str | Sequence[Sequence[int]]

Pairs = list[tuple[int, int]]


def _uniform(students: int, teachers: int) -> Pairs:
    """Block i of s learns from block round(i · t / s): 32 of 80 are 0 → 0, 15 → 38, 31 → 78."""
    return list(enumerate(spread(students, teachers)))


def _last(students: int, teachers: int) -> Pairs:
    """The last block from the last, the one before from the one before, until one model has no more."""
    return [(students - n, teachers - n) for n in range(min(students, teachers), 0, -1)]


_MAPS: dict[str, Callable[[int, int], Pairs]] = {"uniform": _uniform, "last": _last}
_NUMBERED = re.compile(r"last:([1-9]\d*)")


def is_learned(layers: LayerMap) -> bool:
    """Whether the map is trained, so that there are no pairs."""
    return layers == "learned"


def check_layers(layers: LayerMap) -> None:
    """Raise TypeError or ValueError for what is no layer map, of whatever models."""
    if isinstance(layers, str):
        if not (layers in _MAPS or is_learned(layers) or _NUMBERED.fullmatch(layers)):
            raise ValueError(
                f"layers={layers!r} is no layer map: take uniform, last, last:N, learned, or pairs of a block of the "
                "student and one of the teacher, [[0, 0], [1, 3], ...]"
            )
        return
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers must be the name of a map or a list of pairs, got {layers!r}")
    for pair in layers:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"layers must be pairs of a block of the student and one of the teacher, got {pair!r}")
        for number in pair:
            arguments.integer("a layer", number, least=0)


def layer_pairs(layers: LayerMap, students: int, teachers: int) -> Pairs:
    """(block of the student, block of the teacher), in the order of the student's.

    Args:
        layers: a map that is not `learned`.
        students, teachers: how many blocks the models have.

    Raises ValueError for blocks that do not exist, and for a pair that is there twice.
    """
    check_layers(layers)
    if isinstance(layers, str) and layers in _MAPS:
        return _MAPS[layers](students, teachers)
    if isinstance(layers, str):
        found = _NUMBERED.fullmatch(layers)
        if found is None:
            raise ValueError(f"layers={layers!r} has no pairs: it is trained")
        count = int(found[1])
        if count > min(students, teachers):
            raise ValueError(f"layers={layers!r}, but the student has {students} blocks and the teacher {teachers}")
        return _last(students, teachers)[-count:]
    pairs = [(int(pair[0]), int(pair[1])) for pair in layers]
    for whose, count, found_blocks in (
        ("student", students, [pair[0] for pair in pairs]),
        ("teacher", teachers, [pair[1] for pair in pairs]),
    ):
        missing = sorted({block for block in found_blocks if block >= count})
        if missing:
            raise ValueError(
                f"layers names block {', '.join(map(str, missing))} of the {whose}, which has {count}: "
                f"0 to {count - 1}. The embedding is none of them"
            )
    twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if twice:
        raise ValueError(f"layers has the pair {list(twice[0])} twice")
    return sorted(pairs)


class LearnedLayers(nn.Module):
    """For each block of the student a mixture of the teacher's blocks, whose shares are trained.

    The shares are softmax(scores / temperature), all equal at first. A temperature that falls over the training turns a
    mixture into a choice.

    Args:
        students, teachers: how many blocks the models have.
    """

    def __init__(self, students: int, teachers: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(students, teachers, dtype=torch.float32, device="cpu"))

    def shares(self, temperature: float) -> Tensor:
        """`[students, teachers]`, fp32 or float64; each row sums to 1."""
        return (self.scores.to(row_dtype(self.scores.dtype)) / temperature).softmax(-1)
