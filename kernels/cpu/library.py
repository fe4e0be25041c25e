"""The native library: where it is found, and how it is handed pointers.

The library is free of torch: plain C entry points, one argument struct each (mirrored below field by field), row
strides and a dtype code. It is loaded after torch, whose OpenMP runtime it then shares. If it cannot be loaded,
`status` says why and the reference backend takes over.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastkd.divergences import TABLE, Divergence
from fastkd.rows import RowSpec, SparseRows, Tile, row_count, row_layout

__all__ = [
    "advise_huge_pages",
    "kd_rows",
    "log_softmax",
    "log_softmax_backward",
    "row_statistics",
    "sample",
    "scratch_bytes",
    "status",
    "tile_state",
    "top_k",
]

_ABI = 4
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STAGES = {"statistics": 1, "terms": 2, "gradient": 3}
_OUT_OF_MEMORY, _UNKNOWN_DIVERGENCE = 1, 2
_HUGE_PAGE_THRESHOLD = 4 << 20  # bytes; below it the allocator recycles pages and the advice is a wasted call


class _Matrix(ctypes.Structure):
    """Rows of `width` elements; row i starts at (i // inner)·outer_stride + (i % inner)·inner_stride."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("outer_stride", ctypes.c_int64),
        ("inner_stride", ctypes.c_int64),
    )


class _SparseTeacher(ctypes.Structure):
    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("picked", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class _KDRows(ctypes.Structure):
    _fields_ = (
        ("student", _Matrix),
        ("teacher", _Matrix),
        ("grad", _Matrix),
        ("labels", ctypes.c_void_p),
        ("soft_scale", ctypes.c_void_p),
        ("hard_scale", ctypes.c_void_p),
        ("soft", ctypes.c_void_p),
        ("hard", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("divergence", ctypes.c_char_p),
        ("threads", ctypes.c_int64),
        ("parameters", ctypes.c_double * 2),
        ("temperature", ctypes.c_double),
        ("teacher_temperature", ctypes.c_double),
        ("soft_weight", ctypes.c_double),
        ("hard_weight", ctypes.c_double),
        ("stage", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("sparse", _SparseTeacher),
    )


class _Statistics(ctypes.Structure):
    _fields_ = (
        ("logits", _Matrix),
        ("labels", ctypes.c_void_p),
        ("log_sum_exp", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("argmax", ctypes.c_void_p),
        ("label_logprob", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class _LogSoftmax(ctypes.Structure):
    _fields_ = (
        ("logits", _Matrix),
        ("upstream", _Matrix),  # backward only
        ("out", _Matrix),
        ("normaliser", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


class _Selection(ctypes.Structure):
    _fields_ = (
        ("logits", _Matrix),
        ("ids", ctypes.c_void_p),
        ("log_weights", ctypes.c_void_p),
        ("summary", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("temperature", ctypes.c_double),
    )


#: The argument structs, by their names in C++.
_STRUCTURES = {structure.__name__[1:]: structure for structure in (_KDRows, _Statistics, _LogSoftmax, _Selection)}

#: Every entry point: what it returns, and what it takes.
_ENTRIES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fastkd_abi": (ctypes.c_int, ()),
    "fastkd_isa": (ctypes.c_char_p, ()),
    "fastkd_knows": (ctypes.c_int, (ctypes.c_char_p,)),
    "fastkd_size": (ctypes.c_int64, (ctypes.c_char_p,)),
    "fastkd_kd_rows": (ctypes.c_int, (ctypes.POINTER(_KDRows),)),
    "fastkd_row_statistics": (ctypes.c_int, (ctypes.POINTER(_Statistics),)),
    "fastkd_log_softmax": (ctypes.c_int, (ctypes.POINTER(_LogSoftmax),)),
    "fastkd_log_softmax_backward": (ctypes.c_int, (ctypes.POINTER(_LogSoftmax),)),
    "fastkd_select": (ctypes.c_int, (ctypes.POINTER(_Selection),)),
    "fastkd_advise_huge_pages": (None, (ctypes.c_void_p, ctypes.c_int64)),
}


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
    if missing := [name for name in _ENTRIES if not hasattr(library, name)]:
        return None, f"{found[0]} lacks {', '.join(missing)}, which this package calls: reinstall fastkd"
    for name, (result, arguments) in _ENTRIES.items():
        entry = getattr(library, name)
        entry.restype, entry.argtypes = result, arguments
    instruction_set = library.fastkd_isa()
    if instruction_set is None:
        return None, "this processor lacks AVX2 and FMA, which the native kernels need"
    if unknown := [name for name in TABLE if not library.fastkd_knows(name.encode())]:
        return None, f"{found[0]} does not know the divergence {', '.join(unknown)}: reinstall fastkd"
    for name, structure in _STRUCTURES.items():
        theirs, ours = library.fastkd_size(name.encode()), ctypes.sizeof(structure)
        if theirs != ours:
            return None, f"{found[0]} takes {name} of {theirs} bytes, this package passes {ours}: reinstall fastkd"
    return library, f"native C++, {instruction_set.decode()}"


def status() -> tuple[bool, str]:
    """Whether the native library can be used, and the instruction set it picked or the reason it cannot."""
    library, detail = _load()
    return library is not None, detail


def _library() -> ctypes.CDLL:
    library, detail = _load()
    if library is None:
        raise RuntimeError(f"the cpu backend is not available: {detail}")
    return library


def _call(name: str, arguments: ctypes.Structure) -> None:
    outcome = getattr(_library(), name)(ctypes.byref(arguments))
    if outcome == _OUT_OF_MEMORY:
        raise MemoryError(f"{name}: out of memory for the per-thread row buffers")
    if outcome == _UNKNOWN_DIVERGENCE:
        beside = " beside a sparse teacher" if arguments.sparse.ids else ""
        raise ValueError(f"the native library computes no divergence {arguments.divergence.decode()!r}{beside}")


def _matrix(tensor: Tensor | None) -> _Matrix:
    if tensor is None:
        return _Matrix()
    layout = row_layout(tensor)
    if tensor.dtype not in _DTYPES or tensor.device.type != "cpu" or layout is None:
        raise TypeError(
            f"the cpu backend takes float32, bfloat16 and float16 tensors in main memory, got {tensor.dtype} on "
            f"{tensor.device}; fastkd.use_backend('reference') takes any"
        )
    return _Matrix(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape[-1], *layout[1:])


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the library to write: fp32 in main memory, whatever dtype and device torch would take."""
    return torch.empty(shape, dtype=dtype, device="cpu")


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
    labels, soft_scale, hard_scale = (
        None if tensor is None else tensor.contiguous() for tensor in (labels, soft_scale, hard_scale)
    )
    sparse = _SparseTeacher()
    if isinstance(teacher, SparseRows):
        sparse = _SparseTeacher(*(part.data_ptr() for part in teacher), teacher.ids.shape[-1])
    _call(
        "fastkd_kd_rows",
        _KDRows(
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
            (ctypes.c_double * 2)(*spec.parameters),
            spec.temperature,
            spec.teacher_temperature,
            spec.soft_weight,
            spec.hard_weight,
            *((0, 0, None) if tile is None else (_STAGES[tile.stage], tile.first, tile.state.data_ptr())),
            sparse,
        ),
    )
    return soft, hard


def tile_state(rows: int, device: torch.device) -> Tensor:
    """See `fastkd.backend.Backend.tile_state`."""
    return _new(rows, _library().fastkd_size(b"state"), dtype=torch.uint8)


def scratch_bytes(divergence: Divergence, tile: int, whole_teacher: bool, own_exponential: bool, gradient: bool) -> int:
    """What the threads stash: see `lay_out` in kernels/cpu/row.h. Arguments as in `backend.scratch_bytes`."""
    teacher_rows = whole_teacher * (1 if divergence.name == "forward_kl" else 2)
    rows = divergence.tempered * teacher_rows + own_exponential
    if not gradient and (not divergence.normalised or not whole_teacher):
        rows = 0
    return torch.get_num_threads() * 4 * (rows * tile + 9 * 1024)


def row_statistics(logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastkd.backend.Backend.row_statistics`."""
    rows = row_count(logits)
    log_sum_exp, entropy, label_logprob = (_new(rows) for _ in range(3))
    argmax = _new(rows, dtype=torch.int64)
    labels = None if labels is None else labels.contiguous()
    _call(
        "fastkd_row_statistics",
        _Statistics(
            _matrix(logits),
            _pointer(labels),
            log_sum_exp.data_ptr(),
            entropy.data_ptr(),
            argmax.data_ptr(),
            label_logprob.data_ptr(),
            rows,
            torch.get_num_threads(),
            temperature,
        ),
    )
    return log_sum_exp, entropy, argmax, label_logprob


def log_softmax(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """See `fastkd.backend.Backend.log_softmax`."""
    rows = row_count(logits)
    normaliser = _new(rows, 2)
    arguments = _LogSoftmax(
        _matrix(logits),
        _Matrix(),
        _matrix(out),
        normaliser.data_ptr(),
        rows,
        torch.get_num_threads(),
        temperature,
    )
    _call("fastkd_log_softmax", arguments)
    return normaliser


def log_softmax_backward(
    upstream: Tensor, logits: Tensor, normaliser: Tensor, temperature: float, grad: Tensor
) -> None:
    """See `fastkd.backend.Backend.log_softmax_backward`."""
    arguments = _LogSoftmax(
        _matrix(logits),
        _matrix(upstream),
        _matrix(grad),
        normaliser.data_ptr(),
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
        _Selection(
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


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel to back a large new CPU tensor with huge pages: its first touch is several times cheaper."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < _HUGE_PAGE_THRESHOLD or type(tensor) is not Tensor:
        return
    library, _ = _load()
    if library is not None and os.environ.get("FASTKD_HUGE_PAGES", "1") != "0":
        library.fastkd_advise_huge_pages(tensor.data_ptr(), size)
