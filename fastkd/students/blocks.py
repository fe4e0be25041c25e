"""The blocks of a transformers causal language model, and a model of another configuration with weights out of it.

Models are duck-typed; transformers is not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

__all__ = ["Cut", "blocks_of", "check_model", "made_of", "model_configuration", "whole"]

#: (module's name in the teacher, parameter's own name, the teacher's tensor, shape in the student) → the student's.
Cut = Callable[[str, str, Tensor, torch.Size], Tensor]


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError for what no student can be made of."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    if hasattr(model, "merge_and_unload"):
        raise TypeError(f"model is a {type(model).__name__} with adapters: pass model.merge_and_unload()")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{type(model).__name__} is an encoder-decoder; only decoders can be cut")
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({weight.dtype}): a student is made of floating-point weights. Load the model "
                "without quantization"
            )


def model_configuration(model: Any) -> Any:
    """A copy of the model's configuration, which says nothing of how its weights were stored."""
    config = deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    return config


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The name of the list of blocks in `model`, and the list. ValueError where it is not clear which one it is."""
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    nearest = min((name.count(".") for name, _ in found), default=0)
    outer = [(name, module) for name, module in found if name.count(".") == nearest]
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise ValueError(f"{type(model).__name__} should have one list of its {count} blocks; found {names}")
    return outer[0]


def whole(module: str, parameter: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """A cut that leaves all as it is."""
    return tensor


def made_of(model: Any, config: Any, source: Callable[[str], str] = str, cut: Cut = whole, *, copy: bool = True) -> Any:
    """A model of this configuration and of `model`'s class, mode and devices, with copies of `model`'s tensors.

    Args:
        source: the name of a module of the student → that of the teacher's, from which its tensors come.
        cut: what of a tensor is taken. Its result is copied; tensors that are tied in the teacher are tied again.
        copy: False leaves out the copy: for a model that is looked at, and not kept.

    Buffers that are not saved, such as Gemma's scale of embeddings, are those of the configuration: what is loaded from
    a saved student has these.

    Raises ValueError where a module or tensor is not there, or has another shape than the student's.
    """
    with _without_weights():
        student = type(model)(config)
    copies: dict[int, Any] = {}
    for name, module in student.named_modules():
        origin = source(name)
        try:
            theirs = model.get_submodule(origin)
        except AttributeError as error:
            raise ValueError(f"the student has {name}, but the teacher no {origin}") from error
        for kind in ("_parameters", "_buffers"):
            ours, given = getattr(module, kind), getattr(theirs, kind)
            wanted, found = ({key for key, tensor in one.items() if tensor is not None} for one in (ours, given))
            # Fewer buffers are enough: those of a kind of block that is left out.
            if not (wanted == found if kind == "_parameters" else wanted <= found):
                raise ValueError(
                    f"{name} of the student has {sorted(wanted)}, but {origin} of the teacher {sorted(found)}"
                )
            for key in sorted(wanted):
                if key in module._non_persistent_buffers_set:
                    ours[key] = ours[key].to(given[key].device, given[key].dtype)
                    continue
                if id(given[key]) not in copies:
                    taken = cut(origin, key, given[key].detach(), ours[key].shape)
                    if taken.shape != ours[key].shape:
                        raise ValueError(
                            f"{name}.{key} of the student is {list(ours[key].shape)}, but {origin}.{key} of the "
                            f"teacher gives {list(taken.shape)}"
                        )
                    taken = taken.clone(memory_format=torch.contiguous_format) if copy else taken
                    copies[id(given[key])] = nn.Parameter(taken) if kind == "_parameters" else taken
                ours[key] = copies[id(given[key])]
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = deepcopy(model.generation_config)
    return student.train(model.training)


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Models are made with their parameters on the meta device: no memory, and no random numbers of the training."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        handle.remove()
