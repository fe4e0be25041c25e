"""Mixed precision where nobody chose one: bfloat16 on a CPU whose units for it make products faster."""

from __future__ import annotations

from dataclasses import replace

from fastkd.kernels.cpu import products
from fastkd.training.loading import device_of
from fastkd.training.options import Options
from fastkd.training.run import started_with

__all__ = ["decided"]


def decided(options: Options) -> Options:
    """The options with a `bf16` that is True or False; says so where it becomes True unasked.

    A run that is resumed keeps what it was started with: another race, or another device, might decide otherwise.
    """
    training = options.training
    if training.bf16 is not None:
        return options
    kept = started_with(options).get("bf16")
    if kept is not None:
        return options._replace(training=replace(training, bf16=kept))
    on_cpu = device_of(options.models).type == "cpu"
    bf16 = on_cpu and not training.fp16 and products.gains_in_torch()
    if bf16:
        print("training in mixed precision: products of bfloat16 are faster here (--bf16 false keeps fp32)")
    return options._replace(training=replace(training, bf16=bf16))
