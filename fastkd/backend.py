"""Who computes a loss: the native CPU library, the Triton kernels, or the eager reference.

The three offer the same functions (`Backend`), so that everything above them is written once. Which one runs is
decided per call from the tensor's device, unless `use_backend` forces one. A backend is one row of `_ROWS`.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.kernels.cpu import library, products
from fastkd.rows import RowSpec, SparseRows, Stage, StateFields, Tile

__all__ = ["Backend", "BackendStatus", "backends", "scratch_bytes", "select", "use_backend"]


class Backend(Protocol):
    """The functions a backend offers. Rows are the collapsed leading dimensions; row scalars are fp32 `[rows]`.

    One may also offer `sparse_rows(targets, live, vocab_size, slack, nothing)`: what `sparse.sparse_rows` returns, or
    None where anything has to be sorted or reported; the last two are that file's limits.

    One on a device that runs behind the host may also offer `scale_(grad, upstream)`: grad·upstream in place, without
    waiting for the device.
    """

    def kd_rows(
        self,
        student: Tensor,
        teacher: Tensor | SparseRows | None,
        labels: Tensor | None,
        soft_scale: Tensor | None,
        hard_scale: Tensor | None,
        spec: RowSpec,
        grad: Tensor | None,
        tile: Tile | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Divergence and cross-entropy of each row; the student's gradient into `grad` (may be `student` itself).

        A term is absent where its scale is None. In a row where a scale is 0 that term is not computed and reads 0.
        Beside `SparseRows` any divergence with a softmax (`Divergence.tempered`) can be computed.
        grad = soft_weight·soft_scale·∂soft/∂z + hard_weight·hard_scale·∂hard/∂z, and 0 beyond `vocab_size`.

        With a `tile`, student, teacher and grad hold its columns only, and all of them count; labels, `vocab_size` and
        `SparseRows` are the row's, and beside the last there are no terms. `grad` is given in the gradient stage only.
        The values returned are final after the last tile of the statistics or, where there are terms, of the terms.
        The reference takes no tiles.
        """
        ...

    def tile_state(self, rows: int, device: torch.device) -> Tensor:
        """Uninitialised memory for `Tile.state`, a row each; the statistics of the first tile fill it.

        A backend without it takes no tiles: losses from hidden states then hold whole rows.
        """
        ...

    def state_fields(
        self, state: Tensor, spec: RowSpec, teacher: Literal["absent", "dense", "sparse"], hard: bool, stage: Stage
    ) -> StateFields:
        """What `Tile.state` holds after a stage of a loss that has these terms: what ranks exchange and merge.

        Logits: student_max, teacher_max, label_logit (whatever, where it was not met); top_student and top_teacher,
        both sides' where the student has its maximum. Sums of exponentials at the loss's temperatures, relative to
        these maxima: student, teacher; hard, at T = 1 and relative to student_max; gap = student − teacher; forward =
        Σ e_t·(y_t − y_s) and reverse = Σ e_s·(y_s − y_t). Σ term and Σ g: value and total_g; of raw logits value is
        the sum of squares. A backend names those that the loss needs. It offers this beside `tile_state`.
        """
        ...

    def row_scales(
        self,
        student: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        divisor: float | Tensor | None,
        ignore_index: int,
        shift: bool,
        mask_soft: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What each row's terms are multiplied by: mask · weights ÷ divisor, and the labels they are scored against.

        Of the student only shape, dtype and device count. `labels` int64 and `weights` (any dtype of real numbers) have
        its leading shape. With `shift` both move one place towards the front of the last leading dimension, whose last
        place has scale 0. Positions whose label is `ignore_index` are masked.

        `divisor`: a number, a tensor that holds one, on any device, or None for the sum of what is divided. Where it
        is 0, so are the scales.

        Returns the scales `[1, rows]` of both terms or, without `mask_soft` and with labels, `[2, rows]`: first of the
        soft term, of which nothing is masked, then of the hard one. And with `shift` the labels, moved, `[rows]`.
        """
        ...

    def weighted_total(
        self,
        soft: Tensor,
        hard: Tensor,
        soft_scale: Tensor | None,
        hard_scale: Tensor | None,
        soft_weight: float,
        hard_weight: float,
    ) -> Tensor:
        """Σ soft_weight·soft_scale·soft + hard_weight·hard_scale·hard over all rows, 0-dim; the same at every call.

        A term without a scale, or of weight 0, is absent.
        """
        ...

    def mix_rows(
        self,
        teachers: Sequence[Tensor],
        weights: Sequence[float],
        temperature: float,
        scale: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write logits of which softmax(out / temperature) is Σ weights · softmax(teachers / temperature).

        They are temperature · log p, up to a constant of the row; −inf where p is 0. `teachers` and `out` are
        `[rows, columns]`; weights are above 0, with a sum of 1. `out` is fp32 (float64 for the reference), and may be
        one of the teachers. Rows whose `scale` is 0 may hold anything afterwards.
        """
        ...

    def row_statistics(self, logits: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
        """log-sum-exp, entropy (nats), arg-max (int64) and label log-probability of softmax(logits / temperature).

        Then the normaliser `[rows, 2]`, as of `log_softmax`.
        """
        ...

    def log_softmax(self, logits: Tensor, temperature: float, out: Tensor) -> Tensor:
        """Write log softmax(logits / temperature) to `out`; return the normaliser `[rows, 2]` for the backward.

        The normaliser is the row's largest logit and log2 of the sum of exponentials relative to it; as one number
        they would lose the fraction beside a large offset.
        """
        ...

    def log_softmax_backward(
        self,
        upstream: Tensor,
        logits: Tensor,
        normaliser: Tensor,
        temperature: float,
        grad: Tensor,
        total: Tensor | None = None,
    ) -> None:
        """Write (upstream − softmax(logits/T)·Σ upstream) / T to `grad`.

        `total` `[rows]` is Σ upstream where the columns here are some of a row's, whose normaliser is given.
        """
        ...

    def top_k(self, logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest tokens of each row of softmax(logits / temperature); of equals at the end, any.

        Returns ids int64 `[rows, k]`, ascending; their log-probabilities `[rows, k]`; the log `[rows]` of the mass not
        kept, summed from the other columns. Fewer tokens than k: (0, −inf) last. NaN where the row has no softmax.
        """
        ...

    def sample(self, logits: Tensor, k: int, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At most k tokens of each row, and weights that are unbiased estimates of all its probabilities.

        Optimal threshold resampling (Fearnhead and Clifford 2003): of all schemes that keep k tokens, the least
        variance. With τ such that Σ min(1, p/τ) = k, tokens with p ≥ τ are kept with weight p; of the others, enough
        to make k are drawn with probability p/τ and have weight τ. The draws are systematic: where the positions
        (uniform + j)·τ fall in the running sum of the others' probabilities, in the order of their ids.

        `uniforms` float64 `[rows]` in [0, 1). Returns ids int64 `[rows, k]`, ascending; log-weights `[rows, k]`; the
        rows' entropies in nats. Tokens that are missing, and rows without a softmax, as in `top_k`.
        """
        ...


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and if not, why."""

    available: bool
    detail: str


#: The versions of Triton that every kernel is compiled with in `make test`, the oldest and the newest; they come with
#: PyTorch 2.9 and with none yet.
_OLDEST_TRITON, _NEWEST_TRITON = (3, 5), (3, 9)


def _triton_status() -> BackendStatus:
    try:
        import triton
    except ImportError as error:
        return BackendStatus(False, f"triton cannot be imported: {error}")
    if not hasattr(triton, "__version__"):  # Python takes any folder of that name for a package
        return BackendStatus(False, f"triton is not installed; {next(iter(triton.__path__))} is a folder of that name")
    found = f"triton {triton.__version__}"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < _OLDEST_TRITON:
        return BackendStatus(
            False,
            f"{found} is older than {_dotted(_OLDEST_TRITON)}, which the kernels need: install PyTorch 2.9 or newer",
        )
    if version > _NEWEST_TRITON:
        found += f", newer than {_dotted(_NEWEST_TRITON)}, the newest that the kernels were compiled with"
    if not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return BackendStatus(False, f"{found} is installed, but no GPU is visible")
    return BackendStatus(True, found)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


class _Row(NamedTuple):
    """One backend."""

    module: str  # offers the functions of `Backend`; imported when it is first needed
    devices: tuple[str, ...]  # types of device it is chosen for; () for all that no other row names
    status: Callable[[], BackendStatus]
    #: Bytes that its kernels allocate beside the buffers of a loss from hidden states: see `scratch_bytes`.
    scratch_bytes: Callable[[Divergence, int, bool, bool, bool], int]
    #: More of an available backend, for people: not asked where a call chooses, since the answer may take a race.
    measured: Callable[[], str] | None = None


def _no_scratch(*_: object) -> int:
    return 0


_ROWS: dict[str, _Row] = {
    "cpu": _Row(
        "fastkd.kernels.cpu",
        ("cpu",),
        lambda: BackendStatus(*library.status()),
        library.scratch_bytes,
        products.detail,
    ),
    "triton": _Row("fastkd.kernels.gpu", ("cuda", "xpu"), lambda: _triton_status(), _no_scratch),
    "reference": _Row(
        "fastkd.reference", (), lambda: BackendStatus(True, "eager PyTorch, any device and dtype"), _no_scratch
    ),
}
_LAST_RESORT = "reference"


@functools.cache
def _status(name: str) -> BackendStatus:
    return _ROWS[name].status()


@functools.cache
def _for_device(kind: str) -> str:
    """The backend made for a type of device, whether or not it is available."""
    return next((name for name, row in _ROWS.items() if kind in row.devices), _LAST_RESORT)


def scratch_bytes(
    device: torch.device, divergence: Divergence, tile: int, whole_teacher: bool, own_exponential: bool, gradient: bool
) -> int:
    """Bytes that the kernels of this device allocate for themselves while rows of `tile` columns are computed.

    `whole_teacher`: every column of the teacher is known. `own_exponential`: the cross-entropy's e^z is no power of
    e^(z/T). `gradient`: a gradient is wanted.
    """
    return _ROWS[_for_device(device.type)].scratch_bytes(divergence, tile, whole_teacher, own_exponential, gradient)


def backends() -> dict[str, BackendStatus]:
    """Every backend with whether it is available here and, where not, the reason.

    Of the CPU it says too how products of bfloat16 hidden states are computed: see FASTKD_CPU_PRODUCTS in the guide,
    whose errors it raises.
    """
    return {name: _described(name) for name in _ROWS}


def _described(name: str) -> BackendStatus:
    status, measured = _status(name), _ROWS[name].measured
    if not status.available or measured is None:
        return status
    return status._replace(detail=f"{status.detail}; {measured()}")


class running_on:
    """Force a backend for a block, in the current thread or task only; None chooses automatically."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __enter__(self) -> running_on:
        _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        blocks = _blocks.get()
        if self in blocks:  # the last time, if one object is entered twice
            mine = len(blocks) - 1 - blocks[::-1].index(self)
            _blocks.set(blocks[:mine] + blocks[mine + 1 :])


class use_backend(running_on):
    """Force one backend, from now on or, as a context manager, for a block.

    >>> fastkd.use_backend("reference")         # until changed; None restores the automatic choice
    >>> with fastkd.use_backend("reference"):   # for this block
    ...     loss = kd(student, teacher, labels)

    The first holds for the whole process. The second takes precedence, and holds in the thread or asyncio task that
    runs the block (tasks made within it inherit it, threads do not): blocks that overlap do not disturb each other. A
    backward runs on the backend of its forward, wherever it is called; under `torch.compile` on the one in force where
    it runs. Raises ValueError for an unknown name, RuntimeError for a backend that is unavailable.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            if name not in _ROWS:
                raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(_ROWS)} (or None)")
            status = _status(name)
            if not status.available:
                raise RuntimeError(f"backend {name!r} is not available: {status.detail}")
        super().__init__(name)
        with _lock:
            _process_wide.append(self)  # until a `with` shows that a block was meant

    def __enter__(self) -> use_backend:
        with _lock:
            if self in _process_wide:
                _process_wide.remove(self)
        super().__enter__()
        return self


_blocks: ContextVar[tuple[running_on, ...]] = ContextVar("fastkd_blocks", default=())
#: The last one counts. The others are for as many threads as may be on the way from a `use_backend` to its `with`.
_process_wide: deque[use_backend] = deque(maxlen=256)
_lock = threading.Lock()


def forced() -> str | None:
    """The backend that is forced here, or None."""
    blocks = _blocks.get()
    if blocks:
        return blocks[-1].name
    try:
        return _process_wide[-1].name
    except IndexError:  # not asked before: another thread could take the last one away in between
        return None


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def select(tensor: Tensor) -> Backend:
    """The backend that computes on `tensor`: the forced one, else by device, else the reference with one warning."""
    return _imported(_ROWS[forced() or automatic(tensor.dtype, tensor.device.type)])


@functools.cache
def _imported(row: _Row) -> Backend:
    return cast(Backend, importlib.import_module(row.module))


@functools.cache
def automatic(dtype: torch.dtype, device: str) -> str:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return _LAST_RESORT  # float64: the kernels compute in fp32
    wanted = _for_device(device)
    status = _status(wanted)
    if status.available:
        return wanted
    warn_once(f"fastkd: the {wanted!r} backend is not available ({status.detail}); the slower eager reference is used")
    return _LAST_RESORT
