"""How many tokens' logits a loss from hidden states holds at a time, and what that costs.

Two strategies. "chunks" computes the logits of a chunk of tokens over the whole vocabulary, once: the minimum of
arithmetic, 6·N·V·H for the student and 2·N·V·H for the teacher. "tiles" computes them for a tile of the vocabulary at
a time, and again for each stage of the loss: more arithmetic, for budgets in which only a few tokens' whole rows
would fit, so few that products with them would be slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fastkd import arguments
from fastkd.backend import scratch_bytes
from fastkd.divergences import Divergence, resolve
from fastkd.rows import Wants, kept_dtype

__all__ = ["CAST_COLUMNS", "STATE_BYTES", "HeadSize", "Plan", "padded", "plan", "plan_for"]

#: Working memory of a loss that is given no budget.
_DEFAULT_BUDGET = {"cpu": 260 << 20, "cuda": 1 << 30}
#: If fewer tokens than this fit with their whole rows, tiles with recomputation are faster, since every chunk of tokens
#: reads the head and reads and writes its gradient. Measured on 2 CPU cores; on GPUs it is a guess. For chunks in
#: groups it is calculated: at an H100's rates chunks of 192 tokens, four to a group, take as long as tiles.
_LEAST_CHUNK = {"cpu": 64, "cuda": 256, "grouped": 192}
#: Tokens in a chunk at most, where there are groups: the product for their logits is bound by arithmetic.
_CHUNK_OF_GROUP = 512
#: Chunks in a group at least, where the budget is what limits both. Half the traffic with the head is that of its
#: gradient; a token costs it a quarter or a half of the bytes that its logits take.
_CHUNKS_OF_GROUP = 4
#: Tiles narrow from `_WIDEST` columns to `_NARROWEST` to hold `_ENOUGH` tokens; the loss gives up below `_LEAST_TILED`.
_ENOUGH, _WIDEST, _NARROWEST, _LEAST_TILED = 512, 4096, 512, 16
#: Rows of logits begin at multiples of this many columns, and chunks have a multiple of it of tokens: matrix products
#: with odd strides or lengths are slower.
_ALIGNMENT = 16
#: Rows of a head that are cast at a time where products need another dtype than its weights have.
CAST_COLUMNS = 4096
#: What a backend keeps of a row between tiles, at most.
STATE_BYTES = 128


class HeadSize(NamedTuple):
    """What memory and arithmetic depend on in a projection."""

    hidden_size: int
    hidden_bytes: int  # per element
    hidden_kept: int  # of their gradient, between forward and backward
    weight_bytes: int
    operand_bytes: int  # as operands of products
    softcap: bool = False


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
    #: That of one chunk where products take 32 bits, where the head gets no gradient, and on CPUs.
    group: int
    #: Logits and their gradient, casts and what the kernels keep; freed when the loss returns.
    working_bytes: int
    #: d hidden, d weight and d bias, with fp32 accumulators where the parameters are narrower.
    gradient_bytes: int
    #: Of the matrix products.
    flops: int

    @property
    def peak_bytes(self) -> int:
        """Memory beyond the inputs, at its highest."""
        return self.working_bytes + self.gradient_bytes

    def __str__(self) -> str:
        held = f"{self.chunk:,} tokens × {self.tile:,} columns at a time"
        if self.group > self.chunk:
            held += f", their gradients of {self.group:,}"
        how = "kept until their gradient is taken" if self.strategy == "chunks" else "computed again for each stage"
        return (
            f"{self.tokens:,} tokens × vocabulary {self.vocab_size:,}: logits of {held}, {how}; "
            f"{_mib(self.working_bytes)} working memory + {_mib(self.gradient_bytes)} gradients, "
            f"{self.flops / 1e9:,.1f} GFLOP"
        )


def plan(
    tokens: int,
    vocab_size: int,
    student_hidden: int | None,
    teacher_hidden: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_budget: int | None = None,
    divergence: str | Divergence = "forward_kl",
) -> Plan:
    """What `KDLoss` will do with projections of these sizes: chunk, strategy, bytes and FLOPs.

    Args:
        tokens: rows of the batch (unmasked ones, on the CPU: masked tokens are left out there).
        vocab_size: columns of the output heads that count.
        student_hidden: H of the student, or None where it comes as a tensor of logits.
        teacher_hidden: H of the teacher, or None where it comes as logits or there is none.
        dtype: of hidden states and weights.
        device: where they are.
        memory_budget: bytes of working memory, beside the gradients; None for the default of the device.
        divergence: some keep more per token than others.

    Assumes that both the student's hidden states and its head get a gradient, at an integer temperature up to 4.
    Raises ValueError where the budget is too small for any strategy, naming the smallest that is not.
    """
    device = torch.device(device)
    sizes = {"tokens": tokens, "vocab_size": vocab_size}
    widths = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
    for name, value in (sizes | {name: width for name, width in widths.items() if width is not None}).items():
        arguments.integer(name, value, least=1)
    if student_hidden is None and teacher_hidden is None:
        raise ValueError("student_hidden and teacher_hidden are both None: losses on logits need no plan")
    size = dtype.itemsize
    operand = 4 if device.type == "cpu" and size == 2 else size
    student, teacher = (
        None if width is None else HeadSize(width, size, kept_dtype(dtype).itemsize, size, operand)
        for width in (student_hidden, teacher_hidden)
    )
    wants = Wants(hidden=True, weight=student is not None, bias=False)
    return plan_for(tokens, vocab_size, student, teacher, wants, resolve(divergence), device, memory_budget)


def plan_for(
    tokens: int,
    vocab_size: int,
    student: HeadSize | None,
    teacher: HeadSize | None,
    wants: Wants,
    divergence: Divergence,
    device: torch.device,
    memory_budget: float | None,
    whole_teacher: bool = True,
    own_exponential: bool = False,
    tiles_allowed: bool = True,
) -> Plan:
    """The plan of one call.

    `whole_teacher`: every column of it is known, so its exponentials are stashed. `own_exponential`: the
    cross-entropy's e^z is no power of e^(z/T), and is stashed too.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    budget = _DEFAULT_BUDGET[kind] if memory_budget is None else int(memory_budget)
    request = _Request(tokens, vocab_size, student, teacher, wants, divergence, device, whole_teacher, own_exponential)
    whole = request.largest(vocab_size, budget)
    if whole.chunk >= min(tokens, _LEAST_CHUNK["grouped" if request.grouped else kind]) or not tiles_allowed:
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
    teacher: HeadSize | None
    wants: Wants
    divergence: Divergence
    device: torch.device
    whole_teacher: bool
    own_exponential: bool

    @property
    def sides(self) -> list[HeadSize]:
        return [side for side in (self.student, self.teacher) if side is not None]

    @property
    def grouped(self) -> bool:
        """Whether gradients of several chunks wait for one product, to read and write the head's less often."""
        return self.student is not None and self.wants.weight and self.student.operand_bytes == 2

    def working_bytes(self, sizes: _Sizes, tile: int) -> int:
        """Memory beside the gradients while so many tokens × `tile` columns are held."""
        student, width, tiled = self.student, padded(tile), tile < self.vocab_size
        of_chunk = 4 * width * len(self.sides)
        of_group = STATE_BYTES if tiled else 0
        if student is not None and self.wants.any:
            if student.softcap:
                of_chunk += 4 * width  # the slopes
            if student.operand_bytes == 2:
                of_group += 2 * width  # the gradient, rounded for the products
        for side in self.sides:
            if side.hidden_bytes != side.operand_bytes:
                of_group += side.hidden_size * side.operand_bytes
        if student is not None and self.wants.hidden and (student.hidden_bytes != 4 or tiled):
            of_group += 4 * student.hidden_size
        casts = [
            min(CAST_COLUMNS, tile) * side.hidden_size * side.operand_bytes
            for side in self.sides
            if side.weight_bytes != side.operand_bytes
        ]
        scratch = scratch_bytes(
            self.device, self.divergence, tile, self.whole_teacher, self.own_exponential, self.wants.any
        )
        return sizes.chunk * of_chunk + sizes.group * of_group + max(casts, default=0) + scratch

    def largest(self, tile: int, budget: int) -> _Sizes:
        """What fits a budget."""
        fixed = self.working_bytes(_Sizes(0, 0), tile)
        of_chunk, of_group = (self.working_bytes(one, tile) - fixed for one in (_Sizes(1, 0), _Sizes(0, 1)))
        free, tokens = max(0, _countable(budget) - fixed), self.tokens
        if self.grouped:
            chunk = min(_CHUNK_OF_GROUP, free // (of_chunk + _CHUNKS_OF_GROUP * of_group))
            group = min(tokens, (free - chunk * of_chunk) // of_group)
            chunk = min(_CHUNK_OF_GROUP, group, (free - group * of_group) // of_chunk)  # what a last group leaves
            if chunk >= min(tokens, _LEAST_TILED):
                group = _even(tokens, group)
                return _Sizes(_even(group, min(chunk, group)), group)
        chunk = _even(tokens, min(tokens, free // max(of_chunk + of_group, 1)))  # 0 where no side computes its logits
        return _Sizes(chunk, chunk)

    def planned(self, strategy: Literal["chunks", "tiles"], sizes: _Sizes, tile: int) -> Plan:
        student, wants = self.student, self.wants
        gradient = 0
        flops = 0
        terms = self.divergence.normalised and self.whole_teacher
        passes = 1 if strategy == "chunks" else 1 + wants.any + terms
        for side in self.sides:
            flops += 2 * self.tokens * self.vocab_size * side.hidden_size * passes
        if student is not None:
            flops += 2 * self.tokens * self.vocab_size * student.hidden_size * (wants.hidden + wants.weight)
            # The accumulator and, at the end, what it is rounded into.
            weight_bytes = student.weight_bytes if student.weight_bytes >= 4 else student.weight_bytes + 4
            narrowed = 0 if student.hidden_kept == student.hidden_bytes else student.hidden_bytes
            gradient += wants.hidden * self.tokens * student.hidden_size * (student.hidden_kept + narrowed)
            gradient += wants.weight * self.vocab_size * student.hidden_size * weight_bytes
            gradient += wants.bias * self.vocab_size * weight_bytes
        elif wants.hidden:
            gradient += 4 * self.tokens * self.vocab_size
        return Plan(
            strategy,
            self.tokens,
            self.vocab_size,
            sizes.chunk,
            tile,
            sizes.group,
            self.working_bytes(sizes, tile),
            gradient,
            flops,
        )


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
