"""Options from flags and YAML: the same values, the same checks, and no way to mean two things at once."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastkd.cli import main
from fastkd.training.commands.sweep import SweepOptions
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import GROUPS, DistillationOptions, InputError

#: A configuration of the kind that circulates, with all its names.
FOREIGN = """
teacher_model: gpt2-large
student_model: gpt2
temperature: 3
alpha: .4
alpha_on: hard
epochs: 3
learning_rate: 2e-5
batch_size: 4
gradient_accumulation_steps: 8
dataset_path: reviews.jsonl
max_length: 2048
cache_dir: cache
cache_precision: fp16
optimizer: adamw_torch
scheduler: cosine
warmup_ratio: .05
bf16: true
metrics: [perplexity, kl]
eval_steps: 100
early_stopping_patience: 3
task_weight: .7
"""


def parse(*arguments):
    *groups, _ = Parser("distill", "", GROUPS).parse(arguments)
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


def test_names_of_others_are_accepted(tmp_path):
    (tmp_path / "config.yaml").write_text(FOREIGN)
    found = parse(str(tmp_path / "config.yaml"), "--temperature", "2.5", "--batch-size=2", "--steps", "7")
    expected = {
        "teacher": "gpt2-large",
        "student": "gpt2",
        "temperature": 2.5,
        "soft_weight": 0.6,
        "hard_weight": 0.4,
        "alpha": None,
        "epochs": None,  # the flag is about the same thing, and wins
        "max_steps": 7,
        "learning_rate": 2e-5,
        "batch_size": 2,
        "gradient_accumulation_steps": 8,
        "data": "reviews.jsonl",
        "max_length": 2048,
        "cache_dir": "cache",
        "cache_format": "dense",
        "cache_precision": "fp16",
        "warmup_ratio": 0.05,
        "bf16": True,
        "fp16": False,
        "metrics": ["perplexity", "kl"],
        "eval_steps": 100,
        "early_stopping_patience": 3,
        "mix_weights": [0.7],
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("target", "name"), [("demo", "demo"), ("demo-layers", "layers")])
def test_what_make_runs_is_read_and_compared_with_the_labels_alone(target, name, monkeypatch):
    root = Path(__file__).parents[2]
    assert f"fastkd distill examples/{name}.yaml --output runs/{target} " in (root / "Makefile").read_text()
    monkeypatch.chdir(root)
    found = parse(f"examples/{name}.yaml")
    assert found["output"] == f"runs/{target}"
    assert found["ce_baseline"]


def test_what_is_printed_is_read_again(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(FOREIGN)
    assert main(["distill", str(tmp_path / "config.yaml"), "--print-config", "--prompts", "a", "b: c"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert yaml.safe_load(printed)["prompts"] == ["a", "b: c"]
    assert parse(str(tmp_path / "again.yaml")) == parse(str(tmp_path / "config.yaml"), "--prompts", "a", "b: c")


def test_a_list_at_the_end_of_a_file_takes_nothing_of_the_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text("prompts: [a, b]")
    assert parse(str(tmp_path / "config.yaml"))["prompts"] == ["a", "b"]
    assert parse(str(tmp_path / "config.yaml"), "--epochs", "2")["prompts"] == ["a", "b"]
    assert parse("--epochs", "2", str(tmp_path / "config.yaml"))["prompts"] == ["a", "b"]


#: The same in groups, as a guide prints it.
GROUPED = """
distillation_config:
  models: {teacher_model: gpt2-large, student_model: gpt2}
  loss:
    temperature: 3.0
    alpha: 0.4
    alpha_on: soft
  cache: {cache_dir: cache, cache_precision: float16}
  training:
    fp16: true
    per_device_train_batch_size: 4
"""


def test_groups_of_a_configuration_may_stand_in_one_mapping(tmp_path):
    (tmp_path / "config.yaml").write_text(GROUPED)
    found = parse(str(tmp_path / "config.yaml"), "--temperature", "2")
    expected = {"teacher": "gpt2-large", "temperature": 2.0, "soft_weight": 0.4, "cache_precision": "fp16"}
    expected |= {"cache_format": "dense", "fp16": True, "batch_size": 4, "student": "gpt2"}
    assert {name: found[name] for name in expected} == expected


BAD_FILES = [
    ("loss: {temprature: 2}", "unknown key 'temprature'; did you mean 'temperature'"),
    ("a: {b: {c: {temperature: 2}}}", "nests 'c' too deep"),
    ("a: &a {b: *a}", "too deep"),
    ("a: {temperature: 2}\ntemperature: 3", "both 'temperature' and 'temperature'"),
    ("temperature: [1, 2]", "the list [1, 2] under 'temperature', which takes one value"),
    ("temperature: .nan", "temperature is nan"),
    ("soft_weight: .inf", "soft_weight is inf"),
    ("output: 2024-13-45", "is not YAML"),
    ("size: smal", "did you mean 'small'"),
    ("temprature: 2", "unknown key 'temprature'; did you mean 'temperature'"),
    ("temperature: hot", "invalid float value: 'hot'"),
    ("size: huge", "invalid choice: 'huge'"),
    ("teacher: gpt2\nteacher_model: gpt2", "both 'teacher' and 'teacher_model'"),
    ("temperature: {start: 2}", "a value is a text, a number, or a list"),
    ("- temperature", "must hold keys and values"),
    ("temperature: [", "is not YAML"),
    ("alpha: .4", "without alpha_on"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[text for text, _ in BAD_FILES])
def test_bad_files(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        parse(str(tmp_path / "config.yaml"))
    assert message in str(refused.value)


BAD_FLAGS = [
    (["absent.yaml"], "cannot read the configuration absent.yaml"),
    (["--temprature", "2"], "did you mean '--temperature'"),
    (["--optimizer", "adamw_torch_xla"], "which needs torch_xla"),
    (["--optimizer", "galore_adamw"], "which needs arguments of its own"),
    (["--scheduler", "warmup_stable_decay"], "those that need no arguments of their own are"),
    (["--scheduler", "cosin"], "did you mean 'cosine'"),
    (["--size", "smal"], "did you mean 'small'"),
    (["--metrics", "perplexty"], "did you mean 'perplexity'"),
    (["--prompts", "a", "config.yaml"], "write CONFIG.yaml first"),
    (["--bf16", "config.yaml"], "write CONFIG.yaml before the options"),
    (["--hard-weight", "nan"], "hard_weight is nan"),
    (["--temperature", "0"], "temperature is 0.0"),
    (["--temperature", "1e7"], "temperature is 10000000.0; it must be in"),
    (["--soft-weight", "-1"], "soft_weight is -1.0"),
    (["--soft-weight", "0", "--hard-weight", "0"], "both 0"),
    (["--alpha", "0.5"], "alpha 0.5 is given without alpha_on"),
    (["--alpha-on", "soft"], "there is no alpha"),
    (["--alpha", "2", "--alpha-on", "soft"], "alpha is 2.0"),
    (["--alpha", ".5", "--alpha-on", "soft", "--hard-weight", "1"], "contradict each other"),
    (["--temperature-schedule", "linear"], "a schedule needs both"),
    (["--final-temperature", "2"], "a schedule needs both"),
    (["--weight-schedule", "cosine", "--final-soft-weight", "2"], "hard_weight would be negative"),
    (["--cache-dir", "c", "--temperature-schedule", "linear", "--final-temperature", "2"], "at one temperature"),
    (["--cache-precision", "fp16", "--cache-format", "topk"], "cache_precision is 'fp16'"),
    (["--epochs", "1", "--max-steps", "1"], "contradict each other"),
    (["--epochs", "0"], "epochs is 0.0"),
    (["--max-steps", "0"], "max_steps is 0"),
    (["--batch-size", "0"], "batch_size is 0"),
    (["--learning-rate", "0"], "learning_rate is 0.0"),
    (["--warmup-ratio", "1"], "warmup_ratio is 1.0"),
    (["--fp16", "--bf16"], "both set"),
    (["--overwrite", "--resume"], "contradict each other"),
    (["--max-length", "1"], "max_length is 1"),
    (["--stride", "200"], "text would be skipped"),
    (["--mix-weight", "0"], "mix_weights has 0"),
    (["--metrics", "perplexity", "beauty"], "metrics has beauty"),
    (["--top-p", "0"], "top_p is 0.0"),
    (["--lora-targets", "q_proj"], "lora_rank is 0"),
    (["--device", "nonsense"], "device is 'nonsense'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_flags(arguments, message, capsys):
    assert main(["distill", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fastkd: error: ")
    assert message in shown


def test_alpha_means_what_alpha_on_says():
    assert DistillationOptions(alpha=0.3, alpha_on="soft").weights == pytest.approx((0.3, 0.7))
    assert DistillationOptions(alpha=0.3, alpha_on="hard").weights == pytest.approx((0.7, 0.3))


def test_cells_of_a_sweep():
    """Without a soft loss the temperature says nothing: one student is enough."""
    cells = SweepOptions(alpha=[0.0, 0.5, 1.0], temperature=[1.0, 2.0], cache_dir="c").cells()
    found = [(cell.weights, cell.temperature, cell.cache_dir) for cell, *_ in cells]
    assert found == [
        ((0.0, 1.0), 1.0, "c/temperature-1"),
        ((0.5, 0.5), 1.0, "c/temperature-1"),
        ((0.5, 0.5), 2.0, "c/temperature-2"),
        ((1.0, 0.0), 1.0, "c/temperature-1"),
        ((1.0, 0.0), 2.0, "c/temperature-2"),
    ]


def test_a_run_configures_other_commands(tmp_path):
    """Of a distillation's configuration a sweep takes what concerns it."""
    (tmp_path / "config.yaml").write_text(dump(group() for group in GROUPS))
    grid, _ = Parser("sweep", "", (SweepOptions,)).parse([str(tmp_path / "config.yaml"), "--alpha", "0", "1"])
    assert (grid.alpha, grid.temperature, grid.cache_format) == ([0.0, 1.0], [1.0], "sampled")


@pytest.mark.parametrize("command", ["distill", "eval", "sweep", "export", "inspect-teacher"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: fastkd {command}" in shown
    assert "examples:" in shown
    if command == "distill":
        for group in GROUPS:
            for field in dataclasses.fields(group):
                assert "--" + field.name.replace("_", "-") in shown


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_overview(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert "fastkd" in capsys.readouterr().out


def test_help_loads_no_models():
    """It takes a second: transformers' trainer and models take ten."""
    code = (
        "import contextlib, io, sys; from fastkd.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['distill', '--help'])\n"
        "slow = {'transformers.trainer', 'transformers.modeling_utils', 'matplotlib', 'peft', 'datasets'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_missing_transformers_says_what_to_install(monkeypatch, capsys):
    for name in ("transformers", "transformers.hf_argparser"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("commands.distill", "configuration"):
        monkeypatch.delitem(sys.modules, f"fastkd.training.{name}", raising=False)
    assert main(["distill"]) == 2
    assert "pip install 'fastkd[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_printing_fails_in_no_encoding(encoding):
    code = "import sys; from fastkd.cli import main; sys.exit(main(['distill', '--print-config', '--prompts', '→ 雪']))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert rb"\u96ea" in found.stdout


VALUES = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e999",
    "x",
    "true",
    "[1, 2]",
    "{a: 1}",
    "null",
    "'~nobody/x'",
    "config.yaml",
    "é",
]


def test_every_configuration_is_read_or_refused(tmp_path):
    """Seeded: random keys, values and shapes; whatever is not read ends in an InputError."""
    chance = random.Random(0)
    keys = [field.name for group in GROUPS for field in dataclasses.fields(group)] + ["temprature", "loss", "1", "x y"]
    file = tmp_path / "config.yaml"
    refused = 0
    for number in range(400):
        pairs = [(chance.choice(keys), chance.choice(VALUES)) for _ in range(chance.randint(1, 3))]
        if number % 2:
            lines = [f"{key}: {value}" for key, value in pairs]
            inner = "\n".join("  " + line for line in lines)
            text = f"group:\n{inner}" if chance.random() < 0.3 else "\n".join(lines)
            file.write_text(text, encoding="utf-8")
            arguments = [str(file)]
        else:
            arguments = [part for key, value in pairs for part in (f"--{key}", value)]
        try:
            parse(*arguments)
        except InputError:
            refused += 1
    assert 200 < refused < 400
