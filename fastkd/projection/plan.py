"""How many tokens' logits a loss from hidden states holds at a time, and what that costs.

Two strategies. "chunks" computes the logits of a chunk of tokens over the whole vocabulary, once: the minimum of
arithmetic, 6·N·V·H for the student and 2·N·V·H for the teacher. "tiles" computes them for a tile of the vocabulary at
a time, and again for each stage of the loss: more arithmetic, for budgets in which only a few tokens' whole rows
would fit, so few that products with them would be slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fastkd.backend import scratch_bytes
from fastkd.divergences import Divergence
from fastkd.projection.devices import free_bytes
from fastkd.rows import STATE_BYTES, Wants

__all__ = ["CAST_COLUMNS", "ROW_ALONE", "STATE_BYTES", "HeadSize", "Plan", "fixed_budget", "padded", "plan_for"]

#: Working memory of a loss that is given no budget, on CPUs, and on GPUs that cannot be asked.
_DEFAULT_BUDGET = {"cpu": 260 << 20, "cuda": 2 << 30}
#: Else one part in `_SHARE` of what a GPU has free beside the gradients, rounded down to a power of two, so that a
#: little more or less free memory changes neither plan nor bits; but `_FLOOR` at least. No loss takes more than for
#: `_HELPFUL` tokens: a product of so many with the head's gradient in fp32 is bound by arithmetic on every GPU of
#: `devices`, and where products are of fp32 operands, or the head gets no gradient, fewer are enough.
_SHARE, _FLOOR, _HELPFUL = 4, 64 << 20, {"grouped": 4096, "cuda": 1024}
#: If fewer tokens than this fit with their whole rows, tiles with recomputation are faster, since every chunk of tokens
#: reads the head and reads and writes its gradient. Measured on 2 CPU cores; on GPUs it is a guess. For chunks in
#: groups it is calculated: at an H100's rates chunks of 192 tokens, four to a group, take as long as tiles.
_LEAST_CHUNK = {"cpu": 64, "cuda": 256, "grouped": 192}
#: In a chunk at most, where there are groups: so many tokens, since the product for their logits is bound by
#: arithmetic, or so many logits, since with few of them a GPU would wait for the host.
_CHUNK_OF_GROUP, _LOGITS_OF_CHUNK = 512, 1 << 25
#: Chunks in a group at least, where the budget is what limits both. Half the traffic with the head is that of its
#: gradient; a token costs it a quarter or a half of the bytes that its logits take.
_CHUNKS_OF_GROUP = 4
#: Logits of a chunk at most, where no side is a product: on CPUs those that stay in the cache until they are read.
_WITHOUT_PRODUCTS = {"cpu": 1 << 20, "cuda": 1 << 25}
#: Tiles narrow from `_WIDEST` columns to `_NARROWEST` to hold `_ENOUGH` tokens; the loss gives up below `_LEAST_TILED`.
_ENOUGH, _WIDEST, _NARROWEST, _LEAST_TILED = 512, 4096, 512, 16
#: Rows of logits begin at multiples of this many columns, and chunks have a multiple of it of tokens: matrix products
#: with odd strides or lengths are slower.
_ALIGNMENT = 16
#: Rows of a head that are cast at a time where products need another dtype than its weights have.
CAST_COLUMNS = 4096


class HeadSize(NamedTuple):
    """What memory and arithmetic depend on in a projection."""

    hidden_size: int
    hidden_bytes: int  # per element
    hidden_kept: int  # of their gradient, between forward and backward
    weight_bytes: int
    operand_bytes: int  # as operands of products
    gradient_bytes: int  # of the logits' gradient, until it is multiplied
    softcap: bool = False


#: A buffer of logits that no product fills: the rows of teachers that are mixed.
ROW_ALONE = HeadSize(0, 4, 4, 4, 4, 4)


@dataclass(frozen=True)
class Plan:
    """What a loss from hidden states will do. `print` it; `fastkd.plan` makes it."""

    strategy: Literal["chunks", "tiles"]
    tokens: int
    vocab_size: int
    #: Tokens whose logits exist at a time, and how many columns of them: all under "chunks".
    chunk: int
    tile: int
    #: Tokens whose logits' gradient, rounded to 16 bits, is kept until it meets hidden states and head in one product.
    #: That of one chunk where products take 32 bits, where the head gets no gradient, and on CPUs, which do not round.
    group: int
    #: Logits and their gradient, casts and what the kernels keep; freed when the loss returns.
    working_bytes: int
    #: d hidden, d weight and d bias, with fp32 accumulators where the parameters are narrower.
    gradient_bytes: int
    #: Of the matrix products.
    flops: int
    #: Forward and backward, estimated from a GPU's rates; None on CPUs and on GPUs whose rates are not known.
    milliseconds: float | None = None

    @property
    def peak_bytes(self) -> int:
        """Memory beyond the inputs, at its highest."""
        return self.working_bytes + self.gradient_bytes

    def __str__(self) -> str:
        held = f"{self.chunk:,} tokens × {self.tile:,} columns at a time"
        if self.group > self.chunk:
            held += f", their gradients of {self.group:,}"
        how = "kept until their gradient is taken" if self.strategy == "chunks" else "computed again for each stage"
        time = "" if self.milliseconds is None else f", about {self.milliseconds:,.1f} ms"
        return (
            f"{self.tokens:,} tokens × vocabulary {self.vocab_size:,}: logits of {held}, {how}; "
            f"{_mib(self.working_bytes)} working memory + {_mib(self.gradient_bytes)} gradients, "
            f"{self.flops / 1e9:,.1f} GFLOP{time}"
        )


def plan_for(
    tokens: int,
    vocab_size: int,
    student: HeadSize | None,
    teachers: Sequence[HeadSize],
    wants: Wants,
    divergence: Divergence,
    device: torch.device,
    memory_budget: float | None,
    whole_teacher: bool = True,
    own_exponential: bool = False,
    tiles_allowed: bool = True,
    gathered: bool = False,
    shared: int = 0,
    free: int | None = None,
) -> Plan:
    """The plan of one call.

    `teachers`: those whose logits are computed, several where they are mixed. `whole_teacher`: every column of it is
    known, so its exponentials are stashed. `own_exponential`: the cross-entropy's e^z is no power of e^(z/T), and is
    stashed too. `gathered`: the rows are some of more, and copied; on CPUs that is not counted, since groups are short
    there. `shared`: bytes of what ranks exchange of a row, if they do. `free`: bytes of a device that is not to be
    asked.
    """
    options = (whole_teacher, own_exponential, gathered, shared)
    request = _Request(tokens, vocab_size, student, (*teachers,), wants, divergence, device, *options)
    if not any(side.hidden_size for side in request.sides):
        request = request._replace(most=max(_WITHOUT_PRODUCTS[request.kind] // vocab_size, 1))
    elif memory_budget is None:
        request = request._replace(most=max(_HELPFUL.get(request.kind, tokens), _LOGITS_OF_CHUNK // vocab_size))
    budget = request.default_budget(free) if memory_budget is None else int(memory_budget)
    whole = request.largest(vocab_size, budget)
    if whole.chunk >= min(tokens, _LEAST_CHUNK[request.kind]) or not tiles_allowed:
        return request.planned("chunks", whole if whole.chunk else _Sizes(1, 1), vocab_size)
    # As many tokens as possible, since each chunk of them meets the whole head; tiles narrow only to allow that.
    tile = min(_WIDEST, vocab_size)
    while tile > _NARROWEST and request.largest(tile, budget).chunk < min(tokens, _ENOUGH):
        tile = max(tile // 2, _NARROWEST)
    sizes, least = request.largest(tile, budget), min(tokens, _LEAST_TILED)
    if sizes.chunk >= least:
        return request.planned("tiles" if tile < vocab_size else "chunks", sizes, tile)
    smallest = request.working_bytes(_Sizes(least, least), tile)
    wanted = smallest
    while _countable(smallest) < wanted:
        smallest += 1
    raise ValueError(
        f"memory_budget={budget} bytes ({_mib(budget)}) is too small: {least} tokens × {tile} columns at a time, the "
        f"least this loss works with, need {smallest} bytes ({_mib(smallest)}) beside the gradients"
    )


class _Sizes(NamedTuple):
    """Tokens at a time."""

    chunk: int
    group: int


class _Request(NamedTuple):
    tokens: int
    vocab_size: int
    student: HeadSize | None
    teachers: tuple[HeadSize, ...]
    wants: Wants
    divergence: Divergence
    device: torch.device
    whole_teacher: bool
    own_exponential: bool
    gathered: bool
    shared: int
    most: int | None = None  # tokens in a group

    @property
    def kind(self) -> str:
        """The row of the tables above."""
        if self.grouped:
            return "grouped"
        return "cpu" if self.device.type == "cpu" else "cuda"

    @property
    def sides(self) -> list[HeadSize]:
        return [side for side in (self.student, *self.teachers) if side is not None]

    @property
    def grouped(self) -> bool:
        """Whether gradients of several chunks wait for one product, to read and write the head's less often."""
        return self.student is not None and self.wants.weight and self.student.gradient_bytes == 2

    def working_bytes(self, sizes: _Sizes, tile: int) -> int:
        """Memory beside the gradients while so many tokens × `tile` columns are held."""
        student, width, tiled = self.student, padded(tile), tile < self.vocab_size
        of_chunk = 4 * width * len(self.sides)
        of_group = STATE_BYTES if tiled and not self.shared else 0
        if tiled:  # ranks exchange what they know of a group, else of a chunk
            of_group += self.shared
        else:
            of_chunk += self.shared
        if student is not None and self.wants.any:
            if student.softcap:
                of_chunk += 4 * width  # the slopes
            if student.gradient_bytes == 2:
                of_group += 2 * width  # the gradient, rounded for the products
            elif student.operand_bytes == 2:
                of_group += 2 * 2 * min(CAST_COLUMNS, tile)  # the same in two pieces, some columns at a time
        for side in self.sides:
            if side.hidden_bytes != side.operand_bytes:
                of_group += side.hidden_size * side.operand_bytes
            if self.gathered:
                of_group += side.hidden_size * side.hidden_bytes
        if student is not None and self.wants.hidden and (student.hidden_bytes != 4 or tiled or self.gathered):
            of_group += 4 * student.hidden_size
        casts = [
            min(CAST_COLUMNS, tile) * side.hidden_size * side.operand_bytes
            for side in self.sides
            if side.weight_bytes != side.operand_bytes
        ]
        scratch = scratch_bytes(
            self.device, self.divergence, tile, self.whole_teacher, self.own_exponential, self.wants.any
        )
        states = STATE_BYTES * self.tokens if self.shared else 0
        return sizes.chunk * of_chunk + sizes.group * of_group + max(casts, default=0) + scratch + states

    def largest(self, tile: int, budget: int) -> _Sizes:
        """What fits a budget."""
        fixed = self.working_bytes(_Sizes(0, 0), tile)
        of_chunk, of_group = (self.working_bytes(one, tile) - fixed for one in (_Sizes(1, 0), _Sizes(0, 1)))
        free, tokens = max(0, _countable(budget) - fixed), self.tokens
        most = tokens if self.most is None else min(tokens, self.most)
        if self.grouped:
            longest = max(_CHUNK_OF_GROUP, _LOGITS_OF_CHUNK // tile)
            chunk = min(longest, free // (of_chunk + _CHUNKS_OF_GROUP * of_group))
            group = min(most, (free - chunk * of_chunk) // of_group)
            chunk = min(longest, group, (free - group * of_group) // of_chunk)  # a group of all tokens leaves some
            if chunk >= min(tokens, _LEAST_TILED):
                group = _even(tokens, group)
                return _Sizes(_even(group, min(chunk, group)), group)
        chunk = _even(tokens, min(most, free // max(of_chunk + of_group, 1)))  # 0 where no side computes its logits
        return _Sizes(chunk, chunk)

    def default_budget(self, free: int | None) -> int:
        """For a loss that is given none; `free` as in `plan_for`."""
        if self.device.type != "cpu" and free is None:
            free = free_bytes(self.device)
        if self.device.type == "cpu" or free is None:
            return fixed_budget(self.device)
        share = (free - self.gradient_bytes) // _SHARE
        return max(_FLOOR, 1 << max(share, 1).bit_length() - 1)

    @property
    def gradient_bytes(self) -> int:
        """See `Plan`."""
        student, wants, found = self.student, self.wants, 0
        if student is not None:
            # The accumulator and, at the end, what it is rounded into.
            weight_bytes = student.weight_bytes if student.weight_bytes >= 4 else student.weight_bytes + 4
            narrowed = 0 if student.hidden_kept == student.hidden_bytes else student.hidden_bytes
            found += wants.hidden * self.tokens * student.hidden_size * (student.hidden_kept + narrowed)
            found += wants.weight * self.vocab_size * student.hidden_size * weight_bytes
            found += wants.bias * self.vocab_size * weight_bytes
        elif wants.hidden:
            found += 4 * self.tokens * self.vocab_size
        return found

    def planned(self, strategy: Literal["chunks", "tiles"], sizes: _Sizes, tile: int) -> Plan:
        student, wants = self.student, self.wants
        flops = 0
        terms = self.divergence.normalised and self.whole_teacher
        passes = 1 if strategy == "chunks" else 1 + wants.any + terms
        for side in self.sides:
            flops += 2 * self.tokens * self.vocab_size * side.hidden_size * passes
        if student is not None:
            flops += 2 * self.tokens * self.vocab_size * student.hidden_size * (wants.hidden + wants.weight)
        return Plan(
            strategy,
            self.tokens,
            self.vocab_size,
            sizes.chunk,
            tile,
            sizes.group,
            self.working_bytes(sizes, tile),
            self.gradient_bytes,
            flops,
        )


def fixed_budget(device: torch.device) -> int:
    """The default that does not depend on what a device has free."""
    return _DEFAULT_BUDGET["cpu" if device.type == "cpu" else "cuda"]


def _even(tokens: int, most: int) -> int:
    """Equal parts of at most so many tokens rather than a small last one, of a length that products like.

    205 tokens take longer than 208.
    """
    if not _ALIGNMENT <= most < tokens:
        return most
    most = most // _ALIGNMENT * _ALIGNMENT
    count = -(-tokens // most)
    return min(padded(-(-tokens // count)), most)


def _countable(budget: int) -> int:
    """What of a budget is planned: the rest is for scalars of rows, objects and what allocators round up."""
    return budget - budget // 32


def padded(columns: int) -> int:
    """Columns rounded up to the alignment of a buffer's rows; also used for the tokens of a chunk."""
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
