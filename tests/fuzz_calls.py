"""What a fuzzed call consists of, and how its tensors lie in memory."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.sources import Source

#: What lies in memory around the elements a call is given: nobody may read or write it.
GUARD = 99.0
DEFAULTS: dict[str, Any] = {
    "temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5, "divergence": "forward_kl", "scale_t2": True,
    "ignore_index": -100, "reduction": "mean", "shift": False, "mask_soft": True, "inplace": False,
    "return_parts": False,
}  # fmt: skip
PARAMETERS = {
    "forward_kl": (fastkd.ForwardKL, ()), "reverse_kl": (fastkd.ReverseKL, ()), "jsd": (fastkd.JSD, (0.5,)),
    "skew_kl": (fastkd.SkewKL, (0.1,)), "skew_reverse_kl": (fastkd.SkewReverseKL, (0.1,)),
    "symmetric_kl": (fastkd.SymmetricKL, (0.5,)), "tvd": (fastkd.TVD, ()),
    "squared_hellinger": (fastkd.SquaredHellinger, ()),
    "alpha_beta": (fastkd.AlphaBeta, (0.2, 0.7)), "mse": (fastkd.MSE, ()),
}  # fmt: skip


@dataclass
class Operands:
    """One side of a call: its logits, or the hidden states, weight and bias of a `Projection`."""

    tensors: list[Tensor]
    head: dict[str, float]
    wants: list[bool]  # which of the tensors ask for a gradient

    @property
    def is_projection(self) -> bool:
        return len(self.tensors) > 1

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        width = self.tensors[1].shape[0] if self.is_projection else self.tensors[0].shape[-1]
        return torch.Size((*self.tensors[0].shape[:-1], width))

    def logits(self) -> Tensor:
        """In float64."""
        hidden, weight, *bias = (tensor.double() for tensor in self.tensors)
        return fastkd.Projection(hidden, weight, *bias, **self.head).logits()

    def source(self, tensors: list[Tensor] | None = None) -> Source:
        tensors = self.tensors if tensors is None else tensors
        return fastkd.Projection(*tensors, **self.head) if self.is_projection else tensors[0]


@dataclass
class Sparse:
    """What `SparseTargets` is made of."""

    ids: Tensor
    logprobs: Tensor
    kind: str
    temperature: float
    rest: Tensor | None = None
    entropy: Tensor | None = None

    def source(self) -> fastkd.SparseTargets:
        return fastkd.SparseTargets(self.ids, self.logprobs, self.kind, self.temperature, self.rest, self.entropy)  # type: ignore[arg-type]


@dataclass
class LossCall:
    """`KDLoss(**settings)(student, teacher, labels, weights=…, num_items=…)` and what goes back through it."""

    settings: dict[str, Any]
    divergence: tuple[str, tuple[float, ...]]
    student: Operands
    teacher: Operands | Sparse | None
    labels: Tensor | None
    weights: Tensor | None
    num_items: Any
    backend: str | None
    upstream: Tensor = field(default_factory=lambda: torch.ones(()))
    ambient: Any = None  # a default dtype or device of torch's, or autocast, in which the library is called
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        return self.settings.get(name, DEFAULTS.get(name))

    @property
    def student_temperature(self) -> float:
        return float(self.setting("temperature"))

    @property
    def teacher_temperature(self) -> float:
        own = self.setting("teacher_temperature")
        return self.student_temperature if own is None else float(own)

    @property
    def term_weights(self) -> tuple[float, float]:
        alpha = self.settings.get("alpha")
        if alpha is None:
            return float(self.setting("soft_weight")), float(self.setting("hard_weight"))
        return (alpha, 1 - alpha) if self.settings["alpha_on"] == "soft" else (1 - alpha, alpha)

    @property
    def eager(self) -> bool:
        """Whether the reference computes."""
        return self.backend == "reference" or self.student.tensors[0].dtype == torch.float64

    @property
    def columns(self) -> int:
        return int(self.settings.get("vocab_size") or self.student.shape[-1])

    def scored(self, tokens: Tensor) -> Tensor:
        """Of something per token, those that are scored; they come first in a sequence under `shift`."""
        return tokens[..., :-1] if self.setting("shift") else tokens

    def predicted(self, tokens: Tensor) -> Tensor:
        """Of labels or weights, those that the scored tokens predict."""
        return tokens[..., 1:] if self.setting("shift") else tokens

    def scored_rows(self) -> Tensor:
        leading = self.student.shape[:-1]
        return self.scored(torch.arange(leading.numel()).view(leading)).reshape(-1)

    def describe(self) -> str:
        def one(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{str(value.dtype)[6:]}{tuple(value.shape)}/{value.stride()}"
            if isinstance(value, Operands):
                return f"[{', '.join(one(x) for x in value.tensors)}; {value.head}; wants {value.wants}]"
            if isinstance(value, Sparse):
                parts = ((name, part) for name, part in vars(value).items() if part is not None)
                return f"SparseTargets({', '.join(f'{name}={one(part)}' for name, part in parts)})"
            return repr(value)

        names = (
            "settings",
            "student",
            "teacher",
            "labels",
            "weights",
            "num_items",
            "backend",
            "upstream",
            "ambient",
            "notes",
        )
        return "; ".join(f"{name} {one(getattr(self, name))}" for name in names)


# --- tensors ----------------------------------------------------------------------------------------------------


def _contiguous(values: Tensor, room: Tensor) -> Tensor:
    return room[: values.numel()].view(values.shape)


def _misaligned(values: Tensor, room: Tensor) -> Tensor:
    return room[1 : 1 + values.numel()].view(values.shape)


def _padded(values: Tensor, room: Tensor) -> Tensor:
    """Rows of a wider matrix, not from its first column."""
    *leading, columns = values.shape
    return room[: math.prod(leading) * (columns + 5)].view(*leading, columns + 5)[..., 2 : 2 + columns]


def _every_second_column(values: Tensor, room: Tensor) -> Tensor:
    *leading, columns = values.shape
    return room[: math.prod(leading) * 2 * columns].view(*leading, 2 * columns)[..., ::2]


def _every_second_row(values: Tensor, room: Tensor) -> Tensor:
    *leading, rows, columns = values.shape
    return room[: math.prod(leading) * 2 * rows * columns].view(*leading, 2 * rows, columns)[..., ::2, :]


def _columns_first(values: Tensor, room: Tensor) -> Tensor:
    *leading, columns = values.shape
    return room[: values.numel()].view(columns, *leading).movedim(0, -1)


def _dimensions_swapped(values: Tensor, room: Tensor) -> Tensor:
    first, second, *others = values.shape
    return room[: values.numel()].view(second, first, *others).transpose(0, 1)


#: How a tensor may lie in memory, with the dimensions it needs.
LAYOUTS = {
    _contiguous: 1, _misaligned: 1, _padded: 1, _every_second_column: 1, _columns_first: 1, _every_second_row: 2,
    _dimensions_swapped: 2,
}  # fmt: skip


def lay_out(values: Tensor, layout: Any) -> Tensor:
    """The same numbers elsewhere in memory, guards around them; see `LAYOUTS`."""
    size = 3 * values.numel() + 6 * math.prod(values.shape[:-1]) + 8
    room = torch.full((size,), GUARD).to(values.dtype)
    return layout(values, room).copy_(values)


def laid_out(draw: random.Random, values: Tensor, often: float = 0.5, regular: bool = False) -> Tensor:
    """The same numbers, `often` in another layout than the usual; `regular`: in one that can be written in place."""
    if values.dim() == 0 or draw.random() > often:
        return values.contiguous()
    fitting = [layout for layout, dimensions in LAYOUTS.items() if dimensions <= values.dim()]
    if regular:
        fitting = [_contiguous, _misaligned, _padded] + [_every_second_row] * (values.dim() in (2, 3))
    return lay_out(values, draw.choice(fitting))


@contextlib.contextmanager
def within(ambient: Any) -> Iterator[None]:
    """Torch's default dtype, its default device, or autocast."""
    before = torch.get_default_dtype()
    try:
        if isinstance(ambient, torch.dtype):
            torch.set_default_dtype(ambient)
        with ambient if isinstance(ambient, torch.autocast | torch.device) else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def untouched(tensors: Sequence[Tensor | None], written: Tensor | None = None) -> Iterator[None]:
    """Raise AssertionError where these tensors, or what lies around them in memory, change; `written` itself may."""
    given = [tensor for tensor in tensors if tensor is not None]
    before = [_storage(tensor).clone() for tensor in given]
    yield
    for tensor, old in zip(given, before, strict=True):
        if tensor is written:
            typed = old.view(tensor.dtype)
            typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())
        assert torch.equal(old, _storage(tensor)), f"memory changed in or around a tensor of shape {tensor.shape}"


def _storage(tensor: Tensor) -> Tensor:
    """All the bytes a tensor lies among."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
