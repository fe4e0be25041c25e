"""What is known of a row between its vocabulary tiles: memory for it, and its fields where ranks exchange them."""

from __future__ import annotations

import ctypes
import math
from typing import Literal

import torch
from torch import Tensor

from fastkd.divergences import of_spec
from fastkd.kernels.cpu.interface import RowState
from fastkd.rows import RowSpec, Stage, StateFields

__all__ = ["state_fields", "tile_state"]


def tile_state(rows: int, device: torch.device) -> Tensor:
    """See `fastkd.backend.Backend.tile_state`."""
    return torch.empty(rows, ctypes.sizeof(RowState), dtype=torch.uint8, device=torch.device("cpu"))


#: Of the divergences whose value needs no second sweep, the sums that it comes from.
_CROSS_SUMS = {
    "forward_kl": {"gap", "forward"},
    "reverse_kl": {"reverse"},
    "symmetric_kl": {"gap", "forward", "reverse"},
}


def state_fields(
    state: Tensor, spec: RowSpec, teacher: Literal["absent", "dense", "sparse"], hard: bool, stage: Stage
) -> StateFields:
    """See `fastkd.backend.Backend.state_fields`."""
    divergence = of_spec(spec.divergence, spec.parameters)
    names: set[str] = set()
    if stage == "terms":
        names = {"value", "total_g"}
    elif teacher == "sparse":
        names = {"student"}
    elif teacher == "dense" and not divergence.tempered:
        names = {"value"}
    elif teacher == "dense":
        names = {"teacher_max", "student", "teacher"}
        if divergence.normalised:
            names |= {"top_student", "top_teacher"}
        else:
            names = names.union(*(_CROSS_SUMS[part.name] for part, _ in divergence.parts))
    if stage == "statistics" and hard:
        names |= {"hard", "label_logit"}
    if names & {"student", "hard"}:
        names.add("student_max")
    found = {}
    for name, kind in RowState._fields_:
        if name in names:
            dtype = torch.float32 if kind is ctypes.c_float else torch.float64
            found[name] = state.view(dtype)[:, getattr(RowState, name).offset // dtype.itemsize]
    to_base_2 = math.log2(math.e)
    return StateFields(found, (to_base_2 / spec.temperature, to_base_2 / spec.teacher_temperature))
