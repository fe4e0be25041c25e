"""The loop from hidden states as a GPU runs it, without one.

`sixteen_bit_products` computes on CPU tensors: operands keep 16 bits and products leave fp32, which torch does on GPUs
alone. `run_on_meta` computes nothing: tensors of any size have no values, so that whatever would wait for a device (a
value read, a count of non-zeros, a copy to the host) raises, and `LiveBytes` counts what a run allocates.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd.call import Call, call_for
from fastkd.projection import loop, sides
from fastkd.projection.plan import Plan
from fastkd.rows import STATE_BYTES, RowSpec, Wants

__all__ = ["LiveBytes", "Silent", "run_on_meta", "sixteen_bit_products"]


def sixteen_bit_products(patch: pytest.MonkeyPatch, operand: torch.dtype, backend: Any) -> list[tuple[int, int, int]]:
    """Emulate them, or those of fp32 operands; `backend` computes the rows: all, where `live` is not given.

    Returns a list that gets (m, k, n) of every product.
    """
    shapes = []

    def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        assert a.dtype == b.dtype == operand
        assert out.dtype == torch.float32
        shapes.append((*a.shape, b.shape[1]))
        exact = a.float() @ b.float()
        out.copy_(out + exact if accumulate else exact)

    patch.setattr(sides, "operand_dtype", lambda projection, autocast: operand)
    patch.setattr(sides, "gradient_dtype", lambda operand, device: operand)
    patch.setattr(sides, "product", product)
    patch.setattr(loop, "select", lambda tensor: backend)
    patch.setattr(loop, "_tells", lambda call: False)
    return shapes


#: Gradients of hidden states and head.
BOTH = Wants(True, True, False)


class Silent:
    """A backend that computes nothing, on any device."""

    @staticmethod
    def kd_rows(student: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return student.new_zeros(len(student)), student.new_zeros(len(student))

    @staticmethod
    def tile_state(rows: int, device: torch.device) -> Tensor:
        return torch.empty(rows, STATE_BYTES, dtype=torch.uint8, device=device)


def run_on_meta(
    patch: pytest.MonkeyPatch,
    tokens: int,
    vocab_size: int,
    hidden_sizes: tuple[int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    operand: torch.dtype = torch.bfloat16,
    softcap: float | None = None,
    wants: Wants = BOTH,
    memory_budget: int | None = None,
    change: Callable[[Call], Call] = lambda call: call,
) -> tuple[Plan, int]:
    """A loss and its gradients. The plan, and the most bytes that were alive at a time beside the inputs."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        assert a.dtype == b.dtype == operand
        assert out.shape == (a.shape[0], b.shape[1])
        assert a.shape[1] == b.shape[0]

    patch.setattr(sides, "operand_dtype", lambda projection, autocast: operand)
    patch.setattr(sides, "gradient_dtype", lambda operand, device: operand)
    patch.setattr(sides, "product", product)
    patch.setattr(loop, "select", lambda tensor: Silent)
    student, teacher = (
        fastkd.Projection(empty(tokens, width), empty(vocab_size, width), softcap=softcap) for width in hidden_sizes
    )
    spec = RowSpec("forward_kl", (), 2.0, 2.0, 2.0, 0.5, vocab_size)
    labels, scale = empty(tokens, of=torch.int64), empty(tokens, of=torch.float32)
    call = change(call_for(student, teacher, labels, scale, scale, spec, None, memory_budget))
    with torch.no_grad(), LiveBytes() as counted:
        running = loop._Loop(call, None, wants)
        for rows in running.groups():
            running.run(rows)
        gradients = running.student.gradients()
    assert (gradients.weight is not None) == wants.weight
    return running.plan, counted.most


class LiveBytes:
    """The bytes of the tensors that are made within, while they live; `most` is their highest sum."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._sizes: dict[int, int] = {}
        self._mode = _EveryResult(self._given, self._made)

    def __enter__(self) -> LiveBytes:
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)

    def _given(self, tensor: Tensor) -> None:
        """Was there before: no bytes of ours, nor are its views."""
        self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class _EveryResult(TorchDispatchMode):
    def __init__(self, given: Callable[[Tensor], None], made: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._told = given, made

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operator(*args, **(kwargs or {}))
        for tell, tree in zip(self._told, ((args, kwargs), found), strict=True):
            for tensor in tree_leaves(tree):
                if isinstance(tensor, Tensor):
                    tell(tensor)
        return found
