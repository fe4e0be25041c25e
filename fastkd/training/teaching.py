"""From options to who teaches, and to the terms of the loss beside the teacher's predictions and the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from fastkd import teachers
from fastkd.cache.fingerprints import fingerprint
from fastkd.teachers import TeacherMode
from fastkd.terms import Term, Terms
from fastkd.training import loading
from fastkd.training.arguments import courses, distillation_loss
from fastkd.training.setup import Setup
from fastkd.training.teaching_checks import asked_terms, input_error, more_teachers, multi_view, peer_of, snapshots

__all__ = ["fingerprints", "teacher_of", "terms_of"]


def teacher_of(setup: Setup, student: Any) -> TeacherMode:
    """The teacher that a run asks for. Models that it needs beside `setup.teacher` are loaded. Raises InputError."""
    mode = setup.options.teaching.teacher_mode
    return input_error(lambda: _MODES[mode](setup, student), f"teacher_mode {mode!r}")


def fingerprints(teacher: TeacherMode | None) -> dict[str, str]:
    """Of the models that a mode was given beside the one that judges, by names."""
    models: dict[Any, Any] = {} if teacher is None else teacher.__dict__.get("models", {})
    return {f"teacher_{place}": fingerprint(model) for place, model in enumerate(models.values(), 1)}


def terms_of(setup: Setup, student: Any, teacher: TeacherMode) -> list[Term]:
    """The terms that a run asks for, checked against the student and its teacher. Raises InputError."""
    terms = asked_terms(setup.options)
    checked = Terms(terms, student)
    mode = setup.options.teaching.teacher_mode
    input_error(lambda: teacher.check(student, checked.needs, setup.counted), f"teacher_mode {mode!r}")
    if "attentions" in checked.needs:  # fused ones return none
        models: list[Any] = [student, teacher.model]
        for model in filter(None, models):
            model.set_attn_implementation("eager")
    input_error(lambda: checked.check(student, teacher.model), "terms")
    return terms


def _online(setup: Setup, student: Any) -> TeacherMode:
    teacher = setup.teacher.float().requires_grad_(True)
    # What the judge knows of the teacher is its head too, and not a copy of it. The optimizer writes in place, so the
    # head that is trained gets memory of its own: cheaper than a second teacher.
    for weight in teacher.get_output_embeddings().parameters():
        weight.data = weight.data.clone()
    return teachers.Online(teacher, learning_rate=setup.options.teaching.teacher_learning_rate)


def _mutual(setup: Setup, student: Any) -> TeacherMode:
    wanted, models = setup.options.teaching, setup.options.models
    models = peer_of(models, wanted.peer) if wanted.peer else models
    config = loading.student_config(models, loading.vocabulary_size(student.config), setup.materials.tokenizer)
    transformers.set_seed(setup.options.training.seed + 1)  # or both would be the same, and stay it
    peer = loading.load_student(models, config, setup.materials.device)
    asked = setup.options.distillation
    kd = distillation_loss(asked, setup.counted)  # as the student's, and so it changes
    return teachers.Mutual(peer, kd, learning_rate=wanted.teacher_learning_rate, **courses(asked))


def _ema(setup: Setup, student: Any) -> TeacherMode:
    wanted = setup.options.teaching
    dtype = None if wanted.ema_dtype == "student" else getattr(torch, wanted.ema_dtype)
    return teachers.EMA(wanted.ema_decay, device=wanted.ema_device or None, dtype=dtype)


def _mixture(setup: Setup, student: Any) -> TeacherMode:
    return teachers.Mixed(_several(setup), setup.options.teaching.teacher_weights or None)


def _routed(setup: Setup, student: Any) -> TeacherMode:
    return teachers.Routed(_several(setup), column="corpus")


def _several(setup: Setup) -> list[Any]:
    return [
        setup.teacher,
        *(loading.load_teacher(models, setup.materials.device) for models in more_teachers(setup.options)),
    ]


_MODES: dict[str, Callable[[Setup, Any], TeacherMode]] = {
    "frozen": lambda setup, student: teachers.Frozen(setup.teacher),
    "cached": lambda setup, student: teachers.Cached(),
    "online": _online,
    "mutual": _mutual,
    "ema": _ema,
    "snapshot": lambda setup, student: snapshots(setup.options.teaching),
    "multi_view": lambda setup, student: multi_view(setup.options.teaching),
    "mixture": _mixture,
    "routed": _routed,
}
