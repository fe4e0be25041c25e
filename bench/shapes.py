"""The cases of every question: shape, dtype, divergence, and the bars fastkd must reach, set for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import machine
from bench.cases import Bar, Case, faster, near, within
from bench.names import (
    ALLOWED,
    CACHED_STEP,
    CHUNKED,
    CROSS_ENTROPY,
    CROSS_ENTROPY_IN_PLACE,
    CUT_CE,
    DISTILLED,
    EAGER_STEP,
    FRESH,
    IN_PLACE,
    LABELS_ALONE,
    LARGE,
    LIGER,
    LIGER_TRITON,
    LINEAR_CE,
    LINEAR_CE_CHUNKED,
    LIVE_STEP,
    LOSS_ONLY,
    ONE_GRADIENT,
    PRODUCTS,
    ROUNDED_TRUTH,
    SMALL,
    STEP,
    TRL,
    WIDENED,
    beyond_gradients,
    predicted,
)
from fastkd.divergences import TABLE

__all__ = [
    "ACCURACY",
    "CACHE_GRADIENT",
    "CACHE_READ",
    "CACHE_SIZE",
    "CACHE_WRITE",
    "DEMO",
    "DIVERGENCES",
    "LOGITS",
    "LOG_SOFTMAX",
    "MEMORY",
    "PROJECTIONS",
    "PROJECTIONS_HARD",
    "PROJECTIONS_SOFT",
    "PROJECTION_ACCURACY",
    "PROJECTION_MEMORY",
    "ROW_STATISTICS",
    "SAMPLE",
    "SCALING_HIDDEN",
    "SCALING_LOGITS",
    "SPARSE",
    "TOP_K",
    "TRAINING",
    "TRAINING_MEMORY",
    "selected",
]

_SHAPES = ((1024, 50257), (256, 50257), (256, 128256))
_FP32_BARS = (
    faster(FRESH, "eager", 12),
    faster(FRESH, "compile", 5),
    within(FRESH, "add", 2.0),
    within(IN_PLACE, "add out=", 2.0),
)
_BF16_BARS = (
    faster(FRESH, "eager", 10),
    faster(FRESH, "eager fp32"),
    faster(FRESH, "compile"),
    faster(FRESH, "compile fp32"),
    within(FRESH, "add", 3.5),
    within(IN_PLACE, "add out="),
)
_LOG_SOFTMAX_BARS = (faster(FRESH, "torch", 1.0), faster(FRESH, "compile"), within(FRESH, "add"))
_ROW_STATISTICS_BARS = (faster(FRESH, "eager", 4), faster(FRESH, "compile"), within(FRESH, "sum"))
_MEMORY_BARS = (
    within(FRESH, ONE_GRADIENT, 1.02),
    within(IN_PLACE, None, 1.0),
    within(LOSS_ONLY, None, 1.0),
    within("eager", ONE_GRADIENT),
)
_COMPILED_MEMORY = within("compile", ONE_GRADIENT)


def _cases(
    question: str,
    float32: tuple[Bar, ...],
    bfloat16: tuple[Bar, ...],
    shapes: tuple[tuple[int, int], ...] = _SHAPES,
) -> tuple[Case, ...]:
    return tuple(
        Case(question, rows, vocab, dtype, bars, in_quick=(rows, vocab) == (256, 50257))
        for dtype, bars in ((torch.float32, float32), (torch.bfloat16, bfloat16))
        for rows, vocab in shapes
    )


LOGITS = _cases("logits", _FP32_BARS, _BF16_BARS)
DIVERGENCES = tuple(
    Case(
        "divergences",
        1024,
        50257,
        torch.float32,
        (
            faster(FRESH, "eager", 6),
            faster(FRESH, "compile", 2.5),
            within(FRESH, "add"),
            within(IN_PLACE, "add out="),
        ),
        name,
        in_quick=name in ("reverse_kl", "jsd"),
        headline=name in ("reverse_kl", "jsd"),
    )
    for name in TABLE
    if name != "forward_kl"
)
LOG_SOFTMAX = _cases("log_softmax", _LOG_SOFTMAX_BARS, _LOG_SOFTMAX_BARS, _SHAPES[:2])[:3]
ROW_STATISTICS = _cases("row_statistics", _ROW_STATISTICS_BARS, _ROW_STATISTICS_BARS, _SHAPES[:2])[:3]
MEMORY = (
    Case("memory", 1024, 50257, torch.float32, (*_MEMORY_BARS, _COMPILED_MEMORY), in_quick=True),
    Case("memory", 1024, 50257, torch.bfloat16, (*_MEMORY_BARS, _COMPILED_MEMORY)),
    Case("memory", 256, 128256, torch.float32, _MEMORY_BARS),
    Case("memory", 1024, 50257, torch.float32, _MEMORY_BARS, "jsd"),
)


def _projection_bars(over_products: float) -> tuple[Bar, ...]:
    return (
        within(FRESH, PRODUCTS, over_products),
        faster(FRESH, "eager", 1.4),
        faster(FRESH, "compile", 1.0),
        faster(FRESH, CHUNKED, 1.5),
        faster(FRESH, LIGER),
    )


#: (rows, vocab, H of student and teacher) and how near fastkd must come to the bare products
_FROM_HIDDEN = (
    (1024, 50257, (256, 768), 1.15),
    (1024, 50257, (768, 1024), 1.15),
    (1024, 128256, (256, 768), 1.3),
)
_PROJECTION_BF16 = (512, 50257, torch.bfloat16)
#: In bf16 torch's recipe takes a minute where no unit multiplies it: what has no bar of its own gets few rows, once.
_PEERS_BF16 = (32, 50257, torch.bfloat16)
#: Both allocators for one case of each vocabulary: a case takes minutes.
PROJECTIONS = (
    *(
        Case(
            "projections",
            rows,
            vocab,
            torch.float32,
            _projection_bars(over),
            hidden=hidden,
            in_quick=number == 0,
            headline=number != 1,
        )
        for number, (rows, vocab, hidden, over) in enumerate(_FROM_HIDDEN)
    ),
    Case(
        "projections",
        *_PROJECTION_BF16,
        (within(FRESH, WIDENED, 1.2), faster(FRESH, "eager", 20)),
        hidden=(256, 768),
        headline=False,
    ),
    Case(
        "projections",
        *_PEERS_BF16,
        (within(FRESH, WIDENED), faster(FRESH, "eager"), faster(FRESH, LIGER)),
        hidden=(256, 768),
        headline=False,
    ),
)


def _against_peers(question: str, hidden: tuple[int, ...], *peers: str) -> tuple[Case, ...]:
    """One objective of those that peers compute."""
    bars = tuple(faster(FRESH, name) for name in ("eager", *peers))
    fp32_bars = (within(FRESH, PRODUCTS), faster(FRESH, "compile"), *bars)
    return (
        Case(question, 1024, 50257, torch.float32, fp32_bars, hidden=hidden, in_quick=question == "projections_soft"),
        Case(question, *_PEERS_BF16, (within(FRESH, WIDENED), *bars), hidden=hidden, headline=False),
    )


PROJECTIONS_SOFT = _against_peers("projections_soft", (256, 768), LIGER_TRITON, TRL, LINEAR_CE)
PROJECTIONS_HARD = _against_peers("projections_hard", (256,), LINEAR_CE, LINEAR_CE_CHUNKED, CUT_CE)


def _budgeted(contender: str, budget: str) -> tuple[Bar, ...]:
    return within(contender, beyond_gradients(budget), 1.0), near(contender, predicted(contender))


_PROJECTION_MEMORY_BARS = (*_budgeted(FRESH, "256 MiB"), *_budgeted(SMALL, "32 MiB"))
_RIVALS_MEMORY = tuple(within(name, "gradients") for name in ("eager", "compile", CHUNKED, LIGER))
PROJECTION_MEMORY = (
    *(
        Case(
            "projection_memory",
            rows,
            vocab,
            torch.float32,
            _PROJECTION_MEMORY_BARS + (_RIVALS_MEMORY if number == 0 else ()),
            hidden=hidden,
            in_quick=number == 1,
        )
        for number, (rows, vocab, hidden, _) in enumerate(_FROM_HIDDEN)
    ),
    Case("projection_memory", *_PROJECTION_BF16, (near(FRESH, predicted(FRESH)),), hidden=(256, 768)),
    Case("projection_memory", 8192, 128256, torch.float32, _budgeted(LARGE, "1 GiB"), hidden=(256, 768)),
)


#: The promise in fp32, where `ALLOWED` is measured beside them, and in bf16: nothing but the rounding of the result.
_EXACT_FP32, _EXACT_BF16 = within(FRESH, ALLOWED, 1.0), within(FRESH, ROUNDED_TRUTH, 1.1)


_FAMILIES = ("near-equal 1e-3", "near-equal 1e-2", "far", "peaked", "flat")


def _accuracy(
    question: str, *divergences: str, families: tuple[str, ...] = _FAMILIES, hidden: tuple[int, ...] | None = None
) -> tuple[Case, ...]:
    """Families innermost: what is compiled serves all of them."""
    return tuple(
        Case(
            question,
            64,
            32768,
            dtype,
            (bar, within(FRESH, "eager")),
            divergence,
            hidden=hidden,
            family=family,
            in_quick=family == "near-equal 1e-3",
        )
        for divergence in divergences
        for dtype, bar in ((torch.float32, _EXACT_FP32), (torch.bfloat16, _EXACT_BF16))
        for family in families
    )


ACCURACY = _accuracy("accuracy", "forward_kl", "jsd")
#: Fewer families: each takes a quarter of a minute where no unit multiplies bf16.
PROJECTION_ACCURACY = _accuracy(
    "projection_accuracy", "forward_kl", families=("near-equal 1e-3", "far", "peaked"), hidden=(256, 192)
)
_SPARSE_BARS = (
    within(FRESH, CROSS_ENTROPY, 1.15),
    within(IN_PLACE, CROSS_ENTROPY_IN_PLACE),
    faster(FRESH, "eager", 8),
    faster(FRESH, "compile"),
)
SPARSE = tuple(
    Case("sparse", rows, vocab, dtype, _SPARSE_BARS, entries=entries, in_quick=number == 0, headline=number < 2)
    for number, (rows, vocab, dtype, entries) in enumerate(
        (
            (1024, 50257, torch.float32, 64),
            (1024, 50257, torch.float32, 12),
            (256, 128256, torch.float32, 64),
            (1024, 50257, torch.bfloat16, 64),
        )
    )
)
_SELECTION_BARS = (
    faster(FRESH, "eager", 1.0),
    within(FRESH, "torch.topk"),
    within(FRESH, "row statistics"),
)
TOP_K, SAMPLE = (
    tuple(
        Case(question, 256, 50257, dtype, _SELECTION_BARS, in_quick=dtype == torch.float32)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for question in ("top_k", "sample")
)
_TEACHER_VOCAB, _TEACHER_HIDDEN = 49152, 576
CACHE_WRITE = (Case("cache_write", 256, _TEACHER_VOCAB, torch.float32, (within(FRESH, "teacher forward", 1.15),)),)
CACHE_READ = (
    Case("cache_read", 32 * 128, 50257, torch.float32, (within(FRESH, None, 32 * 128 / 500),), in_quick=True),
)
CACHE_SIZE = (
    Case(
        "cache_size",
        1 << 15,
        50257,
        torch.float32,
        (within("sampled 12", None, 40), within("topk 64", None, 300)),
    ),
)
CACHE_GRADIENT = tuple(
    Case(
        "cache_gradient",
        4096,
        _TEACHER_VOCAB,
        torch.float32,
        (
            within("sampled 12", "ghost 64", 1.0),
            within("sampled 64", "ghost 64", 1.0),
            within("ghost 64", "renormalize 64", 1.0),
            within("ghost 12", None),
        ),
        hidden=(directions, _TEACHER_HIDDEN),
    )
    for directions in (16, 64, 256)
)


#: Batch 32 × 128 of the demo: vocabulary and teacher of SmolLM2-135M.
_TRAINING = (4096, 49152, torch.float32)
TRAINING = (
    Case(
        "training",
        *_TRAINING,
        (faster(STEP, EAGER_STEP, 1.6), faster(CACHED_STEP, LIVE_STEP, 2.5)),
        hidden=(256, 576),
    ),
)
TRAINING_MEMORY = (
    Case(
        "training_memory",
        *_TRAINING,
        (within(STEP, EAGER_STEP, 0.4), within(EAGER_STEP, None)),
        hidden=(256, 576),
    ),
)


#: Its training tokens; the distilled student has to be better, and its KL at least 10 % lower.
DEMO = tuple(
    Case(question, 3 * 448 * 128, _TEACHER_VOCAB, torch.float32, (within(DISTILLED, LABELS_ALONE, limit),))
    for question, limit in (("demo_perplexity", 1.0), ("demo_kl", 0.9))
)


_SCALING_BARS = (faster(FRESH, "eager"), within(FRESH, "add"))
SCALING_LOGITS = tuple(
    Case("scaling_logits", rows, vocab, torch.float32, _SCALING_BARS, threads=threads)
    for rows, vocab, threads in (
        *((rows, 50257, None) for rows in (16, 128, 1024)),
        *((256, vocab, None) for vocab in (1024, 8192, 50257, 152064)),
        (256, 50257, 1),
    )
)
_SCALING_HIDDEN_BARS = (faster(FRESH, "eager"), within(FRESH, PRODUCTS))
SCALING_HIDDEN = tuple(
    Case("scaling_hidden", rows, vocab, torch.float32, _SCALING_HIDDEN_BARS, hidden=(size, size))
    for rows, vocab, size in (
        *((rows, 50257, 256) for rows in (64, 256)),
        *((256, vocab, 256) for vocab in (8192, 128256)),
        *((256, 50257, size) for size in (64, 512)),
    )
)


def selected(cases: tuple[Case, ...], quick: bool) -> list[Case]:
    """The cases to run on this machine under this allocator; with `quick` a few, cut to 256 rows."""
    here = [
        case
        for case in cases
        if machine.allocator() in case.allocators and (case.threads is None or machine.DEVICE.type == "cpu")
    ]
    return [replace(case, rows=min(case.rows, 256)) for case in here if case.in_quick] if quick else here
