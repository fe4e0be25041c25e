"""The student that options ask to be made from its teacher: its configuration before any work, then the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkd.students import keep_layers, narrow
from fastkd.students.width import narrowed_configuration
from fastkd.training import loading
from fastkd.training.options import InputError, ModelOptions

__all__ = ["cut_configuration", "cut_student"]

_WINDOWS = 32  # of the text to train on, over which activations are measured


def cut_configuration(options: ModelOptions, teacher: Any) -> Any:
    """The configuration of the student that `options` make of a teacher of this one.

    Raises InputError for blocks and widths that there cannot be.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(teacher, trust_remote_code=False)
        if options.student_layers:
            model = keep_layers(model, options.student_layers)
        return narrowed_configuration(model, options.student_width) if options.student_width else model.config
    except (ValueError, TypeError) as error:
        names = [f"{name} {value!r}" for name, value in _asked(options).items() if value]
        raise InputError(f"{' and '.join(names)}: no student can be made of {options.teacher!r}: {error}") from error


def cut_student(options: ModelOptions, teacher: Any, windows: Tensor, batch_size: int, device: torch.device) -> Any:
    """The student, in fp32 on `device`.

    Args:
        teacher: as `options` load it; None where it is not there any more. It is loaded for its weights then, and so
            is one that was quantised, on the CPU.
        windows: ids `[n, length]` to train on, of which the first rank the channels that a narrower student keeps.
    """
    if teacher is None or options.teacher_quantization != "none":
        whole = replace(options, teacher_quantization="none", teacher_dtype="float32")
        teacher = loading.load_teacher(whole, torch.device("cpu"))
    try:
        student = keep_layers(teacher, options.student_layers) if options.student_layers else teacher
        if options.student_width:
            batches = [{"input_ids": ids.to(student.device)} for ids in windows[:_WINDOWS].split(batch_size)]
            student = narrow(student, options.student_width, batches)
    except (ValueError, TypeError) as error:
        raise InputError(f"no student can be made of {options.teacher!r}: {error}") from error
    return student.float().to(device).requires_grad_(True)


def _asked(options: ModelOptions) -> dict[str, Any]:
    return {"student_layers": options.student_layers, "student_width": options.student_width}
