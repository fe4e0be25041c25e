"""The loss of the logits, and the cache it may learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastkd import served
from fastkd.divergences import resolve
from fastkd.training.options.base import InputError, Schedule, check_finite, check_temperatures, expand_home, option

__all__ = ["DistillationOptions", "check_kept"]


@dataclass(frozen=True)
class DistillationOptions:
    """The loss: soft_weight · T² · D(teacher ‖ student) + hard_weight · cross-entropy, over the course of training."""

    _argument_group_name: ClassVar[str] = "distillation"

    temperature: float = option(1.0, "temperature of the soft loss, on both sides; short runs learn fastest at 1")
    soft_weight: float | None = option(None, "weight of the teacher's divergence; 0 trains on the labels alone [0.5]")
    hard_weight: float | None = option(None, "weight of the labels' cross-entropy [0.5]")
    alpha: float | None = option(
        None, "one weight for both: this on the loss that alpha_on names, the rest on the other"
    )
    alpha_on: Literal["soft", "hard"] | None = option(
        None, "the loss that alpha multiplies; published recipes mean either"
    )
    divergence: str = option(
        "forward_kl", "forward_kl, reverse_kl, jsd, ...: a name of fastkd's table, or a sum: forward_kl:0.5+tvd:0.5"
    )
    temperature_schedule: Schedule = option("constant", "how temperature goes to final_temperature")
    final_temperature: float | None = option(None, "temperature of the last step")
    weight_schedule: Schedule = option("constant", "how soft_weight goes to final_soft_weight")
    final_soft_weight: float | None = option(
        None, "soft_weight of the last step; hard_weight changes the other way, so that their sum stays"
    )
    cache_dir: str = option(
        "", "directory of a cache of the teacher's predictions: written first if it is not there, then trained from"
    )
    cache_format: Literal["sampled", "topk", "dense"] | None = option(
        None, "what a cache keeps of each prediction [sampled, or dense where cache_precision is given]"
    )
    cache_tokens: int | None = option(None, "tokens that a cache keeps of each prediction [sampled: 12, topk: 64]")
    cache_precision: Literal["fp16", "bf16", "float16", "bfloat16"] | None = option(
        None, "what a dense cache stores; the others have an encoding of their own"
    )

    def __post_init__(self) -> None:
        expand_home(self, "cache_dir")
        spelt = {"float16": "fp16", "bfloat16": "bf16"}.get(str(self.cache_precision), self.cache_precision)
        object.__setattr__(self, "cache_precision", spelt)
        check_finite(self)
        self._resolve_weights()
        for name in ("soft_weight", "hard_weight", "final_soft_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} is {value}; it must be at least 0")
        check_temperatures(self, "temperature", "final_temperature")
        if self.soft_weight == self.hard_weight == 0:
            raise InputError("soft_weight and hard_weight are both 0: there is nothing to learn")
        for schedule, final in (("temperature", "final_temperature"), ("weight", "final_soft_weight")):
            shape, end = getattr(self, f"{schedule}_schedule"), getattr(self, final)
            if (shape == "constant") != (end is None):
                raise InputError(
                    f"{schedule}_schedule is {shape!r} and {final} is {end}: a schedule needs both, a constant neither"
                )
        if self.final_soft_weight is not None and self.final_soft_weight > self.total_weight:
            raise InputError(
                f"final_soft_weight {self.final_soft_weight} is more than soft_weight + hard_weight, "
                f"{self.total_weight}: hard_weight would be negative"
            )
        if self.cache_format is None:
            object.__setattr__(self, "cache_format", "dense" if self.cache_precision else "sampled")
        if self.cache_precision and self.cache_format != "dense":
            raise InputError(
                f"cache_precision is {self.cache_precision!r}, but cache_format is {self.cache_format!r}, which has an "
                "encoding of its own: leave one of them away"
            )
        check_kept(self.cache_format, self.cache_tokens)
        if self.cache_dir and self.needs_teacher:
            self._check_served()

    def _check_served(self) -> None:
        """What the cache keeps must be what the loss needs."""
        kind = served.FORMATS[str(self.cache_format)]
        try:
            reason = served.refusal(kind, resolve(self.divergence))
        except ValueError as error:
            raise InputError(str(error)) from error
        if reason is not None:
            raise InputError(
                f"divergence is {self.divergence!r}, which a {self.cache_format} cache cannot serve: {reason}; or take "
                "cache_dir away"
            )
        if not served.SERVES[kind].any_temperature and self.temperature_schedule != "constant":
            raise InputError(
                f"temperature_schedule is {self.temperature_schedule!r}, but a {self.cache_format} cache holds the "
                "teacher at one temperature: take cache_dir away, or the schedule"
            )

    def _resolve_weights(self) -> None:
        """Put numbers where soft_weight and hard_weight are None; alpha and alpha_on become None."""
        soft, hard = self.soft_weight, self.hard_weight
        if self.alpha is not None:
            if self.alpha_on is None:
                raise InputError(
                    f"alpha {self.alpha} is given without alpha_on: recipes mean opposite things by it. "
                    "Set alpha_on to soft or hard, or give soft_weight and hard_weight"
                )
            if soft is not None or hard is not None:
                raise InputError("alpha and soft_weight or hard_weight contradict each other: give one or the others")
            if not 0 <= self.alpha <= 1:
                raise InputError(f"alpha is {self.alpha}; it must be in [0, 1]")
            soft, hard = self.alpha, 1 - self.alpha
            if self.alpha_on == "hard":
                soft, hard = hard, soft
        elif self.alpha_on is not None:
            raise InputError(f"alpha_on is {self.alpha_on!r}, but there is no alpha: give both or neither")
        resolved = {"soft_weight": 0.5 if soft is None else soft, "hard_weight": 0.5 if hard is None else hard}
        for name, value in {**resolved, "alpha": None, "alpha_on": None}.items():
            object.__setattr__(self, name, value)

    @property
    def weights(self) -> tuple[float, float]:
        """(soft, hard) at the first step."""
        assert self.soft_weight is not None
        assert self.hard_weight is not None
        return self.soft_weight, self.hard_weight

    @property
    def total_weight(self) -> float:
        return sum(self.weights)

    @property
    def needs_teacher(self) -> bool:
        """Whether any step learns from the teacher."""
        return self.weights[0] > 0 or bool(self.final_soft_weight)


def check_kept(cache_format: str | None, cache_tokens: int | None) -> None:
    """A cache keeps at least one token of a prediction, and a dense one all of them."""
    if cache_tokens is None:
        return
    if cache_tokens < 1:
        raise InputError(f"cache_tokens is {cache_tokens}; it must be at least 1")
    if cache_format == "dense":
        raise InputError(f"cache_tokens is {cache_tokens}, but a dense cache keeps all tokens: leave one of them away")
