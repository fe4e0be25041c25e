"""`fastkd distill` from beginning to end: it learns, reports, goes on where it was interrupted, and refuses clearly."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from fastkd.cli import main
from fastkd.training import fit as fitting
from fastkd.training import lessons, loading
from fastkd.training.options import InputError, ModelOptions
from tests.training.conftest import CONTEXT, STUDENT, WORDS, changed, run


def flags(options, **values):
    """The command line of some options."""
    found = []
    for group in changed(options, **values):
        for name, value in vars(group).items():
            if value is None or value == [] or name in ("alpha", "alpha_on"):
                continue
            found += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return found


def test_everything_is_learnt_and_written(options, tmp_path, capsys):
    metrics = run(options, ce_baseline=True, out_of_domain=options.data.data)
    found = metrics["models"]
    before, student, alone, teacher = (
        found[name] for name in ("student before", "student", "CE-only student", "teacher")
    )
    assert student["kl"] < 0.5 * before["kl"]
    assert student["kl"] < 0.9 * alone["kl"]
    assert student["perplexity"] < alone["perplexity"] < before["perplexity"]
    assert student["top1_agreement"] > before["top1_agreement"]
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["retention"] == pytest.approx(100)
    assert before["retention"] < 30 < alone["retention"] < student["retention"]
    assert student["out_of_domain_perplexity"] < before["out_of_domain_perplexity"]
    assert metrics["verdict"][0].startswith("PASS")
    assert metrics["training"]["student"]["steps"] == metrics["training"]["CE-only student"]["steps"] == 40

    out = tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["model"] for row in rows] == ["teacher", "student", "CE-only student"]
    assert float(rows[1]["kl"]) == student["kl"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 9
    assert "http" not in page
    story = (out / "samples.md").read_text()
    assert all(f"## {prompt}" in story for prompt in options.evaluation.prompts)
    assert "student, step 0" in story
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("the old film")["input_ids"] == tokenizer.convert_tokens_to_ids(["the", "old", "film"])
    assert model.num_parameters() == student["parameters"]
    assert (out / "ce-only" / "model.safetensors").exists()
    assert not (out / "checkpoints").exists()
    with pytest.raises(InputError, match="is finished"):
        run(options, ce_baseline=True, resume=True)
    assert "top-1 agreement" in capsys.readouterr().out


def test_same_seed_same_run(options, tmp_path):
    first, second, third = (
        run(options, max_steps=3, output=str(tmp_path / name), seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )

    def losses(metrics):
        return [line["loss"] for line in metrics["training"]["student"]["history"] if "loss" in line]

    assert losses(first) == losses(second) != losses(third)
    assert first["models"]["student"]["samples"] == second["models"]["student"]["samples"]


def test_labels_alone_teach_the_next_token(options, tmp_path):
    """Every word of the text has one successor: a loss on unshifted labels would teach to repeat it."""
    rotations = [" ".join((WORDS[start:] + WORDS[:start]) * 2) for start in range(len(WORDS))]
    (tmp_path / "cycle.txt").write_text("\n".join(rotations))
    metrics = run(options, data=str(tmp_path / "cycle.txt"), soft_weight=0.0, hard_weight=1.0, max_steps=80)
    models = metrics["models"]
    assert models["student"]["perplexity"] < 0.3 * models["student before"]["perplexity"]
    lines = [line for line in metrics["training"]["student"]["history"] if "soft" in line]
    assert all(line["soft"] == 0 < line["hard"] for line in lines)


LABELS = {"soft_weight": 0.0, "hard_weight": 1.0}


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        (LABELS, False),
        ({**LABELS, "terms": ["multi_token"]}, False),
        ({**LABELS, "terms": ["multi_token"], "cache_dir": "cache"}, False),
        ({}, True),
        ({"teacher_mode": "mixture"}, True),
        ({"teacher_mode": "ema"}, False),
    ],
)
def test_a_teacher_that_is_not_needed_is_freed(options, tmp_path, monkeypatch, values, needed):
    """`needed`: whether --teacher's model is, while the student trains. Labels alone need none, nor what was beside."""
    teachers, modes, held = [], [], []

    def watched(place, name, note):
        original = getattr(place, name)

        def call(*given):
            found = original(*given)
            note(found)
            return found

        monkeypatch.setattr(place, name, call)

    def fit(*given, original=fitting.fit):
        held.append([any(one() is not None for one in some) for some in (teachers, modes)])
        return original(*given)

    watched(loading, "load_teacher", lambda found: teachers.append(weakref.ref(found)))
    watched(lessons, "lessons_of", lambda found: modes.extend([weakref.ref(found.teacher)] if found.teacher else []))
    monkeypatch.setattr(fitting, "fit", fit)
    monkeypatch.chdir(tmp_path)
    more = {"more_teachers": [options.models.teacher]} if values.get("teacher_mode") == "mixture" else {}
    run(options, max_steps=2, eval_steps=2, eval_windows=4, sample_tokens=2, ce_baseline=True, **values, **more)
    assert held == [[needed, bool(modes)], [False, False]]


def test_the_small_student_begins_with_embeddings_of_unit_norm(inputs):
    """With GPT-2's own 0.02 they have a third of it, and the demo's student learns little but frequencies."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    models = ModelOptions()
    config = loading.student_config(models, 500, tokenizer)
    torch.manual_seed(0)
    rows = loading.load_student(models, config, torch.device("cpu")).get_input_embeddings().weight
    assert rows.shape == (500, 256)
    assert rows.norm(dim=1).mean().item() == pytest.approx(1, abs=0.02)


def test_trained_teacher(options, tmp_path, monkeypatch, inputs):
    """The whole pipeline without any model: a teacher is trained first, on the labels, and kept."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    monkeypatch.setattr(loading, "gpt2_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(loading, "_TRAINED", {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 1, "n_head": 2})
    metrics = run(options, teacher="train", max_steps=60)
    assert (tmp_path / "out" / "teacher" / "model.safetensors").exists()
    assert metrics["models"]["teacher"]["perplexity"] < metrics["models"]["student before"]["perplexity"]
    assert metrics["models"]["student"]["kl"] < metrics["models"]["student before"]["kl"]


def test_lora_student_is_merged(options, inputs, tmp_path):
    pytest.importorskip("peft")
    student = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    student.model.layers[0].mlp.down_proj.weight.data.zero_()
    student.save_pretrained(tmp_path / "student")
    transformers.AutoTokenizer.from_pretrained(inputs / "teacher").save_pretrained(tmp_path / "student")
    metrics = run(options, student=str(tmp_path / "student"), lora_rank=4, lora_targets=["down_proj", "q_proj"])
    assert metrics["models"]["student"]["kl"] < 0.8 * metrics["models"]["student before"]["kl"]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.num_parameters() == student.num_parameters()


def test_ctrl_c_leaves_a_run_that_is_resumed(options, tmp_path):
    """The interrupted run, resumed, ends with the losses and the student of one that was not interrupted."""
    settings = {"max_steps": 200, "logging_steps": 1, "eval_steps": 1000}
    whole = run(options, **settings, output=str(tmp_path / "whole"))
    arguments = flags(options, **settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastkd.cli", "distill", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    out = tmp_path / "out"
    _wait_for(lambda: (out / "config.yaml").exists(), process)
    assert process.stderr is not None
    for shown in iter(lambda: process.stderr.read(80), ""):
        if "loss=" in shown:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130, rest
    assert "--resume" in rest
    assert not (out / "metrics.json").exists()
    assert list((out / "checkpoints" / "student").glob("checkpoint-*"))

    with pytest.raises(InputError, match=r"learning_rate: 0\.01 → 0\.5"):
        run(options, **settings, learning_rate=0.5, resume=True)
    assert main(["distill", str(out / "config.yaml"), "--resume"]) == 0
    resumed = json.loads((out / "metrics.json").read_text())

    def losses(metrics):
        return [line["loss"] for line in metrics["training"]["student"]["history"] if "loss" in line]

    assert losses(resumed) == losses(whole)
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name])


def test_ctrl_c_at_every_stage(options, tmp_path, monkeypatch):
    """While the cache is written, after the student is trained, and while results are written: at last it is whole.

    One run, interrupted and resumed again and again.
    """
    from fastkd.training import report
    from fastkd.training.commands import distill as module

    settings = {"ce_baseline": True, "cache_dir": str(tmp_path / "out" / "cache"), "max_steps": 12, "eval_steps": 5}
    expected = run(options, **{**settings, "cache_dir": str(tmp_path / "cache")}, output=str(tmp_path / "whole"))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    write = lessons.lessons_of
    stages = {
        "lessons": (lessons, "lessons_of", lambda setup, student: (write(setup, student), interrupt())),
        "ce-only": (module, "_as_long", interrupt),
        "results": (report, "write", interrupt),
    }
    for stage, patch in stages.items():
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            with pytest.raises(KeyboardInterrupt, match=r"config\.yaml --resume"):
                run(options, **settings, resume=stage != "lessons")
        assert not (tmp_path / "out" / "metrics.json").exists()
        assert not list((tmp_path / "out").glob(".results*"))
    found = run(options, **settings, resume=True)
    for name, values in expected["models"].items():
        for measure in ("perplexity", "kl", "calibration_error"):
            assert found["models"][name][measure] == pytest.approx(values[measure], rel=1e-6)
        assert found["models"][name]["samples"] == values["samples"]
    for name, values in expected["training"].items():
        lines = [
            [line["loss"] for line in one["history"] if "loss" in line] for one in (found["training"][name], values)
        ]
        assert lines[0] == lines[1]


def _wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


BAD_OPTIONS = [
    ({"max_length": CONTEXT + 1}, f"max_length {CONTEXT + 1} is more than the student's {CONTEXT} positions"),
    ({"batch_size": 10_000}, "a batch needs 10000"),
    ({"optimizer": "nonsense"}, "the training options are refused"),
    ({"scheduler": "nonsense"}, "scheduler is 'nonsense'; those that need"),
    ({"divergence": "nonsense"}, "nonsense"),
    ({"divergence": "forward_kl:0.5+nonsense:0.5"}, "unknown divergence 'nonsense' in 'forward_kl:0.5"),
    ({"data": "absent.txt"}, "cannot read absent.txt"),
    ({"data": "text.pdf"}, "cannot tell the format"),
    ({"student": "absent/at/all"}, "cannot load the student"),
    ({"teacher": "absent/at/all"}, "Ways that work"),
    ({"resume": True}, "no run to resume"),
    ({"teacher_quantization": "4bit"}, "pip install bitsandbytes"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS, ids=[message for _, message in BAD_OPTIONS])
def test_bad_options_are_refused_before_anything_is_written(options, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(options, **changes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**STUDENT, "vocab_size": 7}, "the student's vocabulary has 7 ids"),
        ({"n_positions": CONTEXT}, "cannot load the student's configuration"),
        ("not a configuration", "cannot load the student's configuration"),
    ],
)
def test_bad_student_is_refused(options, tmp_path, settings, message):
    (tmp_path / "student.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        run(options, student=str(tmp_path / "student.json"))
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_number_tokens_differently(options, inputs, tmp_path):
    student = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    student.save_pretrained(tmp_path / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["film"], vocab["snow"] = vocab["snow"], vocab["film"]
    import tokenizers

    swapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", eos_token="<eos>"
    )
    swapped.save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="differ in 2 tokens") as refused:
        run(options, student=str(tmp_path / "student"))
    for token in ("film", "snow"):
        old = tokenizer.convert_tokens_to_ids(token)
        assert f"'{token}'" in str(refused.value)
        assert str(old) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_padded_vocabularies(options, inputs, tmp_path):
    """Rows that no token has, on either side, are left out."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    teacher.resize_token_embeddings(len(WORDS) + 30)
    teacher.lm_head.weight.data[len(WORDS) + 2 :] = 3.0
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "student.json").write_text(json.dumps({**STUDENT, "vocab_size": len(tokenizer)}))
    run(options, output=str(tmp_path / "same"))
    metrics = run(options, teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student.json"))
    assert metrics["models"]["student"]["kl"] < 0.6 * metrics["models"]["student before"]["kl"]


def test_a_teacher_that_knows_nothing_is_refused(options, inputs, tmp_path):
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    teacher.lm_head.weight.data.neg_()
    teacher.save_pretrained(tmp_path / "teacher")
    transformers.AutoTokenizer.from_pretrained(inputs / "teacher").save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="has nothing to teach"):
        run(options, teacher=str(tmp_path / "teacher"))
    assert not (tmp_path / "out").exists()


def test_failure_in_training_leaves_nothing(options, tmp_path):
    with pytest.raises(FloatingPointError, match="lower --learning-rate"):
        run(options, learning_rate=1e30)
    assert not any(tmp_path.iterdir())


def test_saved_configuration_makes_the_same_run(options, tmp_path, capsys):
    run(options, max_steps=2)
    config = tmp_path / "out" / "config.yaml"
    assert yaml.safe_load(config.read_text())["max_steps"] == 2
    assert main(["distill", str(config), "--max-steps", "1", "--output", str(tmp_path / "again")]) == 0
    assert "saved to" in capsys.readouterr().out
    assert main(["distill", str(config)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert Path(tmp_path / "again" / "metrics.json").exists()
