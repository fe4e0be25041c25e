"""What the commands beside `fastkd distill` can be asked on top of its options. As there, only the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastkd.training.options import (
    DistillationOptions,
    InputError,
    at_least,
    check_finite,
    check_kept,
    expand_home,
    option,
)

__all__ = ["CacheOptions", "InspectOptions", "SweepOptions"]


@dataclass(frozen=True)
class SweepOptions:
    """The grid of `fastkd sweep`, in the place of DistillationOptions; every cell trains one student."""

    _argument_group_name: ClassVar[str] = "sweep"

    alpha: list[float] = option([0.0, 0.5, 1.0], "weights to try; alpha_on says of which loss, the other has the rest")
    alpha_on: Literal["soft", "hard"] = option("soft", "the loss that alpha multiplies")
    temperature: list[float] = option([1.0, 2.0, 4.0], "temperatures of the soft loss to try")
    divergence: str = option("forward_kl", "forward_kl, reverse_kl, jsd, ...: the names of fastkd's table")
    cache_dir: str = option("", "directory of caches, one for each temperature")
    cache_format: Literal["sampled", "topk"] = option("sampled", "what a cache keeps of each prediction")
    cache_tokens: int | None = option(None, "tokens that a cache keeps of each prediction [sampled: 12, topk: 64]")

    def __post_init__(self) -> None:
        expand_home(self, "cache_dir")

    def cells(self) -> list[DistillationOptions]:
        """One of each: without a soft loss there is no temperature. Raises InputError for impossible values."""
        found: dict[tuple[tuple[float, float], float | None], DistillationOptions] = {}
        for alpha in self.alpha:
            for temperature in self.temperature:
                cell = DistillationOptions(
                    temperature=temperature,
                    alpha=alpha,
                    alpha_on=self.alpha_on,
                    divergence=self.divergence,
                    cache_dir=f"{self.cache_dir}/temperature-{temperature:g}" if self.cache_dir else "",
                    cache_format=self.cache_format,
                    cache_tokens=self.cache_tokens,
                )
                found.setdefault((cell.weights, temperature if cell.needs_teacher else None), cell)
        return list(found.values())


@dataclass(frozen=True)
class CacheOptions:
    """What `fastkd cache write` keeps, and where."""

    _argument_group_name: ClassVar[str] = "cache"

    output: str = option("runs/cache", "directory of the cache; a write that was stopped goes on there")
    documents: Literal["train", "all"] = option(
        "train", "train: those that fastkd distill trains on with the same data and seed; all: all"
    )
    temperature: float = option(1.0, "temperature of the training the cache is for")
    cache_format: Literal["sampled", "topk", "dense"] = option("sampled", "what is kept of each prediction", "format")
    cache_tokens: int | None = option(None, "tokens that are kept of each prediction [sampled: 12, topk: 64]", "k")
    plain: bool = option(False, "store exact numbers: 8 bytes per kept token rather than 3 or 4")
    batch_size: int = option(8, "windows per forward pass of the teacher")
    shard_tokens: int | None = option(
        None, "tokens per file: a stopped write computes the last, unfinished one again [16,384, or fewer if dense]"
    )
    seed: int = option(0, "seed of the split and of the samples")

    def __post_init__(self) -> None:
        expand_home(self, "output")
        check_finite(self)
        at_least(self, batch_size=1)
        check_kept(self.cache_format, self.cache_tokens)
        if self.plain and self.cache_format == "dense":
            raise InputError("plain is set, but a dense cache stores 16 bits of every token: leave one of them away")
        if self.shard_tokens is not None:
            at_least(self, shard_tokens=1)
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be above 0")


@dataclass(frozen=True)
class InspectOptions:
    """What `fastkd inspect-teacher` looks at."""

    _argument_group_name: ClassVar[str] = "inspection"

    prompts: list[str] = option(
        ["This movie was one of the best", "I would not recommend this film to anyone"],
        "texts whose last token is to be predicted from the others",
    )
    top_k: int = option(10, "tokens to show of each prediction")
    temperatures: list[float] = option([0.5, 1.0, 2.0, 5.0, 10.0], "temperatures to compare")
    plot: str = option("", "a .png file to draw the last prompt's distributions at these temperatures into")

    def __post_init__(self) -> None:
        expand_home(self, "plot")
        at_least(self, top_k=1)
        for temperature in self.temperatures:
            if not temperature > 0:
                raise InputError(f"temperatures has {temperature}; they must be above 0")
        if self.plot and not self.plot.endswith(".png"):
            raise InputError(f"plot is {self.plot!r}; name a .png file")
