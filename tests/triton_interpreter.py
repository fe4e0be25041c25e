"""Run the Triton kernels on the CPU, element by element, watching every memory access.

    with interpreted() as trace:
        kd_rows(student, teacher, ...)          # CPU tensors
    trace.loads(student)                        # how often each element was read, shaped like the tensor

A launch within runs in Triton's interpreter, without the environment variable that would make compiling impossible in
the same process. `Fault` is raised where a kernel touches memory outside the tensors it was given (outside the views,
not merely their storage), where two programs touch one element and one of them writes it, where a `tl.multiple_of` is
untrue, and where bf16 is computed with, which the interpreter would do on raw bits. Index arithmetic that overflows
raises in the interpreter itself.

Its conversion from fp32 to bf16 truncates; here it rounds to nearest even, as GPUs do.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from torch import Tensor
from triton.runtime.jit import JITFunction

from tools.machine_code.offline import TARGETS, stand_in_driver


class Fault(AssertionError):
    """A kernel did what no kernel may do."""


class _Buffer:
    """A storage that kernels were given, with what happened to each of its elements."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()
        self.start, self.item = self.storage.data_ptr(), tensor.element_size()
        count = self.storage.nbytes() // self.item
        self.stop = self.start + count * self.item
        self.visible = torch.zeros(count, dtype=torch.bool)
        self.loads = torch.zeros(count, dtype=torch.int32)
        self.stores = torch.zeros(count, dtype=torch.int32)
        self.forget_programs()

    def show(self, tensor: Tensor) -> None:
        """Let kernels touch the elements of this view."""
        self.visible.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)

    def forget_programs(self) -> None:
        """A launch has ended: what follows it does not race with it."""
        self.owner = np.full(len(self.visible), -1)
        self.shared = np.zeros(len(self.visible), bool)
        self.written = np.zeros(len(self.visible), bool)

    def touch(self, addresses: np.ndarray, size: int, store: bool, program: int) -> None:
        elements = (addresses - self.start) // self.item
        kind = "store to" if store else "load of"
        if size != self.item:
            raise Fault(f"{kind} {size} bytes in a tensor of {self.item}-byte elements")
        if not (seen := self.visible.numpy()[elements]).all():
            outside = int(elements[~seen][0])
            raise Fault(f"{kind} element {outside} of a storage, outside every view that was passed; program {program}")
        others = (self.owner[elements] != -1) & (self.owner[elements] != program)
        racing = others | self.shared[elements] if store else others & self.written[elements]
        if racing.any():
            raise Fault(f"race: {kind} element {int(elements[racing][0])} by program {program} and by another")
        self.shared[elements] |= others
        self.owner[elements] = np.where(self.owner[elements] == -1, program, self.owner[elements])
        if store:
            self.written[elements] = True
        counts = (self.stores if store else self.loads).numpy()
        np.add.at(counts, elements, 1)


class Trace:
    """Every access of the launches so far."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}

    def begin(self, arguments: Any) -> None:
        """A launch with these arguments, tensors possibly nested in tuples, follows."""
        for buffer in self._buffers.values():
            buffer.forget_programs()
            buffer.visible.zero_()
        for tensor in _tensors(arguments):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._buffers:
                self._buffers[address] = _Buffer(tensor)
            self._buffers[address].show(tensor)

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int, store: bool) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        x, y, z = stock.interpreter_builder.grid_idx
        _, height, depth = stock.interpreter_builder.grid_dim
        while addresses.size:
            first = addresses[0]
            buffer = next((b for b in self._buffers.values() if b.start <= first < b.stop), None)
            if buffer is None:
                raise Fault(f"{'store' if store else 'load'} outside every tensor, program {(x, y, z)}")
            inside = (addresses >= buffer.start) & (addresses < buffer.stop)
            buffer.touch(addresses[inside], size, store, (x * height + y) * depth + z)
            addresses = addresses[~inside]

    def check(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        """Of an atomic, which races with no other: only that it stays within the tensors."""
        buffers = self._buffers.values()
        for address in pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64):
            if not any(b.start <= address < b.stop and b.visible[(address - b.start) // b.item] for b in buffers):
                raise Fault("atomic outside every view that was passed")

    def loads(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor` was read."""
        return self._counts(tensor, "loads")

    def stores(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor` was written."""
        return self._counts(tensor, "stores")

    def _counts(self, tensor: Tensor, kind: str) -> Tensor:
        counts: Tensor = getattr(self._buffers[tensor.untyped_storage().data_ptr()], kind)
        return counts.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


# --- the interpreter, repaired ----------------------------------------------------------------------------------


def _watched(trace: Trace) -> dict[str, Any]:
    """Operations of the interpreter's builder that report to `trace` and repair what stock Triton gets wrong."""
    builder = stock.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    binary, cast, atomic = builder.binary_op, builder.cast_impl, builder.create_atomic_rmw

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        trace.access(ptrs.data, mask.data, _element_bytes(ptrs), store=False)
        return load(self, ptrs, mask, other, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        trace.access(ptrs.data, mask.data, _element_bytes(ptrs), store=True)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if value.dtype.scalar.is_floating():
            raise Fault("an atomic: it sums in an order that changes from run to run")
        trace.check(ptr.data, mask.data)
        return atomic(self, operation, ptr, value, mask, *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise Fault("arithmetic in bf16: convert to fp32 first")
        result = binary(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:  # a comparison, which would go by the type of what it compares
            result.dtype = tl.int1
        return result

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return stock.TensorHandle(rounded.view(torch.uint16).numpy(), target)
        if (source, target) == (tl.bfloat16, tl.float32):
            bits = np.ascontiguousarray(src.data).astype(np.uint32) << np.uint32(16)
            return stock.TensorHandle(bits.view(np.float32), target)
        return cast(self, src, dst_type)

    # A GPU's own drop a NaN beside a number; Triton's documents promise nothing else.
    def create_minnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return binary_op(self, lhs, rhs, np.fmin)

    def create_maxnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return binary_op(self, lhs, rhs, np.fmax)

    def create_clampf(self: Any, arg: Any, lowest: Any, highest: Any, propagate_nans: Any) -> Any:
        assert propagate_nans.name == "NONE"
        return binary_op(self, binary_op(self, arg, highest, np.fmin), lowest, np.fmax)

    return {name: value for name, value in locals().items() if hasattr(builder, name)}


def _log2_approx(x: Any) -> Any:
    """The processor's log2, as wrong as NVIDIA's manual for PTX allows: by 2^-22, outside [1/2, 2] relative."""
    exact = np.log2(x.astype(np.float64))
    rough = np.where(np.abs(exact) <= 1, np.floor(exact * 2**22) / 2**22, exact * (1 - 2**-22))
    return np.where(np.isfinite(exact), rough, exact).astype(np.float32)


_INSTRUCTIONS = {"lg2.approx.ftz.f32 $0, $1;": _log2_approx}


def _inline_asm_elementwise(asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any) -> Any:
    (x,) = args
    return tl.tensor(stock.TensorHandle(_INSTRUCTIONS[asm](x.handle.data), tl.float32), x.type)


def _generic_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """A reduction by a function of the kernel's own, halving the axis; stock Triton calls it once per element."""
    values = [np.moveaxis(value.handle.data, self.axis, 0) for value in inputs]
    types = [value.dtype for value in inputs]
    while (count := len(values[0])) > 1:
        assert count % 2 == 0, "Triton's axes are powers of two"
        halves = [
            self.to_tensor(v[part], t)
            for part in (slice(count // 2), slice(count // 2, None))
            for v, t in zip(values, types, strict=True)
        ]
        values = [result.handle.data for result in self.combine_fn(*halves)]
    return [self.to_tensor(value[0], dtype) for value, dtype in zip(values, types, strict=True)]


def _sum(self: Any, value: Any) -> Any:
    """`tl.sum` as GPUs add, halving the axis. NumPy adds an axis that is not the last one element after another."""
    values = np.moveaxis(value.handle.data, self.axis, 0)
    while (count := len(values)) > 1:
        assert count % 2 == 0, "Triton's axes are powers of two"
        values = values[: count // 2] + values[count // 2 :]
    return self.to_tensor(values[0], value.dtype)


def _element_bytes(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def _checked_multiple_of(value: Any, divisor: Any) -> Any:
    """A hint that lets the compiler widen loads; on a GPU a false one is a misaligned address."""
    if (value.handle.data % np.asarray(divisor).astype(value.handle.data.dtype)).any():
        raise Fault(f"{value.handle.data} is not a multiple of {divisor}")
    return value


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """`triton.language` acting on arrays. Stock Triton patches it at every call of a device function and not back."""
    scope = stock._LangPatchScope()
    try:
        for language in (tl, tl.core):
            stock._patch_builtin(language, stock.interpreter_builder, scope)
            stock._patch_builtin(language.tensor, stock.interpreter_builder, scope)
            stock._patch_lang_tensor(language.tensor, scope)
            scope.set_attr(language.tensor, "__index__", lambda self: int(self.handle.data.item()))
            stock._patch_lang_core(language, scope)
            scope.set_attr(language, "multiple_of", _checked_multiple_of)
            scope.set_attr(language, "inline_asm_elementwise", _inline_asm_elementwise)
        stock._patch_builtin(tl.math, stock.interpreter_builder, scope)
        yield
    finally:
        scope.restore()


def _argument(value: Any) -> Any:
    """As a kernel sees it. Stock Triton leaves a float Python's, whose arithmetic is float64 and not fp32."""
    if isinstance(value, float):
        return tl.tensor(stock.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    if isinstance(value, tuple):
        return stock._tuple_create(value, map(_argument, value))
    return stock._implicit_cvt(value)


@functools.cache
def _rewritten(function: Any) -> Any:
    """The Python function that interprets a kernel's."""
    return stock.InterpretedFunction(function).rewrite()


@contextmanager
def interpreted() -> Iterator[Trace]:
    """Within: kernels launched on CPU tensors are interpreted and traced."""
    trace = Trace()
    builder = stock.interpreter_builder

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        trace.begin((*args, *options.values()))
        names = [name for name in self.arg_names if name in options]
        bound = dict(zip(self.arg_names, args, strict=False)) | {name: options[name] for name in names}
        constant = {parameter.name for parameter in self.params if parameter.is_constexpr}
        values = {name: value if name in constant else _argument(value) for name, value in bound.items()}
        function = _rewritten(self.fn)
        builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
        with _interpreted_language(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            for index in np.ndindex(*builder.grid_dim):
                builder.set_grid_idx(*index)
                function(**values)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return _rewritten(self.fn)(*args, **options)

    checked = stock.InterpreterOptions(debug=True)  # index arithmetic that overflows raises
    with (
        mock.patch.multiple(stock.InterpreterBuilder, **_watched(trace)),
        mock.patch.object(builder, "options", checked),
        mock.patch.object(stock.ReduceOps, "generic_reduce", _generic_reduce),
        mock.patch.object(stock.ReduceOps, "sum", _sum),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "__call__", call),
        stand_in_driver(TARGETS["sm_90"]),
    ):
        yield trace
