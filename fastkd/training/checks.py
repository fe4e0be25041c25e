"""Checks before training of what would waste an hour if it were wrong. Checks raise InputError, quoting both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastkd.training import loading
from fastkd.training.options import InputError

__all__ = [
    "check_better",
    "check_context",
    "check_frozen",
    "check_tokenizers",
    "common_vocabulary",
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


def common_vocabulary(configs: Mapping[str, Any], tokenizer: Any) -> int | None:
    """How many ids count where the output heads of models are padded differently; None: all of them.

    `configs`: what each model is called in a message → its configuration.
    """
    sizes = {name: loading.vocabulary_size(config) for name, config in configs.items()}
    for name, size in sizes.items():
        if size < len(tokenizer):
            raise InputError(
                f"the {name}'s vocabulary has {size} ids, but the tokenizer {len(tokenizer)} tokens: they are no pair"
            )
    return None if len(set(sizes.values())) == 1 else len(tokenizer)


def check_context(max_length: int, configs: Mapping[str, Any]) -> None:
    """The windows fit the positions of each model, by what it is called, where these are limited."""
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
