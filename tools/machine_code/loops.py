"""The loops of a machine program: natural loops of its flow graph, wherever the compiler puts their instructions.

Not every jump backwards closes a loop. Compilers move rare steps behind the code and jump back from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Jump", "loops"]


@dataclass(frozen=True)
class Jump:
    """What an instruction does to the flow: `target` is an instruction's index, None where it leaves the program."""

    target: int | None
    always: bool  # False: the next instruction may follow


def loops(count: int, jumps: Mapping[int, Jump]) -> list[frozenset[int]]:
    """The instructions of each loop of a program of `count`, in the order of their first; outer before inner.

    A loop is a jump to an instruction that every path to the jump comes through, with all that lies between.
    """
    targets = {jump.target for jump in jumps.values() if jump.target is not None}
    starts = sorted(x for x in {0} | targets | {at + 1 for at in jumps} if x < count)
    blocks = [range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]
    number = {block.start: index for index, block in enumerate(blocks)}
    after = [_successors(block, jumps, number) for block in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for index, following in enumerate(after):
        for target in following:
            before[target].append(index)
    dominators = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for index, following in enumerate(after):
        for head in following:
            if index in dominators and head in dominators[index]:
                bodies.setdefault(head, set()).update(_between(head, index, before))
    found = [frozenset(i for block in body for i in blocks[block]) for body in bodies.values()]
    return sorted(found, key=lambda loop: (min(loop), -len(loop)))


def _successors(block: range, jumps: Mapping[int, Jump], number: Mapping[int, int]) -> list[int]:
    jump = jumps.get(block[-1], Jump(None, always=False))
    following = set() if jump.always else {block.stop}
    if jump.target is not None:
        following.add(jump.target)
    return [number[start] for start in sorted(following) if start in number]


def _dominators(after: Sequence[list[int]], before: Sequence[list[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached: the blocks that every path to it comes through, itself included."""
    reached, waiting = {0}, [0]
    while waiting:
        new = set(after[waiting.pop()]) - reached
        reached |= new
        waiting += new
    found = {index: {0} if index == 0 else set(reached) for index in reached}
    changed = True
    while changed:
        changed = False
        for index in sorted(reached - {0}):
            common = set.intersection(*(found[other] for other in before[index] if other in reached)) | {index}
            changed |= common != found[index]
            found[index] = common
    return found


def _between(head: int, tail: int, before: Sequence[list[int]]) -> set[int]:
    """Blocks on the ways from `head` to `tail`, both included."""
    body, waiting = {head, tail}, [tail] if tail != head else []
    while waiting:
        new = set(before[waiting.pop()]) - body
        body |= new
        waiting += new
    return body
