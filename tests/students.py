"""Small models of many architectures to make students of, and how to look into them."""

from __future__ import annotations

import copy

import torch

from tests.causal_lms import DECODER, V, build

DEEP = {**DECODER, "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "gpt2": GPT2,
    "llama": {**DEEP, "tie_word_embeddings": True},  # as SmolLM2
    "qwen2": {**DEEP, "use_sliding_window": True, "sliding_window": 3, "layer_types": TYPES},
    "qwen3": DEEP,
    "gemma2": {**DEEP, "sliding_window": 3, "layer_types": TYPES},
    "gemma3_text": {**DEEP, "sliding_window": 3, "layer_types": TYPES},
    "mixtral": {**DEEP, "num_local_experts": 4},
    "qwen3_moe": {**DEEP, **EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen2_moe": {**DEEP, **EXPERTS, "shared_expert_intermediate_size": 12, "mlp_only_layers": [1]},
}


def tiny(kind):
    """In float32, which is what products of experts take."""
    return build(kind, **MODELS[kind]).float()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def blocks(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def skipping(model, left_out):
    """A copy with hooks that let the hidden states past these blocks."""
    model = copy.deepcopy(model)
    for index in left_out:
        blocks(model)[index].register_forward_hook(lambda module, given, kwargs, out: given[0], with_kwargs=True)
    return model


def shares_memory(first, second):
    return {one.data_ptr() for one in first.parameters()} & {one.data_ptr() for one in second.parameters()}
