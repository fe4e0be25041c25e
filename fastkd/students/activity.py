"""How active a model's channels, heads and neurons are on some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Activity", "observed"]


@dataclass(frozen=True)
class Activity:
    """Root mean squares over tokens, fp64 on the CPU."""

    channels: Tensor  # [H]: of the outputs of norms, summed over the norms
    inputs: dict[str, Tensor]  # [columns] of what enters a projection, by its name


@torch.no_grad()
def observed(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    norms: Mapping[str, nn.Module],
    projections: Mapping[str, nn.Module],
) -> Activity:
    """Run `model` over the batches, in eval mode; it is left in the mode it had.

    Raises ValueError for no batches or tokens, and for NaN or infinite activations.
    """
    sums: dict[str, Tensor] = {}
    counted: list[Tensor | None] = [None]  # the tokens of the batch that count
    hooks = [module.register_forward_hook(_output(sums, name, counted)) for name, module in norms.items()]
    hooks += [module.register_forward_pre_hook(_input(sums, name, counted)) for name, module in projections.items()]
    tokens, training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            counted[0] = None if mask is None else mask.bool()
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
            model.base_model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("batches have no tokens to measure activations on: give some")
    means = {name: (total / tokens).sqrt() for name, total in sums.items()}
    for name, mean in means.items():
        if not mean.isfinite().all():
            raise ValueError(f"activations of {name} are not finite on these batches")
    channels = torch.stack([means[name] for name in norms if name in means]).sum(0)
    return Activity(channels, {name: means[name] for name in projections if name in means})


def _output(sums: dict[str, Tensor], name: str, counted: list[Tensor | None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        _add(sums, name, output, counted[0])

    return hook


def _input(sums: dict[str, Tensor], name: str, counted: list[Tensor | None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _add(sums, name, inputs[0], counted[0])

    return hook


def _add(sums: dict[str, Tensor], name: str, values: Tensor, counted: Tensor | None) -> None:
    """Add the squares of `values [..., columns]`, of the tokens that count where there is a row for each."""
    rows = values.flatten(0, -2)
    if counted is not None and counted.numel() == len(rows):
        rows = rows[counted.flatten().to(rows.device)]
    square = rows.double().square().sum(0).cpu()
    sums[name] = sums[name] + square if name in sums else square
