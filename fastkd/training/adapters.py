"""Low-rank adapters (PEFT) of a student: refused where they cannot be merged, trained, and merged with proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkd.training.evaluation import exact_logits, predict
from fastkd.training.options import InputError, ModelOptions

__all__ = ["adapt", "check_adapters", "merged"]

_ROUNDING = 1e-3  # of the largest logit: fp32 sums in another order stay far below, a layer merged wrongly far above


def adapt(student: Any, options: ModelOptions) -> Any:
    """`student` with the adapters that were asked for, the only weights that train; itself without any.

    Raises InputError for layers that are not there, that PEFT cannot adapt, or whose adapters could not be merged.
    """
    if not options.lora_rank:
        return student
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise InputError("lora_rank needs peft: pip install 'fastkd[train]'") from error
    targets = options.lora_targets or None
    lora = LoraConfig(task_type="CAUSAL_LM", r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets)
    head = student.get_output_embeddings()
    users = _users(student)
    try:
        adapted = get_peft_model(student, lora)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"cannot adapt {options.student!r}: {error}; name layers with --lora-targets") from error
    for name, module in adapted.get_base_model().named_modules():
        if not hasattr(module, "get_base_layer"):
            continue
        base = module.get_base_layer()
        sharing = {user for weight in base.parameters(recurse=False) for user in users[id(weight)]} - {name}
        if sharing:
            raise InputError(
                f"lora_targets {options.lora_targets} adapt {name!r}, whose weight is also that of {_quoted(sharing)}: "
                "an adapter of one layer cannot be merged into a weight that two share. Leave it out, or give a "
                'student whose weights are not tied ("tie_word_embeddings": false in its config.json, saved with both '
                "weights)"
            )
        if base is head:
            raise InputError(
                f"lora_targets {options.lora_targets} adapt {name!r}, the output head, whose product is part of the "
                "fused loss, which knows no adapters: leave it out, or train all weights with --lora-rank 0"
            )
    return adapted


def check_adapters(options: ModelOptions, config: Any) -> None:
    """Refuse adapters as `adapt` does, on a student of this configuration that has no weights. Raises InputError."""
    if options.lora_rank:
        with torch.device("meta"):
            adapt(AutoModelForCausalLM.from_config(config, trust_remote_code=False), options)


def merged(student: Any, windows: Tensor, directory: Path, *, saves: bool = True) -> Any:
    """A student as a plain transformers model, its adapters merged into it. Of several processes the first one saves.

    `windows` [n, length] are ids that it is run on before and after. Where its logits are not the same but for
    rounding, InputError is raised; the adapters, which are saved in `directory`/adapter first, are still there.
    """
    if not hasattr(student, "merge_and_unload"):
        return student
    folder = directory / "adapter"
    if saves:
        student.save_pretrained(folder, save_embedding_layers=False)  # "auto" may ask the Hub
    before = _logits(student, windows)
    whole = student.merge_and_unload()
    apart, largest = (_logits(whole, windows) - before).abs().max().item(), before.abs().max().item()
    if not apart <= _ROUNDING * max(largest, 1.0):
        raise InputError(
            f"merging the adapters changes the student: its logits are up to {apart:.3g} apart, of {largest:.3g}. "
            f"It was not saved; its adapters are in {folder} (peft.PeftModel.from_pretrained(student, {str(folder)!r}) "
            "loads them). Adapt other layers with --lora-targets"
        )
    return whole


@torch.no_grad()
def _logits(model: Any, windows: Tensor) -> Tensor:
    """fp32 [rows, V], of the first rows of `windows`."""
    found = predict(model, windows, len(windows))
    logits, _ = next(next(found.batches(windows)))
    return exact_logits(logits)


def _users(model: Any) -> dict[int, set[str]]:
    """The modules that hold each parameter itself, by its id: more than one where weights are tied."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for weight in module._parameters.values():
            if weight is not None:
                users.setdefault(id(weight), set()).add(name)
    return users


def _quoted(names: set[str]) -> str:
    return " and ".join(repr(name) for name in sorted(names))
