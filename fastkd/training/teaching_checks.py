"""Checks of who teaches and of terms, before any work. Checks raise InputError."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from fastkd import teachers
from fastkd.divergences import resolve
from fastkd.terms import Term, Terms, terms_named
from fastkd.training import checks, loading, sharding
from fastkd.training.arguments import steps_and_epochs
from fastkd.training.options import InputError, ModelOptions, Options, TeachingOptions, named_terms

__all__ = [
    "asked_terms",
    "check_length",
    "check_teaching",
    "check_terms",
    "input_error",
    "more_teachers",
    "multi_view",
    "others",
    "peer_of",
    "snapshots",
]

Result = TypeVar("Result")


def check_teaching(options: Options, tokenizer: Any) -> None:
    """What can be seen of a run's teachers before any work. Raises InputError."""
    wanted, mode, cache = options.teaching, options.teaching.teacher_mode, options.distillation.cache_dir
    if mode == "cached" and not cache:
        raise InputError("teacher_mode is 'cached', but there is no cache_dir: name a directory for the predictions")
    if cache and mode not in ("frozen", "cached"):
        raise InputError(f"teacher_mode is {mode!r}, whose predictions change or are of several: take cache_dir away")
    if mode == "online" and options.models.teacher_quantization != "none":
        raise InputError(
            "teacher_mode is 'online', but a quantised teacher cannot be trained: --teacher-quantization none"
        )
    soft, terms = options.distillation.weights[0], asked_terms(options)
    if mode != "frozen" and not (options.distillation.needs_teacher or any(term.needs_teacher for term in terms)):
        raise InputError(
            f"teacher_mode is {mode!r}, but soft_weight is 0 and no term learns from a teacher: nothing is taught"
        )
    if options.distillation.needs_teacher:
        divergence = resolve(options.distillation.divergence)
        input_error(lambda: teachers.MODES[mode].check_loss(divergence), f"teacher_mode is {mode!r}")
    for term in terms:
        if cache and term.needs:
            raise InputError(
                f"the term {term.name!r} needs the teacher's {' and '.join(term.needs)}, which no cache has: take "
                "cache_dir away"
            )
    corpora = 1 + len(options.data.mix_data)
    if mode == "routed" and corpora != 1 + len(wanted.more_teachers):
        raise InputError(
            f"teacher_mode is 'routed', but there are {1 + len(wanted.more_teachers)} teachers for {corpora} corpora: "
            "name one for each, in the order of data and mix_data"
        )
    if mode == "mutual" and not soft:
        raise InputError("teacher_mode is 'mutual', but soft_weight is 0 at first: the peer would learn nothing")
    if mode == "mutual" and not wanted.peer and (options.models.cut or not loading.from_scratch(options.models)):
        raise InputError(
            "teacher_mode is 'mutual', but the student starts from weights, and two of the same would stay the same: "
            "name another peer"
        )
    if mode in ("mutual", "ema") and options.models.lora_rank:
        raise InputError(f"teacher_mode is {mode!r}, which cannot save adapters beside the student's: lora_rank 0")
    _check_named(options, tokenizer)
    for models in more_teachers(options):
        checks.check_tokenizers(loading.load_tokenizer(models.teacher), tokenizer)


def _check_named(options: Options, tokenizer: Any) -> None:
    """What options of modes name is there."""
    wanted = options.teaching
    if wanted.teacher_mode == "multi_view":
        input_error(lambda: multi_view(wanted), "views")
    if wanted.ema_device:
        input_error(
            lambda: torch.empty(0, dtype=torch.float32, device=wanted.ema_device),
            f"ema_device is {wanted.ema_device!r}",
        )
    if wanted.peer:
        peer = peer_of(options.models, wanted.peer)
        checks.check_tokenizers(tokenizer, loading.student_tokenizer(peer, tokenizer))


def check_length(options: Options, windows: int) -> None:
    """A training on so many windows is long enough for its teacher. Raises InputError."""
    wanted = options.teaching
    if wanted.teacher_mode == "snapshot":
        steps, epochs = steps_and_epochs(options.training, windows)
        what = f"teacher_mode is 'snapshot' and snapshot_every {wanted.snapshot_every}"
        input_error(lambda: snapshots(wanted).begin(steps, epochs), what)


def check_terms(options: Options, student: Any, teacher: Any, tokenizer: Any) -> None:
    """Terms and mode serve models of these configurations, made without weights. Raises InputError."""
    wanted, terms = options.teaching, asked_terms(options)
    views = multi_view(wanted) if wanted.teacher_mode == "multi_view" else None
    if options.distillation.cache_dir or not (terms or views):
        return
    if wanted.more_teachers and any(term.needs for term in terms):
        raise InputError(f"teacher_mode is {wanted.teacher_mode!r}, and the terms need features of one teacher")
    needs = {need for term in terms for need in term.needs}
    if wanted.of_itself:
        teacher = student
    teacher = others(options, student, tokenizer).get("peer", teacher)
    settings = {"attn_implementation": "eager"} if "attentions" in needs else {}
    with torch.device("meta"):
        ours, theirs = (
            AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False, **settings)
            for config in (student, teacher)
        )
        if views is not None:
            input_error(lambda: views.check(ours, tuple(needs)), "teacher_mode is 'multi_view'")
        checked = Terms(terms, ours)
        input_error(lambda: checked.check(ours, theirs), "terms")
        if sharding.asked_for() and checked.trained:
            raise InputError("terms with parameters of their own cannot be trained beside a sharded student: use DDP")


def asked_terms(options: Options) -> list[Term]:
    """The terms that are asked for, not yet checked against models. Raises InputError."""
    found = input_error(lambda: terms_named(named_terms(options.teaching.terms)), "terms")
    input_error(lambda: Terms(found), "terms")  # refuses two of one name
    return found


def more_teachers(options: Options) -> list[ModelOptions]:
    """What loads each of the teachers after the first."""
    return [replace(options.models, teacher=name) for name in options.teaching.more_teachers]


def multi_view(wanted: TeachingOptions) -> teachers.MultiView:
    """The mode of this name. Raises ValueError for views that are none."""
    return teachers.MultiView(wanted.views) if wanted.views else teachers.MultiView()


def snapshots(wanted: TeachingOptions) -> teachers.Snapshot:
    """The mode `snapshot`."""
    return teachers.Snapshot(wanted.snapshot_every or "epoch")


def others(options: Options, student: Any, tokenizer: Any) -> dict[str, Any]:
    """Configurations of the models beside the teacher that judges and the student, by what they are called."""
    named = enumerate(more_teachers(options), 2)
    found = {f"teacher {number}": loading.teacher_config(models.teacher) for number, models in named}
    if options.teaching.peer:
        models = peer_of(options.models, options.teaching.peer)
        found["peer"] = loading.student_config(models, loading.vocabulary_size(student), tokenizer)
    return found


def peer_of(models: ModelOptions, peer: str) -> ModelOptions:
    """What loads the second student."""
    return replace(models, student=peer, student_layers="", student_width=0, from_scratch=False, lora_rank=0)


def input_error(work: Callable[[], Result], what: str) -> Result:
    """`work()`. Raises InputError, which begins with `what`, where it cannot mean what it was given."""
    try:
        return work()
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(str(error) if isinstance(error, InputError) else f"{what}: {error}") from error
