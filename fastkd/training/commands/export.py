"""`fastkd export`: a student in the format of where it will run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from fastkd import training
from fastkd.terms.multi_token import HEADS_FILE
from fastkd.training.configuration import Parser
from fastkd.training.options import InputError, at_home

__all__ = ["export", "run"]

_DESCRIPTION = """\
Write a student in the format of where it will run.

hf: as save_pretrained writes it. int4: likewise, linear layers in 4 bits (torchao; not for GPT-2s).
gguf: one file in fp32 that llama.cpp runs and transformers loads, of a GPT-2 or a Llama.

examples:
  fastkd export runs/demo --to gguf --output demo-gguf
"""


def run(arguments: Sequence[str]) -> None:
    """`fastkd export`."""
    parser = Parser("export", _DESCRIPTION, (), config=False)
    parser.add("student", metavar="STUDENT", help="directory of a finished run, or of any model with its tokenizer")
    parser.add("--to", choices=("hf", "int4", "gguf"), required=True, help="the format")
    parser.add("--output", metavar="DIRECTORY", required=True, help="a new directory")
    parser.add(
        "--heads", choices=("drop", "keep"), default="drop", help="multi-token heads beside the student (default: drop)"
    )
    (asked,) = parser.parse(arguments)
    export(
        at_home(asked.student, "STUDENT"), asked.to, at_home(asked.output, "--output"), keep_heads=asked.heads == "keep"
    )


def export(student: str, to: str, output: str, *, keep_heads: bool = False) -> None:
    """Write the model in the directory `student` to the new directory `output`.

    `hf`: as save_pretrained writes it. `int4`: likewise, with the weights of linear layers in 4 bits by torchao.
    `gguf`: one file, model.gguf. `keep_heads`: its multi-token heads too, as they are, not with `gguf`. Raises
    InputError, with nothing written, where that cannot be done.
    """
    if keep_heads and to == "gguf":
        raise InputError("gguf has no place for multi-token heads: --heads drop, or --to hf")
    if keep_heads and not (Path(student) / HEADS_FILE).is_file():
        raise InputError(f"{student} has no {HEADS_FILE}, so there are no heads to keep: leave --heads away")
    if Path(output).exists():
        raise InputError(f"{output} exists: name a new directory with --output")
    training.places.check_writable(output, "--output")
    try:
        config, tokenizer = (
            auto.from_pretrained(student, trust_remote_code=False)
            for auto in (transformers.AutoConfig, transformers.AutoTokenizer)
        )
        quantized = {"quantization_config": _four_bits(config), "device_map": "cpu"} if to == "int4" else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            student, dtype=torch.float32, trust_remote_code=False, **quantized
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise error if isinstance(error, InputError) else InputError(f"cannot load {student!r}: {error}") from error
    with _new_directory(Path(output)) as directory:
        if to == "gguf":
            try:
                from fastkd.training.gguf_file import write_gguf
            except ModuleNotFoundError as error:
                raise InputError("gguf is not installed: pip install 'fastkd[demo]'") from error
            write_gguf(model, tokenizer, directory / "model.gguf")
        else:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            if keep_heads:
                shutil.copyfile(Path(student) / HEADS_FILE, directory / HEADS_FILE)
    size = sum(path.stat().st_size for path in Path(output).iterdir())
    print(
        f"saved to {output}: {', '.join(sorted(path.name for path in Path(output).iterdir()))}; {size / 2**20:,.1f} MiB"
    )


def _four_bits(config: Any) -> Any:
    """Weights of 16 values, in groups of 32 with a scale each; the output head stays as it is."""
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    except ImportError as error:
        raise InputError(f"int4 needs torchao, which cannot be used: {error}; pip install 'fastkd[int4]'") from error
    if config.model_type == "gpt2":
        raise InputError("torchao quantises nn.Linear, and a GPT-2 is made of Conv1D: use --to gguf")
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))  # type: ignore[attr-defined]


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory that becomes `output` if the block succeeds, else goes away."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"cannot write to {output.parent}: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o755)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
