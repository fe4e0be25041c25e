"""Checks before training of what would waste an hour if it were wrong. Checks raise InputError, quoting both sides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from fastkd.terms import Term, terms_named
from fastkd.training import loading
from fastkd.training.options import InputError, ModelOptions, Options, named_terms

__all__ = [
    "asked_terms",
    "check_better",
    "check_context",
    "check_frozen",
    "check_teaching",
    "check_tokenizers",
    "common_vocabulary",
    "more_teachers",
]

SHOWN = 10  # rows of the table of differences


def check_frozen(teacher: nn.Module) -> None:
    """The teacher is in eval mode and has no trainable parameter."""
    trainable = sum(weight.numel() for weight in teacher.parameters() if weight.requires_grad)
    if teacher.training or trainable:
        mode = "training" if teacher.training else "eval"
        raise InputError(f"the teacher is in {mode} mode with {trainable:,} trainable parameters: freeze it")


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Both tokenizers give every token the same id; the message has a table of where they do not."""
    if teacher.eos_token_id is None:
        raise InputError("the teacher's tokenizer has no eos_token to separate documents with: set one")
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    order = sorted(theirs.keys() | ours.keys(), key=lambda token: theirs.get(token, ours.get(token, 0)))
    different = [token for token in order if theirs.get(token) != ours.get(token)]
    rows = [(repr(token), theirs.get(token, "–"), ours.get(token, "–")) for token in different[:SHOWN]]
    table = "\n".join(f"  {token:<24}{a!s:>10}{b!s:>10}" for token, a, b in (("token", "teacher", "student"), *rows))
    more = f"\n  and {len(different) - SHOWN:,} more" if len(different) > SHOWN else ""
    raise InputError(
        f"the tokenizers differ in {len(different):,} tokens (teacher {len(theirs):,}, student {len(ours):,}); a "
        f"teacher can only teach a student that numbers tokens as it does:\n{table}{more}\n"
        "Choose a student with the teacher's tokenizer, or pass --from-scratch"
    )


def common_vocabulary(teacher: Any, student: Any, tokenizer: Any) -> int | None:
    """How many ids count where the output heads of two configurations are padded differently; None: all of them."""
    theirs, ours = loading.vocabulary_size(teacher), loading.vocabulary_size(student)
    for name, size in (("teacher", theirs), ("student", ours)):
        if size < len(tokenizer):
            raise InputError(
                f"the {name}'s vocabulary has {size} ids, but the tokenizer {len(tokenizer)} tokens: they are no pair"
            )
    return None if theirs == ours else len(tokenizer)


def check_context(max_length: int, **configs: Any) -> None:
    """The windows fit the positions of each model, where these are limited."""
    for name, config in configs.items():
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise InputError(
                f"max_length {max_length} is more than the {name}'s {positions} positions: lower --max-length"
            )


def check_better(teacher_loss: float, student_loss: float) -> None:
    """The teacher predicts held-out text better than the student does, before it teaches."""
    if not teacher_loss < student_loss:
        raise InputError(
            f"the teacher's perplexity on held-out text is {math.exp(teacher_loss):,.1f}, the student's before "
            f"training {math.exp(student_loss):,.1f}: such a teacher has nothing to teach. "
            "Check that it fits the text and that its weights were loaded, or choose another"
        )


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
    if mode != "frozen" and not options.learns:
        raise InputError(f"teacher_mode is {mode!r}, but soft_weight is 0 and there are no terms: nothing is taught")
    every, steps, epochs = wanted.snapshot_every, options.training.max_steps, options.training.epochs
    never = every >= steps if every and steps else not every and epochs is not None and epochs <= 1
    if mode == "snapshot" and never:
        raise InputError(
            f"teacher_mode is 'snapshot' with one every {every or 'epoch'}, but the run ends no later than the first: "
            "the student's own start would teach it to the end. Lower --snapshot-every, or train longer"
        )
    for term in asked_terms(options):
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
    if mode == "mutual" and not wanted.peer and not loading.from_scratch(options.models):
        raise InputError(
            "teacher_mode is 'mutual', but the student starts from weights, and two of the same would stay the same: "
            "name another peer"
        )
    for models in more_teachers(options):
        check_tokenizers(loading.load_tokenizer(models.teacher), tokenizer)
        check_context(options.data.max_length, teacher=loading.teacher_config(models.teacher))


def asked_terms(options: Options) -> list[Term]:
    """The terms that are asked for, not yet checked against models. Raises InputError."""
    try:
        return terms_named(named_terms(options.teaching.terms))
    except (ValueError, TypeError) as error:
        raise InputError(f"terms: {error}") from error


def more_teachers(options: Options) -> list[ModelOptions]:
    """What loads each of the teachers after the first."""
    return [replace(options.models, teacher=name) for name in options.teaching.more_teachers]
