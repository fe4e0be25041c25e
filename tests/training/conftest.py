"""A teacher made on the spot, and text that it wrote itself: so it knows the text better than any student."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.training.options import (
    DataOptions,
    DistillationOptions,
    EvaluationOptions,
    ModelOptions,
    Options,
    TrainingOptions,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

TEXT = "the film was a slow and quiet story of two old friends who lost their way home in snow"
WORDS = TEXT.split()
CONTEXT = 16
STUDENT = {"model_type": "gpt2", "n_positions": CONTEXT, "n_embd": 32, "n_layer": 1, "n_head": 2}
STUDENT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: Files of tests whose runs draw their figures, which take more than half of a short run's time.
DRAWING = ("test_commands", "test_distill", "test_mixing", "test_report", "test_report_page")


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Elsewhere pages have none. The patch is its own: tests undo theirs halfway."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in DRAWING:
            patch.setattr("fastkd.training.report_page.inline_svg", lambda *_: "")
        yield


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama `teacher`, its word-level tokenizer, `student.json` and `text.txt`."""
    path = tmp_path_factory.mktemp("inputs")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<unk>", "<eos>"]
    tokenizer.train_from_iterator(WORDS, tokenizers.trainers.WordLevelTrainer(special_tokens=special))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=2 * CONTEXT,
        initializer_range=0.4,  # far from uniform, so that there is something to learn
    )
    teacher = transformers.LlamaForCausalLM(config).eval()
    for layer in teacher.model.layers:  # the last token alone decides: a window may begin within a document
        layer.self_attn.o_proj.weight.data.zero_()
    teacher.save_pretrained(path / "teacher")
    fast.save_pretrained(path / "teacher")
    (path / "student.json").write_text(json.dumps(STUDENT))
    (path / "text.txt").write_text("\n".join(_written(teacher, fast)))
    return path


def _written(teacher: Any, tokenizer: Any) -> list[str]:
    """240 documents drawn from the teacher."""
    starts = torch.randint(2, len(tokenizer), (240, 1))
    ids = teacher.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        do_sample=True,
        top_k=0,
        min_new_tokens=20,
        max_new_tokens=20,
        suppress_tokens=[0, 1],
        pad_token_id=1,
    )
    return [tokenizer.decode(row) for row in ids]


@pytest.fixture
def options(inputs: Path, tmp_path: Path) -> Options:
    """A run of 40 steps that takes two seconds."""
    return short_run(inputs, tmp_path / "out")


def short_run(inputs: Path, output: Path) -> Options:
    """The options of such a run."""
    return Options(
        ModelOptions(teacher=str(inputs / "teacher"), student=str(inputs / "student.json"), device="cpu"),
        DataOptions(data=str(inputs / "text.txt"), max_length=CONTEXT, out_of_domain="none"),
        DistillationOptions(),
        TrainingOptions(max_steps=40, learning_rate=1e-2, eval_steps=20, output=str(output)),
        EvaluationOptions(prompts=["the old film", "two friends"], sample_tokens=4),
    )


def changed(options: Options, **values: Any) -> Options:
    """The options with other values, each put where it belongs."""
    groups = []
    for group in options:
        mine = {field.name for field in dataclasses.fields(group)} & values.keys()
        groups.append(dataclasses.replace(group, **{name: values.pop(name) for name in mine}))
    assert not values, f"there are no options {list(values)}"
    return Options(*groups)


def run(options: Options, **values: Any) -> dict[str, Any]:
    """`fastkd distill` with some options changed; what metrics.json says."""
    from fastkd.training.commands.distill import distill

    return distill(changed(options, **values))
