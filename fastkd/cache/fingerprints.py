"""Fingerprints of a teacher's weights and of a tokenizer, which do not depend on names and paths."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "state_fingerprint", "tokenizer_fingerprint"]

_SAMPLED = 256  # values of a tensor
_STRIDE = 2654435761  # a prime near 2³² ÷ golden ratio, whose multiples spread over any number of values


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: 32 hexadecimal digits, equal where shapes and 256 values of every tensor are.

    Values are taken from all over a tensor, so that training any part of a tensor shows, and rounded to bfloat16:
    the fingerprint does not depend on the device, the directory's name, wrappers such as DistributedDataParallel, or
    on whether weights were loaded as float32 or bfloat16. It does depend on quantisation, and on float16 where
    weights were not saved in it. Offloaded weights count by their shapes. Takes 30 ms for 14 GB in memory.
    """
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Any]) -> str:
    """Of some of a model's weights, by name: what `fingerprint` says of a model that has them alone."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in state.values():
        if isinstance(tensor, Tensor):
            for part in _plain(tensor):
                digest.update(f"{tuple(part.shape)}:".encode())
                digest.update(_sampled(part))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of a transformers tokenizer's tokens and their ids: equal where every token has the same id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantised one is made of; itself where it is plain."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor.detach()


def _sampled(tensor: Tensor) -> bytes:
    if tensor.is_meta or tensor.numel() == 0:
        return b""
    places = _places(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        values = tensor.view(-1)[places].cpu()
    else:
        values = tensor[torch.unravel_index(places, tensor.shape)].cpu()
    if values.is_floating_point():
        return values.to(torch.float32).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached inference tensor would be of no use to a later call outside that mode
def _places(count: int) -> Tensor:
    """Of the values to look at among `count`: all of them, or some from everywhere."""
    places = torch.arange(min(count, _SAMPLED), dtype=torch.int64, device="cpu")
    return places if count <= _SAMPLED else places * _STRIDE % count
