"""A GPT-2 or Llama student as a GGUF file, which llama.cpp runs and transformers loads again.

Weights are written in fp32, as they are. What transformers makes of names and layouts when it reads such a file is
undone here: it transposes GPT-2's matrices and re-orders the rows of Llama's queries and keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from fastkd.training.options import InputError

__all__ = ["write_gguf"]

_ARCHITECTURES = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA}
#: Positions that transformers gives every GPT-2 it reads from a file, whatever the file says.
_GPT2_POSITIONS = 1024


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    """Write `model` with its byte-level BPE `tokenizer` to `path`.

    Raises InputError, before anything is written, for another architecture or tokenizer, and for what a file of these
    architectures cannot say.
    """
    config = model.config
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise InputError(f"a {kind} cannot be written as GGUF here, only {' and '.join(_ARCHITECTURES)}: use --to hf")
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(None, kind)
    (_describe_gpt2 if kind == "gpt2" else _describe_llama)(writer, config)
    writer.add_name("fastkd student")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    for name, values in vocabulary.items():
        getattr(writer, f"add_{name}")(values)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    for name, tensor in _tensors(model, kind):
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe_gpt2(writer: Any, config: Any) -> None:
    if config.n_positions > _GPT2_POSITIONS:
        raise InputError(
            f"the student has {config.n_positions} positions; transformers reads {_GPT2_POSITIONS} of a GPT-2 from a "
            "GGUF file: use --to hf"
        )
    if config.n_positions < _GPT2_POSITIONS:
        print(
            f"note: of the {_GPT2_POSITIONS} positions in the file, which readers of GPT-2 expect, only the first "
            f"{config.n_positions} were trained"
        )
    writer.add_context_length(_GPT2_POSITIONS)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _describe_llama(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or config.attention_bias or config.mlp_bias:
        raise InputError(
            f"the student has rotary positions {rope} and biases (attention {config.attention_bias}, MLP "
            f"{config.mlp_bias}), which GGUF files of Llamas cannot say here: use --to hf"
        )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _vocabulary(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """What the file says of the tokens, by the names of the writer's methods. Ids without a token get one."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(state.get("pre_tokenizer")):
        raise InputError(
            f"the tokenizer is a {state['model']['type']} model; only byte-level BPE, such as GPT-2's, can be written "
            "into a GGUF file: use --to hf"
        )
    by_id = {token: name for name, token in tokenizer.get_vocab().items()}
    special = {token["id"] for token in state["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    merges = state["model"]["merges"]
    return {
        "tokenizer_pre": "smollm" if "Digits" in json.dumps(state["pre_tokenizer"]) else "gpt-2",
        "token_list": [by_id.get(token, f"[PAD{token}]") for token in range(vocab_size)],
        "token_types": [
            kinds[token in special] if token in by_id else gguf.TokenType.UNUSED for token in range(vocab_size)
        ],
        "token_merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def _tensors(model: Any, kind: str) -> list[tuple[str, Tensor]]:
    """(name in the file, fp32 tensor) of each parameter; a tied output head is left out, which says that it is."""
    config = model.config
    names = gguf.get_tensor_name_map(_ARCHITECTURES[kind], config.num_hidden_layers)
    found = []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        mapped = names.get_name(stem)
        if mapped is None:
            raise InputError(f"GGUF has no name for the student's {name}: use --to hf")
        found.append(
            (f"{mapped}.{suffix}", _laid_out(mapped.rpartition(".")[2], tensor.detach().float().cpu(), config))
        )
    return found


def _laid_out(role: str, tensor: Tensor, config: Any) -> Tensor:
    if config.model_type == "gpt2":
        if role == "position_embd":
            return torch.nn.functional.pad(tensor, (0, 0, 0, _GPT2_POSITIONS - len(tensor)))
        matrices = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        return tensor.T if role in matrices and tensor.dim() == 2 else tensor
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(role)
    if heads is None:
        return tensor
    # Halves of a head's rows, as Hugging Face rotates them, become neighbours, as llama.cpp does.
    return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
