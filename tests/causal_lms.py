"""Small causal LMs of transformers, and what project() must make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.projection.models import project
from fastkd.sources import Projection

transformers = pytest.importorskip("transformers")

B, T, V, H = 2, 7, 61, 16

DECODER = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(model_type: str, **config: Any) -> Any:
    """A small float64 model with logits large enough for a softcap to bend."""
    try:
        settings = transformers.AutoConfig.for_model(model_type, **config)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}: {error}")
    model = transformers.AutoModelForCausalLM.from_config(settings).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def llama(**config: Any) -> Any:
    return build("llama", **DECODER, **config)


def batch(padding: str | None = None) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.randint(3, V, (B, T)), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    if padding is not None:
        inputs["attention_mask"][1, slice(0, 3) if padding == "left" else slice(T - 3, T)] = 0
    return inputs


def gradients(model: nn.Module, logits: Tensor, upstream: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    logits.backward(upstream)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same_gradients(ours: dict[str, Tensor | None], truth: dict[str, Tensor | None], tolerance: float = 1e-9) -> None:
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in truth.values())
    for name, expected in truth.items():
        gradient = ours[name]
        if expected is None or gradient is None:
            assert expected is gradient, name
        else:
            distance = (gradient - expected).abs().max()
            assert distance <= tolerance * (1 + expected.abs().max()), name


def agrees(model: Any, **inputs: Any) -> Projection:
    """Logits and every parameter's gradient are those of the model's own forward."""
    # A copy, without a cache: in transformers 4, RecurrentGemma keeps state, with its graph, between forwards.
    reference = copy.deepcopy(model)
    projection, expected = project(model, **inputs), reference(**inputs, use_cache=False).logits
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[expected.dtype]
    torch.testing.assert_close(projection.logits(), expected, rtol=tolerance, atol=tolerance)
    assert projection.shape == expected.shape
    upstream = torch.randn_like(expected)
    ours = gradients(model, projection.logits(), upstream)
    same_gradients(ours, gradients(reference, expected, upstream), tolerance)
    return projection
