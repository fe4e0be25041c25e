"""What the optimizers and schedules of transformers' Trainer need, told before any work. Only the standard library."""

from __future__ import annotations

__all__ = ["OPTIMIZERS_WITH_ARGUMENTS", "OPTIMIZER_PACKAGES", "SCHEDULERS"]

#: The learning rate schedules of transformers that need no arguments of their own.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
)
#: Optimizers of transformers' Trainer → the package that has them.
OPTIMIZER_PACKAGES = {
    **dict.fromkeys(
        (
            *("adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit"),
            *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
            *("paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
        ),
        "bitsandbytes",
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), "schedulefree"),
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
}
#: Beginnings of the names of those that need arguments of their own.
OPTIMIZERS_WITH_ARGUMENTS = ("galore_", "apollo_", "lomo", "adalomo")
