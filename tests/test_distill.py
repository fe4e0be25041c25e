"""`fastkd distill` with a teacher made on the spot: it learns, writes all or nothing, and refuses clearly."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys

import pytest
import torch

from fastkd.cli import main
from fastkd.training.options import DistillOptions, InputError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")

TEXT = "the film was a slow and quiet story of two old friends who lost their way home in snow"
WORDS = TEXT.split()
CONTEXT = 16
STUDENT = {"model_type": "gpt2", "n_positions": CONTEXT, "n_embd": 32, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
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
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2 * CONTEXT,
        initializer_range=0.4,  # far from uniform, so that there is something to learn
    )
    teacher = transformers.LlamaForCausalLM(config)
    teacher.get_input_embeddings().weight.data *= 10  # the last token decides most, so that it is learnt soon
    teacher.save_pretrained(path / "teacher")
    fast.save_pretrained(path / "teacher")
    (path / "student.json").write_text(json.dumps(STUDENT))
    words = random.Random(0)
    lines = (" ".join(words.choices(WORDS, k=words.randint(5, 30))) for _ in range(120))
    (path / "text.txt").write_text("\n".join(lines))
    return path


@pytest.fixture
def options(inputs, tmp_path):
    return DistillOptions(
        teacher=str(inputs / "teacher"),
        student_config=str(inputs / "student.json"),
        data=str(inputs / "text.txt"),
        context=CONTEXT,
        steps=40,
        learning_rate=1e-2,
        hard_weight=0.0,
        soft_weight=1.0,
        device="cpu",
        output=str(tmp_path / "out"),
    )


def run(options, **changes):
    from fastkd.training.distill import distill

    return distill(dataclasses.replace(options, **changes))


def test_student_learns_and_is_saved(options, tmp_path, capsys):
    metrics = run(options)
    before, after = metrics["before"], metrics["after"]
    assert after["kl"] < 0.7 * before["kl"]
    assert after["top1_agreement"] > before["top1_agreement"]
    assert after["teacher_perplexity"] == before["teacher_perplexity"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    student = transformers.AutoModelForCausalLM.from_pretrained(options.output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.output)
    assert tokenizer("the old film")["input_ids"] == tokenizer.convert_tokens_to_ids(["the", "old", "film"])
    assert student.num_parameters() == metrics["parameters"]["student"]
    shown = capsys.readouterr().out
    assert "student before" in shown
    assert "student after" in shown


def test_evaluation_equals_float64_arithmetic(options, inputs):
    from fastkd.training.distill import evaluate

    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher").eval()
    student = transformers.LlamaForCausalLM(teacher.config).eval()
    windows = torch.randint(len(WORDS), (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student_logits, teacher_logits = (model(windows).logits[:, :-1].double() for model in (student, teacher))
    labels, log_q, log_p = (
        windows[:, 1:, None],
        student_logits.log_softmax(-1),
        teacher_logits.log_softmax(-1),
    )
    expected = {
        "perplexity": (-log_q.gather(-1, labels).mean()).exp().item(),
        "teacher_perplexity": (-log_p.gather(-1, labels).mean()).exp().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
    }
    assert evaluate(student, teacher, windows, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert evaluate(teacher, teacher, windows, batch_size=2)["kl"] == pytest.approx(0, abs=1e-6)


def test_same_seed_same_run(options, tmp_path):
    first = run(options, steps=3, output=str(tmp_path / "first"))
    second = run(options, steps=3, output=str(tmp_path / "second"))
    third = run(options, steps=3, output=str(tmp_path / "third"), seed=1)
    assert first["history"] == second["history"]
    assert first["samples"] == second["samples"]
    assert first["history"] != third["history"]


def test_labels_alone_teach_the_next_token(options, tmp_path):
    """Every word of the text has one successor: a loss on unshifted labels would teach to repeat it."""
    rotations = (WORDS[start:] + WORDS[:start] for start in range(len(WORDS)))
    (tmp_path / "cycle.txt").write_text("\n".join(" ".join(words) for words in rotations))
    metrics = run(options, data=str(tmp_path / "cycle.txt"), soft_weight=0.0, hard_weight=1.0)
    assert metrics["after"]["perplexity"] < 0.2 * metrics["before"]["perplexity"]
    assert all(step["soft"] == 0 < step["hard"] for step in metrics["history"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jsonl", '{"text": "the old film"}\n\n{"text": "NA", "label": 1}\n{"text": "the old film"}\n'),
        ("text.csv", 'label,text\n1,"the old film"\n2,NA\n3,"the old\nfilm "\n'),
        ("text.txt", "the old film\r\n\r\n NA \r\nthe old film"),
    ],
)
def test_documents_of_each_format(tmp_path, name, content):
    from fastkd.training.data import read_documents

    path = tmp_path / name
    path.write_text(content, newline="")
    assert read_documents(str(path))[:2] == ["the old film", "NA"]


BAD_OPTIONS = [
    ({"steps": 0}, "steps is 0"),
    ({"context": 1}, "context is 1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"learning_rate": 0.0}, "learning_rate is 0"),
    ({"temperature": 0.0}, "temperature"),
    ({"soft_weight": 0.0, "hard_weight": 0.0}, "both 0"),
    ({"context": CONTEXT + 1}, f"context {CONTEXT + 1} is more than the student's {CONTEXT} positions"),
    ({"batch_size": 10_000}, "a batch needs 10000"),
    ({"device": "nonsense"}, "cannot use the device 'nonsense'"),
    ({"data": "absent.txt"}, "cannot read absent.txt"),
    ({"data": "text.pdf"}, "cannot tell the format"),
    ({"student_config": "absent/at/all"}, "cannot load the student's configuration"),
    ({"teacher": "absent/at/all"}, "Ways that work"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS, ids=[message for _, message in BAD_OPTIONS])
def test_bad_options_are_refused_before_anything_is_written(options, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(options, **changes)
    assert not any(tmp_path.iterdir())


BAD_FILES = [
    ("empty.txt", b"", "holds no text"),
    ("blank.txt", b"\n  \n", "holds no text"),
    ("one.txt", b"the film\nthe film\n", "only 1 distinct document"),
    ("few.txt", b"the film\nthe story\n", "a batch needs 4"),
    ("binary.txt", b"the film\n\xff\xfe\n", "after line"),
    ("broken.jsonl", b'{"text": "the film"}\n{"text": \n', "after line 1"),
    ("field.jsonl", b'{"text": "the film"}\n{"body": "x"}\n', "line 2: this row has no 'text' string"),
    ("list.jsonl", b'["the film"]\n', "line 1: this row has no 'text' string"),
    ("column.csv", b"body,label\nthe film,1\n", "line 2: this row has no 'text' string"),
    ("short.csv", b"label,text\n1,the film\n2\n", "line 3: this row has no 'text' string"),
    ("quote.csv", b'text\n"the film', "after line"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_bad_data_is_refused_before_anything_is_written(options, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(options, data=str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**STUDENT, "vocab_size": 7}, "the student's vocabulary has 7 tokens"),
        ({"n_positions": CONTEXT}, "cannot load the student's configuration"),
        ("not a configuration", "cannot load the student's configuration"),
    ],
)
def test_bad_student_is_refused(options, tmp_path, settings, message):
    (tmp_path / "student.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        run(options, student_config=str(tmp_path / "student.json"))
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model_is_refused(options, inputs, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    tokenizer.add_tokens([f"<{number}>" for number in range(3)])
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="they are no pair"):
        run(options, teacher=str(tmp_path / "teacher"))


def test_output_is_never_lost(options, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run(options)
    with pytest.raises(InputError, match="no earlier run"):
        run(options, overwrite=True)
    assert (out / "notes").read_text() == "mine"
    (out / "metrics.json").write_text("{}")
    run(options, steps=1, overwrite=True)
    assert not (out / "notes").exists()
    assert (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_in_training_leaves_nothing(options, tmp_path):
    with pytest.raises(FloatingPointError, match="lower --learning-rate"):
        run(options, learning_rate=1e30)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["--version"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "fastkd" in shown
    if "distill" in arguments:
        for field in dataclasses.fields(DistillOptions):
            assert "--" + field.name.replace("_", "-") in shown


def test_help_needs_no_transformers():
    code = "import fastkd.cli, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_transformers_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fastkd.training.distill", raising=False)
    assert main(["distill"]) == 2
    assert "pip install 'fastkd[demo]'" in capsys.readouterr().err


def test_command_line(options, capsys):
    flags = {"teacher": options.teacher, "student-config": options.student_config, "data": options.data}
    flags |= {"context": "16", "steps": "2", "output": options.output}
    arguments = ["distill", *(part for name, value in flags.items() for part in ("--" + name, value))]
    assert main(arguments) == 0
    assert "saved to" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
