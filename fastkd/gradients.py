"""Gradients that a caller may ask for and does not get: only the student has one, in reverse mode.

And what must not be where a gradient is written over the student's logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import sources
from fastkd.backend import warn_once
from fastkd.overlap import may_overlap_itself, may_share_memory
from fastkd.rows import row_layout
from fastkd.sources import Mixture, Projection, Source, Teacher, VocabShard

__all__ = ["check", "check_writable", "refuse_forward_mode"]


def check(student: Source, teacher: Teacher | None, weights: Tensor | None, num_items: float | Tensor | None) -> None:
    """Raise ValueError for weights that require a gradient, and as `refuse_forward_mode`; warn once for a teacher."""
    refuse_forward_mode(student, teacher, weights, num_items)
    if not torch.is_grad_enabled():
        return
    for name, value in (("weights", weights), ("num_items", num_items)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} requires a gradient, but losses give it none; pass {name}.detach()")
    if teacher is not None and _wants_gradient(teacher) and not torch.compiler.is_compiling():
        warn_once(
            "fastkd: the teacher requires a gradient, but losses give it none; compute it under torch.no_grad(), or "
            "pass teacher.detach()"
        )


def refuse_forward_mode(*inputs: Teacher | float | None) -> None:
    """Raise NotImplementedError where a tensor carries a tangent: the result would have none, which reads as 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for value in inputs:
        for tensor in sources.tensors(value) if isinstance(value, Teacher) else ():
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    "fastkd has no forward-mode derivatives (torch.func.jvp, torch.func.jacfwd, "
                    "torch.autograd.forward_ad); use reverse mode: loss.backward() or torch.autograd.grad"
                )


def _wants_gradient(teacher: Teacher) -> bool:
    """Of a projection only the hidden states count: a head that is not frozen is no sign of a mistake."""
    if isinstance(teacher, Projection):
        return teacher.hidden.requires_grad
    if isinstance(teacher, VocabShard):
        return _wants_gradient(teacher.source)
    if isinstance(teacher, Mixture):
        return any(_wants_gradient(member) for member in teacher.teachers)
    return any(tensor.requires_grad for tensor in sources.tensors(teacher))


def check_writable(student: Tensor, teacher: Teacher | None, labels: Tensor | None, weights: Tensor | None) -> None:
    """ValueError where the gradient cannot be written over the student's logits without harm to what is still read."""
    if type(student.grad_fn).__name__.startswith("_ToTorchTensor"):  # autograd lets nobody write over such a view
        raise ValueError("inplace=True cannot write over what to_local() gives of a DTensor: pass the DTensor itself")
    if row_layout(student) is None or may_overlap_itself(student):
        raise ValueError(
            f"inplace=True needs logits whose rows do not overlap and lie at regular strides, got shape "
            f"{tuple(student.shape)} with strides {student.stride()}; pass .contiguous() logits"
        )
    read = {"labels": [labels], "weights": [weights]}
    read["teacher"] = [] if teacher is None else list(sources.tensors(teacher))
    for name, tensors in read.items():
        if any(tensor is not None and may_share_memory(student, tensor) for tensor in tensors):
            raise ValueError(
                f"inplace=True would write the gradient over the {name}, which shares memory with the student's "
                f"logits; pass {name}.clone()"
            )
