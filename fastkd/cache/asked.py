"""What a caller asks of a cache: the settings of a new one, and what must agree with one that was begun.

None means "as the cache has it", or the default of a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastkd import arguments
from fastkd.cache.disk import CacheError
from fastkd.cache.manifest import VERSION, Manifest, Settings
from fastkd.cache.reader import check_weights

__all__ = ["check_extendable", "check_same", "check_shard_tokens", "new_settings", "packing"]

_DEFAULT_K = {"sampled": 12, "topk": 64}
_SHARD_TOKENS, _SHARD_BYTES = 1 << 17, 1 << 26  # by default, the fewer
_DENSE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def packing(format: str, packed: bool | None, dtype: torch.dtype | None) -> str | None:
    """None where it is not asked for."""
    if format != "dense":
        return None if packed is None else "packed" if packed else "plain"
    if dtype is not None and dtype not in _DENSE_DTYPES:
        raise ValueError(f"dtype of a dense cache must be torch.float16 or torch.bfloat16, got {dtype}")
    return None if dtype is None else _DENSE_DTYPES[dtype]


def check_shard_tokens(shard_tokens: int | None) -> None:
    """Raise ValueError for no number of tokens."""
    if shard_tokens is not None and arguments.integer("shard_tokens", shard_tokens) < 1:
        raise ValueError(f"shard_tokens must be > 0, got {shard_tokens}")


def new_settings(asked: Mapping[str, Any]) -> Settings:
    """The settings of a new cache. Raises TypeError or ValueError for wrong ones."""
    format, k = asked["format"], asked["k"]
    defaults: dict[str, Any] = {
        "packing": "float16" if format == "dense" else "packed",
        "k": _DEFAULT_K.get(format),
        "seed": 0,
        "shard_tokens": 0,
    }
    values: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in asked.items()}
    settings = Settings(**values)
    if format not in (*_DEFAULT_K, "dense"):
        raise ValueError(f"format must be 'sampled', 'topk' or 'dense', got {format!r}")
    arguments.temperature("temperature", settings.temperature)
    if format == "dense":
        if settings.temperature != 1 or k is not None:
            raise ValueError(
                f"a dense cache keeps all tokens at temperature 1, which serves any; got k={k} and "
                f"temperature={settings.temperature}"
            )
    elif arguments.integer("k", settings.k) < 1:
        raise ValueError(f"k must be an int ≥ 1, got {k!r}")
    if not 1 <= arguments.integer("vocab_size", settings.vocab_size) < 2**31:
        raise ValueError(f"vocab_size must be in [1, 2³¹), got {settings.vocab_size}")
    whole: dict[str, Any] = {
        name: arguments.integer(name, getattr(settings, name)) for name in ("vocab_size", "seed", "shard_tokens")
    }
    settings = replace(
        settings,
        temperature=float(settings.temperature),
        k=None if format == "dense" else arguments.integer("k", settings.k),
        **whole,
    )
    if asked["shard_tokens"] is None:
        fitting = max(1, _SHARD_BYTES // settings.records().size)
        settings = replace(settings, shard_tokens=min(_SHARD_TOKENS, fitting))
    return settings


#: What all rows of a cache have in common. Where a file ends and what a teacher is called are none of it.
_COMPARED = ("format", "packing", "k", "temperature", "vocab_size", "seed", "tokenizer")


def check_same(directory: Path, found: Manifest, asked: Mapping[str, Any]) -> None:
    """CacheError where the cache has another value than the one asked for; None is not compared."""
    for name in _COMPARED:
        _check_equal(directory, name, getattr(found.settings, name), asked.get(name))
    if asked.get("weights") is not None:
        check_weights(directory, found, asked["weights"])
    elif found.settings.weights is None:
        _check_equal(directory, "teacher", found.settings.teacher, asked.get("teacher"))


def _check_equal(directory: Path, name: str, found: Any, asked: Any) -> None:
    if asked is not None and asked != found:
        raise CacheError(
            f"{directory} was begun with {name}={found!r}, but {name}={asked!r} is asked for: "
            "write to another directory, or ask for the same"
        )


def check_extendable(directory: Path, found: Manifest, asked: Mapping[str, Any]) -> None:
    """CacheError where rows cannot be added because it is not known whose the others are."""
    if found.version != VERSION:
        raise CacheError(
            f"{directory} is a cache of format version {found.version}, which is read but not written to, since it "
            "does not say which weights its teacher had: write to another directory"
        )
    if found.settings.weights != asked["weights"]:
        begun, now = (
            "a model" if weights is not None else "a function without teacher_fingerprint"
            for weights in (found.settings.weights, asked["weights"])
        )
        raise CacheError(
            f"{directory} was begun by {begun} and would be continued by {now}, so it cannot be seen whether their "
            "weights are the same: give teacher_fingerprint=fastkd.cache.fingerprint(model), or write to another "
            "directory"
        )
