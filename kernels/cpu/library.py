"""The native library: where it is found, and how it is handed pointers.

The library is free of torch: plain C entry points, one argument struct each (mirrored in `interface`), row strides and
a dtype code. It is loaded after torch, whose OpenMP runtime it then shares. If it cannot be loaded, `status` says why
and the reference backend takes over.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from fastkd.divergences import PARAMETERS, TABLE, Divergence
from fastkd.kernels.cpu.interface import (
    ENTRIES,
    STRUCTURES,
    KDRows,
    LogSoftmax,
    Matrix,
    MixRows,
    RowScales,
    Selection,
    SparseInput,
    SparseTeacher,
    Statistics,
    WeightedTotal,
)
from fastkd.rows import RowSpec, SparseRows, Tile, row_count, row_layout
from fastkd.sources import SparseTargets

__all__ = [
    "DTYPES",
    "advise_huge_pages",
    "kd_rows",
    "loaded",
    "log_softmax",
    "log_softmax_backward",
    "mix_rows",
    "parameter_array",
    "row_scales",
    "row_statistics",
    "sample",
    "scratch_bytes",
    "sparse_rows",
    "status",
    "top_k",
    "weighted_total",
]

_ABI = 10
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PADDING = (0.0,) * PARAMETERS
_STAGES = {"statistics": 1, "terms": 2, "gradient": 3}
_SPARSE_KINDS = {"ghost": 0, "renormalize": 1, "sampled": 2}
_OUT_OF_MEMORY, _UNKNOWN_DIVERGENCE, _REFUSED = 1, 2, 3
_MAIN_MEMORY = torch.device("cpu")
_HUGE_PAGE_THRESHOLD = 4 << 20  # bytes; below it the allocator recycles pages and the advice is a wasted call


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    return _open(_find())


def _find() -> list[pathlib.Path]:
    """FASTKD_LIBRARY; or the folder `_lib` of the package: of an editable install, that in site-packages."""
    if named := os.environ.get("FASTKD_LIBRARY"):
        return [pathlib.Path(named)]
    package = find_spec("fastkd")
    places = (package and package.submodule_search_locations) or []
    return [path for place in places for path in (pathlib.Path(place) / "_lib").glob("libfastkd.*")]


def _open(found: list[pathlib.Path]) -> tuple[ctypes.CDLL | None, str]:
    if not found:
        return None, "no native library was built; reinstall fastkd where a C++17 compiler with OpenMP is found"
    try:
        library = ctypes.CDLL(str(found[0]))
        abi = library.fastkd_abi()
    except (OSError, AttributeError) as error:
        return None, f"{found[0]} cannot be loaded: {error}"
    if abi != _ABI:
        return None, f"{found[0]} has interface version {abi}, this package needs {_ABI}: reinstall fastkd"
    if missing := [name for name in ENTRIES if not hasattr(library, name)]:
        return None, f"{found[0]} lacks {', '.join(missing)}, which this package calls: reinstall fastkd"
    for name, (result, arguments) in ENTRIES.items():
        entry = getattr(library, name)
        entry.restype, entry.argtypes = result, arguments
    instruction_set = library.fastkd_isa()
    if instruction_set is None:
        return None, "this processor lacks AVX2 and FMA, which the native kernels need"
    if unknown := [name for name in TABLE if not library.fastkd_knows(name.encode())]:
        return None, f"{found[0]} does not know the divergence {', '.join(unknown)}: reinstall fastkd"
    for name, structure in STRUCTURES.items():
        theirs, ours = library.fastkd_size(name.encode()), ctypes.sizeof(structure)
        if theirs != ours:
            return None, f"{found[0]} takes {name} of {theirs} bytes, this package passes {ours}: reinstall fastkd"
    return library, f"native C++, {instruction_set.decode()}"


def status() -> tuple[bool, str]:
    """Whether the native library can be used, and the instruction set it picked or the reason it cannot."""
    library, detail = _load()
    return library is not None, detail


def loaded() -> ctypes.CDLL:
    """The library. Raises RuntimeError where there is none."""
    library, detail = _load()
    if library is None:
        raise RuntimeError(f"the cpu backend is not available: {detail}")
    return library


def _call(name: str, arguments: ctypes.Structure) -> bool:
    """False if the library refused its rows."""
    outcome = getattr(loaded(), name)(ctypes.byref(arguments))
    if outcome == _OUT_OF_MEMORY:
        raise MemoryError(f"{name}: out of memory for the per-thread row buffers")
    if outcome == _UNKNOWN_DIVERGENCE:
        beside = " beside a sparse teacher" if arguments.sparse.ids else ""
        raise ValueError(f"the native library computes no divergence {arguments.divergence.decode()!r}{beside}")
    return bool(outcome != _REFUSED)


def _matrix(tensor: Tensor | None) -> Matrix:
    if tensor is None:
        return Matrix()
    layout, dtype = row_layout(tensor), DTYPES.get(tensor.dtype)
    if dtype is None or layout is None or not tensor.is_cpu:
        raise TypeError(
            f"the cpu backend takes float32, bfloat16 and float16 tensors in main memory, got {tensor.dtype} on "
            f"{tensor.device}; fastkd.use_backend('reference') takes any"
        )
    return Matrix(tensor.data_ptr(), dtype, tensor.shape[-1], *layout[1:])


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the library to write: fp32 in main memory, whatever dtype and device torch would take."""
    return torch.empty(shape, dtype=dtype, device=_MAIN_MEMORY)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def parameter_array(spec: RowSpec) -> ctypes.Array[ctypes.c_double]:
    """A divergence's parameters as the library reads them."""
    parameters = (*spec.parameters, *_PADDING)[: max(PARAMETERS, len(spec.parameters))]
    return (ctypes.c_double * len(parameters))(*parameters)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def kd_rows(
    student: Tensor,
    teacher: Tensor | SparseRows | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    grad: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastkd.backend.Backend.kd_rows`."""
    rows = row_count(student)
    soft, hard = _new(rows), _new(rows)
    labels, soft_scale, hard_scale = _contiguous(labels), _contiguous(soft_scale), _contiguous(hard_scale)
    parameters = parameter_array(spec)
    sparse = SparseTeacher()
    if isinstance(teacher, SparseRows):
        sparse = SparseTeacher(*(part.data_ptr() for part in teacher), teacher.ids.shape[-1])
    _call(
        "fastkd_kd_rows",
        KDRows(
            _matrix(student),
            _matrix(teacher if isinstance(teacher, Tensor) else None),
            _matrix(grad),
            _pointer(labels),
            _pointer(soft_scale),
            _pointer(hard_scale),
            soft.data_ptr(),
            hard.data_ptr(),
            rows,
            spec.vocab_size,
            spec.divergence.encode(),
            torch.get_num_threads(),
            parameters,
            len(parameters),
            spec.temperature,
            spec.teacher_temperature,
            spec.soft_weight,
            spec.hard_weight,
            *_placed(tile),
            sparse,
        ),
    )
    return soft, hard


def _placed(tile: Tile | None) -> tuple[int, int, int, int | None]:
    if tile is None:
        return 0, 0, 0, None
    return _STAGES[tile.stage], tile.first, tile.origin, tile.state.data_ptr()


def scratch_bytes(divergence: Divergence, tile: int, whole_teacher: bool, own_exponential: bool, gradient: bool) -> int:
    """What the threads stash: see `lay_out` in kernels/cpu/row.h. Arguments as in `backend.scratch_bytes`."""
    forward_kl = all(part.name == "forward_kl" for part, _ in divergence.parts)
    teacher_rows = whole_teacher * (1 if forward_kl else 2)
    rows = divergence.tempered * teacher_rows + own_exponential
    if not gradient and (not divergence.normalised or not whole_teacher):
        rows = 0
    return torch.get_num_threads() * 4 * (rows * tile + 9 * 1024)


def row_scales(
    student: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    divisor: float | Tensor | None,
    ignore_index: int,
    shift: bool,
    mask_soft: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `fastkd.backend.Backend.row_scales`."""
    rows, both = row_count(student), labels is not None and not mask_soft
    scales = _new(1 + both, rows)
    moved = _new(rows, dtype=torch.int64) if shift and labels is not None else None
    labels = _contiguous(labels)
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    _call(
        "fastkd_row_scales",
        RowScales(
            _pointer(labels),
            _pointer(weights),
            scales.data_ptr() if both else None,
            scales.data_ptr() + both * rows * scales.element_size(),
            _pointer(moved),
            rows,
            student.shape[-2] if shift else 0,
            ignore_index,
            divisor is None,
            0.0 if divisor is None else float(divisor),
        ),
    )
    return scales, moved


def weighted_total(
    soft: Tensor,
    hard: Tensor,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    soft_weight: float,
    hard_weight: float,
) -> Tensor:
    """See `fastkd.backend.Backend.weighted_total`. Added up in float64."""
    soft, hard = soft.contiguous(), hard.contiguous()
    soft_scale = None if soft_scale is None or soft_weight == 0 else soft_scale.contiguous()
    hard_scale = None if hard_scale is None or hard_weight == 0 else hard_scale.contiguous()
    total = _new()
    _call(
        "fastkd_weighted_total",
        WeightedTotal(
            soft.data_ptr(),
            hard.data_ptr(),
            _pointer(soft_scale),
            _pointer(hard_scale),
            total.data_ptr(),
            soft.numel(),
            soft_weight,
            hard_weight,
        ),
    )
    return total


def mix_rows(
    teachers: Sequence[Tensor], weights: Sequence[float], temperature: float, scale: Tensor | None, out: Tensor
) -> None:
    """See `fastkd.backend.Backend.mix_rows`."""
    count = len(teachers)
    scale = _contiguous(scale)
    _call(
        "fastkd_mix_rows",
        MixRows(
            (Matrix * count)(*map(_matrix, teachers)),
            (ctypes.c_double * count)(*weights),
            _matrix(out),
            _pointer(scale),
            count,
            row_count(out),
            torch.get_num_threads(),
            temperature,
        ),
    )


def row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    """See `fastkd.backend.Backend.row_statistics`."""
    rows = row_count(logits)
    normaliser = _new(rows, 2)
    log_sum_exp, entropy, label_logprob = (_new(rows) for _ in range(3))
    argmax = _new(rows, dtype=torch.int64)
    labels = _contiguous(labels)
    _call(
        "fastkd_row_statistics",
        Statistics(
            _matrix(logits),
            _pointer(labels),
            log_sum_exp.data_ptr(),
            entropy.data_ptr(),
            argmax.data_ptr(),
            label_logprob.data_ptr(),
            normaliser.data_ptr(),
            rows,
            torch.get_num_threads(),
            temperature,
        ),
    )
    return log_sum_exp, entropy, argmax, label_logprob, normaliser


def log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """See `fastkd.backend.Backend.log_softmax`."""
    rows = row_count(logits)
    normaliser = _new(rows, 2)
    arguments = LogSoftmax(
        _matrix(logits),
        Matrix(),
        _matrix(out),
        normaliser.data_ptr(),
        None,
        rows,
        torch.get_num_threads(),
        temperature,
    )
    _call("fastkd_log_softmax", arguments)
    return normaliser


def log_softmax_backward(
    upstream: Tensor,
    logits: Tensor,
    normaliser: Tensor,
    temperature: float,
    grad: Tensor,
    total: Tensor | None = None,
) -> None:
    """See `fastkd.backend.Backend.log_softmax_backward`."""
    normaliser, total = normaliser.contiguous(), _contiguous(total)
    arguments = LogSoftmax(
        _matrix(logits),
        _matrix(upstream),
        _matrix(grad),
        normaliser.data_ptr(),
        _pointer(total),
        row_count(logits),
        torch.get_num_threads(),
        temperature,
    )
    _call("fastkd_log_softmax_backward", arguments)


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastkd.backend.Backend.top_k`."""
    return _select(logits, k, temperature, None)


def sample(logits: Tensor, k: int, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastkd.backend.Backend.sample`."""
    return _select(logits, k, temperature, uniforms.to(torch.float64).contiguous())


def _select(logits: Tensor, k: int, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = row_count(logits)
    ids, log_weights, summary = _new(rows, k, dtype=torch.int64), _new(rows, k), _new(rows)
    _call(
        "fastkd_select",
        Selection(
            _matrix(logits),
            ids.data_ptr(),
            log_weights.data_ptr(),
            summary.data_ptr(),
            _pointer(uniforms),
            k,
            rows,
            torch.get_num_threads(),
            temperature,
        ),
    )
    return ids, log_weights, summary


def sparse_rows(
    targets: SparseTargets, live: Tensor | None, vocab_size: int, slack: float, nothing: float
) -> SparseRows | None:
    """See `fastkd.backend.Backend.sparse_rows`."""
    count = targets.shape[-1]
    ids = targets.ids.reshape(-1, count).to(torch.int64).contiguous()
    logprobs, rest, entropy, live = (
        None if values is None else values.to(torch.float32).contiguous()
        for values in (targets.logprobs, targets.rest, targets.entropy, live)
    )
    rows = len(ids)
    found = SparseRows(
        _new(rows, count, dtype=torch.int64), _new(rows, count), _new(rows), _new(rows), _new(rows, count)
    )
    arguments = SparseInput(
        ids.data_ptr(),
        *map(_pointer, (logprobs, rest, entropy, live)),
        *map(_pointer, found[:4]),
        rows,
        count,
        vocab_size,
        _SPARSE_KINDS[targets.kind],
        torch.get_num_threads(),
        slack,
        nothing,
    )
    in_order = _call("fastkd_sparse_rows", arguments)
    return found if in_order else None


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel to back a large new CPU tensor with huge pages: its first touch is several times cheaper."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < _HUGE_PAGE_THRESHOLD or type(tensor) is not Tensor:
        return
    library, _ = _load()
    if library is not None and os.environ.get("FASTKD_HUGE_PAGES", "1") != "0":
        library.fastkd_advise_huge_pages(tensor.data_ptr(), size)
