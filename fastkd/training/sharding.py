"""A student whose weights are spread over processes by FSDP2, as accelerate is configured to: what it can learn by."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM

from fastkd.training.launcher import started
from fastkd.training.options import InputError, Options

__all__ = ["asked_for", "check_sharding", "is_sharded", "shard_frozen", "whole", "whole_state"]

#: Plugins of accelerate by the variables that `accelerate launch` sets.
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism within a batch",
}
_MODES = ("frozen", "cached", "mixture", "routed")  # whose teachers neither learn nor are copies of the student


def asked_for() -> bool:
    """Whether accelerate will shard the student."""
    return _set("ACCELERATE_USE_FSDP")


def check_sharding(options: Options, device: torch.device) -> None:
    """Raise InputError for what a run cannot do as accelerate is configured."""
    for name, what in _OTHERS.items():
        if started() > 1 and _set(name):
            raise InputError(f"accelerate is configured for {what} ({name}): fastkd distill takes DDP or FSDP2")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if started() > 1 and precision != "no" and not getattr(options.training, precision, False):
        raise InputError(
            f"accelerate is configured for mixed precision in {precision}, but the run's options are not: pass "
            "--bf16 or --fp16, and configure accelerate without (--mixed_precision no)"
        )
    if not asked_for():
        return
    if device.type == "cpu":
        raise InputError("accelerate is configured for FSDP, which it uses on GPUs alone: configure it without")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"accelerate is configured for FSDP {version}: set fsdp_version: 2 in its configuration")
    kept = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kept != "FULL_STATE_DICT":  # of others Trainer loses track of the best checkpoint
        raise InputError(
            f"accelerate is configured to keep a {kept}, of which the best one could not be loaded: set "
            "fsdp_state_dict_type: FULL_STATE_DICT in its configuration"
        )
    if _set("FSDP_CPU_RAM_EFFICIENT_LOADING"):  # which leaves models without weights in all processes but one
        raise InputError(
            "accelerate is configured to load weights in one process alone, but all of them judge the models: set "
            "fsdp_cpu_ram_efficient_loading: false in its configuration"
        )
    mode = options.teaching.teacher_mode
    if mode not in _MODES:
        raise InputError(f"teacher_mode is {mode!r}, but beside a sharded student teach: {', '.join(_MODES)}")
    if options.models.lora_rank:
        raise InputError(f"lora_rank is {options.models.lora_rank}, but adapters are not sharded: use DDP")


def is_sharded(model: Any) -> bool:
    """Whether FSDP2 holds parts of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard_frozen(model: Any, accelerator: Any) -> None:
    """Shard a model that is not trained as accelerate shards the student: its blocks, and what is around them.

    Each process then holds a part of it, and a block is whole while it runs; all processes must run it at once. A model
    that is in parts already, or whose weights are quantised or otherwise no plain parameters, stays as it is.
    """
    plain = all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in model.parameters())
    if not plain or getattr(model, "is_quantized", False) or is_sharded(model):
        return
    # Not accelerate's own function: that one shards by the student's classes, and keeps the head whole.
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in [*(module for module in model.modules() if type(module).__name__ in blocks), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole_state(model: Any) -> dict[str, Any]:
    """The state of a model; of a sharded one, whole, in the first process alone. All of them call this."""
    if not is_sharded(model):
        found: dict[str, Any] = model.state_dict()
        return found
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def whole(model: Any, device: torch.device) -> Any:
    """A model as one process has it: of a sharded one another, whole in every process. All of them call this."""
    if not is_sharded(model):
        return model
    state = whole_state(model)
    made = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False).to(device)
    if state:
        made.load_state_dict(state)
    for tensor in made.state_dict().values():
        dist.broadcast(tensor, 0)
    return made


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
