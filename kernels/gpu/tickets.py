"""Rows shared by thread blocks without a cluster: slices of rows are claimed in order, like tickets at a counter.

A ticket is a phase of a slice: its statistics, its terms where the normalisers must be known before them, its gradient.
Programs claim tickets until there are none. Phases of a row are some tickets apart (`Queue.ahead`), so that the second
read of a slice comes when the statistics of its row are done, and still finds it in the L2 cache.

Nothing can deadlock, however few programs run at a time: a ticket waits only for tickets before it, and whoever claimed
those is running. What a slice learned is in the row's state between phases (`state`), as tiles leave it.
The last program to leave puts every counter back to 0, so no launch is needed to do that, and a graph can be replayed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.gpu.blocks import Span, clear_row, clear_tail, row_beside
from fastkd.kernels.gpu.divergences import Divergence
from fastkd.kernels.gpu.frame import Launch, hard_term, label_of, place_of, scales_of
from fastkd.kernels.gpu.lanes import per_thread
from fastkd.kernels.gpu.launch import SHARING, Block, launch_options
from fastkd.kernels.gpu.mode import Mode
from fastkd.kernels.gpu.points import about_top, normalisers_of, slope_center
from fastkd.kernels.gpu.state import VocabularyTile, load_state, merged_parts, store_statistics, store_terms, tile_state
from fastkd.kernels.gpu.sweeps import (
    Logits,
    OneHot,
    closed_terms,
    factors_of,
    statistics_of,
    sum_terms,
    write_gradient,
)


class Queue(NamedTuple):
    """Counters int32, 0 before and after a launch: tickets claimed; programs gone; for each phase but the last and each
    row, slices that are done.
    """

    counters: Any
    parts: Any  # a `state.VocabularyTile` whose rows are slices
    rows: int
    ahead: int  # slices between two phases of one; at least as many as a row has


class Slice(NamedTuple):
    """A slice of a row: its number among all, its row, its number in the row and how far in the row it begins."""

    slot: Any
    row: Any
    part: Any
    first: Any  # column, counted from the row's first vector


@triton.jit
def _claim(queue):
    return tl.atomic_add(queue.counters, 1, sem="relaxed")


@triton.jit
def _done(queue, phase, row):
    return queue.counters + 2 + phase * queue.rows + row


@triton.jit
def _report(queue, phase, row):
    tl.debug_barrier()  # what is released was written by other threads
    tl.atomic_add(_done(queue, phase, row), 1, sem="release")


@triton.jit
def _wait(queue, phase, row, BLOCK: tl.constexpr):
    while tl.atomic_add(_done(queue, phase, row), 0, sem="acquire") < BLOCK.slices:
        pass


@triton.jit
def _parts(queue, row, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """The `state.State` of a row's slices, [slices] each."""
    SLICES: tl.constexpr = BLOCK.slices
    return load_state(queue.parts, row * SLICES + tl.arange(0, SLICES), MODE)


@triton.jit
def _measure(launch, queue, slice, place, scales, logits, TERM: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """The first phase."""
    label_logit = 0.0
    if MODE.hard:
        label = label_of(launch, slice.row, place.width, scales.hard_on, MODE)
        label_logit = tl.load(place.student.columns + label.column, label.here, other=0.0).to(tl.float32)
    statistics = statistics_of(logits, launch.numbers, TERM, MODE, BLOCK)
    store_statistics(queue.parts, slice.slot, statistics, label_logit)
    _report(queue, 0, slice.row)


@triton.jit
def _row_so_far(launch, queue, slice, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics and normalisers of the whole row, the numbers for it, and the center of its slopes."""
    _wait(queue, 0, slice.row, BLOCK)
    numbers = launch.numbers
    statistics = merged_parts(_parts(queue, slice.row, MODE, BLOCK).statistics, numbers, MODE)
    normalisers = normalisers_of(statistics)
    center = 0.0
    if MODE.soft == "normalised":
        if MODE.about_top:
            numbers = about_top(statistics.maxima, normalisers, numbers, MODE)
        center = slope_center(statistics.maxima, normalisers, numbers, SLOPE, MODE)
    return statistics, normalisers, numbers, center


@triton.jit
def _sum_up(
    launch, queue, slice, logits, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """The phase between, of normalised divergences."""
    _, normalisers, numbers, center = _row_so_far(launch, queue, slice, SLOPE, MODE, BLOCK)
    term, slope = sum_terms(logits, normalisers, center, numbers, TERM, SLOPE, MODE, BLOCK)
    store_terms(queue.parts, slice.slot, term, slope)
    _report(queue, 1, slice.row)


@triton.jit
def _finish(
    launch,
    queue,
    slice,
    place,
    scales,
    logits,
    TERM: tl.constexpr,
    SLOPE: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last phase: gradient and, by the row's first slice, its values."""
    statistics, normalisers, numbers, center = _row_so_far(launch, queue, slice, SLOPE, MODE, BLOCK)
    soft = 0.0
    slope_sum = 0.0
    if MODE.soft == "closed":
        soft, slope_sum = closed_terms(statistics, normalisers, numbers, TERM, MODE)
    if MODE.soft == "normalised":
        _wait(queue, 1, slice.row, BLOCK)
        parts = _parts(queue, slice.row, MODE, BLOCK)
        soft = tl.sum(parts.term_sum, 0)
        slope_sum = tl.sum(parts.slope_sum, 0)
    if MODE.soft == "raw":
        soft = statistics.square / launch.vocab_size
    if MODE.soft != "absent":
        soft = tl.where(scales.soft_on, soft, 0.0)
    hard = 0.0
    hard_factor = 0.0
    one_hot = OneHot(0, 0.0)
    if MODE.hard:
        label = label_of(launch, slice.row, place.width, scales.hard_on, MODE)
        label_logit = load_state(queue.parts, slice.row * BLOCK.slices, MODE).label_logit
        top = statistics.maxima.student
        hard, hard_factor = hard_term(statistics.hard_sum, label_logit, top, label, scales, numbers)
        share = tl.where(label.here, numbers.hard_weight * scales.hard, 0.0)
        one_hot = OneHot(label.column - slice.first, share)
    if slice.part == 0:
        tl.store(launch.soft_values + slice.row, soft)
        tl.store(launch.hard_values + slice.row, hard)
    factors = factors_of(soft, slope_sum, center, hard_factor, scales, numbers)
    grad = place.grad.vectors + slice.first
    write_gradient(grad, logits, one_hot, normalisers, factors, numbers, SLOPE, MODE, BLOCK)


@triton.jit
def _clear(launch, slice, place, span, BLOCK: tl.constexpr):
    """The last phase of a row both of whose scales are 0."""
    if slice.part == 0:
        tl.store(launch.soft_values + slice.row, 0.0)
        tl.store(launch.hard_values + slice.row, 0.0)
    clear_row(place.grad.vectors + slice.first, span, BLOCK)


@triton.jit
def _serve(launch, queue, ticket, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    LAST: tl.constexpr = BLOCK.phases - 1
    phase = ticket % BLOCK.phases
    slot = ticket // BLOCK.phases - phase * queue.ahead
    if (slot >= 0) & (slot < queue.rows * BLOCK.slices):
        row = slot // BLOCK.slices
        part = slot % BLOCK.slices
        scales = scales_of(launch, row, MODE)
        place = place_of(launch, row, MODE, BLOCK)
        step = BLOCK.vectors * BLOCK.threads
        most = tl.cdiv(tl.cdiv(place.span.vectors, step), BLOCK.slices) * step  # vectors of a slice
        own = tl.minimum(tl.maximum(place.span.vectors - part * most, 0), most)
        span = Span(place.span.head, own, tl.where(part == 0, place.span.edges, 0), place.span.tail)
        slice = Slice(slot, row, part, part * most * BLOCK.width)
        teacher = place.student
        if launch.teacher is not None:
            teacher = row_beside(launch.teacher, row, place.span, MODE.teacher_aligned, BLOCK)
        student = place.student.vectors + slice.first
        logits = Logits(student, teacher.vectors + slice.first, span, scales.soft_on)
        skipped = (scales.soft == 0) & (scales.hard == 0)
        if (phase == 0) & ~skipped:
            _measure(launch, queue, slice, place, scales, logits, TERM, MODE, BLOCK)
        if LAST == 2:  # noqa: SIM102  (known when the kernel is compiled, unlike the other)
            if (phase == 1) & ~skipped:
                _sum_up(launch, queue, slice, logits, TERM, SLOPE, MODE, BLOCK)
        if phase == LAST:
            if skipped:
                _clear(launch, slice, place, span, BLOCK)
            else:
                _finish(launch, queue, slice, place, scales, logits, TERM, SLOPE, MODE, BLOCK)
            if part == 0:
                clear_tail(place.grad.columns, place.width, launch.grad_columns, BLOCK)


@triton.jit
def _kernel(launch, queue, TERM: tl.constexpr, SLOPE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):
    tickets = BLOCK.phases * (queue.rows * BLOCK.slices + (BLOCK.phases - 1) * queue.ahead)
    ticket = _claim(queue)
    while ticket < tickets:
        _serve(launch, queue, ticket, TERM, SLOPE, MODE, BLOCK)
        ticket = _claim(queue)
    if tl.atomic_add(queue.counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        counters = 2 + (BLOCK.phases - 1) * queue.rows
        for step in range(tl.cdiv(counters, BLOCK.threads)):
            at = step * BLOCK.threads + tl.arange(0, BLOCK.threads)
            tl.store(queue.counters + at, per_thread(BLOCK).to(tl.int32), at < counters)


# --- on the host ------------------------------------------------------------------------------------------------


def run_tickets(launch: Launch, divergence: Divergence, mode: Mode, block: Block) -> None:
    """Launch with a gradient wanted."""
    rows, device = launch.soft_values.numel(), launch.soft_values.device
    programs = SHARING * _processors(device)
    counters = _zeros(2 + (block.phases - 1) * rows, device)
    # `first` is anything but 0, which would be a row's first tile, and 1, which Triton makes a constant.
    state = VocabularyTile(tile_state(rows * block.slices, device), block.slices, 0)
    queue = Queue(counters, state, rows, programs + block.slices)
    _kernel[(programs,)](launch, queue, divergence.term, divergence.slope, mode, block, **launch_options(block))


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


_kept: dict[torch.device, Tensor] = {}


def _zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros, which the kernel leaves zero: kept for the default stream, whose launches follow each other.

    Elsewhere they are zeroed by a launch: other streams run beside it, and what is allocated while a graph is warmed up
    or captured is the graph's.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device not in _kept or len(_kept[device]) < count:
        _kept[device] = torch.zeros(count, dtype=torch.int32, device=device)
    return _kept[device]
