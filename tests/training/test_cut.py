"""`fastkd distill` with a student that is made of its teacher."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from fastkd.cli import main
from fastkd.training import cut, loading
from fastkd.training.configuration import Parser
from fastkd.training.options import GROUPS, InputError, ModelOptions
from tests.training.conftest import changed, run
from tests.training.test_resume import interrupt_after, outcome


@pytest.fixture
def options(options):
    """A run of 6 steps with checkpoints at 3 and 6."""
    options = changed(options, max_steps=6, eval_steps=3, logging_steps=1, eval_windows=4, sample_tokens=2)
    return changed(options, student="", student_layers="0,2", batch_size=32, learning_rate=1e-3)


def loaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_layers(options, inputs, tmp_path, capsys, monkeypatch):
    begun = []
    original = cut.cut_student
    monkeypatch.setattr("fastkd.training.setup.cut_student", lambda *given: begun.append(original(*given)) or begun[-1])
    found = run(options, ce_baseline=True)
    teacher = loaded(inputs / "teacher")
    for student in begun:
        assert [weight.requires_grad for weight in student.parameters()].count(False) == 0
    assert len(begun) == 2
    for folder in ("out", "out/ce-only"):
        student = loaded(tmp_path / folder)
        assert student.config.num_hidden_layers == 2
        assert student.config.hidden_size == teacher.config.hidden_size
        trained, whole = (one.model.layers[1].mlp.up_proj.weight for one in (student, teacher))
        apart = (trained - teacher.model.layers[2].mlp.up_proj.weight).abs().max()
        assert 0 < apart < 0.02 < (trained - whole).abs().max()
    assert found["student"] == "layers 0,2 of the teacher"
    assert "made of layers 0,2 of the teacher" in capsys.readouterr().out
    assert "layers 0,2 of the teacher" in (tmp_path / "out/report.html").read_text()
    assert main(["eval", str(tmp_path / "out"), "--device", "cpu"]) == 0
    judged = json.loads((tmp_path / "out/eval/metrics.json").read_text())
    assert judged["student"] == f"{tmp_path / 'out'} (layers 0,2 of the teacher)"
    assert judged["models"]["student"]["perplexity"] == pytest.approx(found["models"]["student"]["perplexity"])


def test_width_and_a_cache(options, tmp_path, monkeypatch):
    """The teacher is freed once it is cached: the second student is made before, and is the same one."""
    begun, given = [], []
    original = cut.cut_student

    def cut_student(models, teacher, *rest):
        begun.append(original(models, teacher, *rest))
        given.append(teacher)
        states.append({name: weight.clone() for name, weight in begun[-1].state_dict().items()})
        return begun[-1]

    states: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr("fastkd.training.setup.cut_student", cut_student)
    found = run(options, ce_baseline=True, student_width=12, cache_dir=str(tmp_path / "cache"))
    assert [teacher is None for teacher in given] == [False, False]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    config = loaded(tmp_path / "out").config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (12, 1, 16)
    assert config.num_hidden_layers == 2
    assert found["student"] == "layers 0,2 and 12 channels of the teacher"


def test_resumed(options, tmp_path, monkeypatch):
    run(options, output=str(tmp_path / "whole"), student_width=12)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(options, student_width=12)
    assert main(["distill", str(tmp_path / "out/config.yaml"), "--resume"]) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_of_a_teacher_that_is_trained_first(inputs):
    """Its configuration is known before it is there."""
    teacher = loading.trained_config(transformers.AutoTokenizer.from_pretrained(inputs / "teacher"))
    config = cut.cut_configuration(ModelOptions(teacher="train", student_layers="every:2", student_width=256), teacher)
    assert (config.n_layer, config.n_embd, config.n_head) == (3, 256, 4)


def test_adapters(options, tmp_path):
    """Only they train, so the student ends as its teacher's layers but for what was merged."""
    pytest.importorskip("peft")
    run(options, lora_rank=2)
    assert loaded(tmp_path / "out").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_layers": "0,3"}, "student_layers '0,3': no student can be made of"),
        ({"student_layers": "0,3"}, "of which '3' is no block of a model that has 0 to 2"),
        ({"student_layers": "0,0"}, "each block is taken once"),
        ({"student_layers": "first:2"}, "they must be indices from 0"),
        ({"student_width": 24}, "width must be from 1 to 23, below the model's 24, got 24"),
        ({"student_width": 10}, "widths of 12 do"),
    ],
)
def test_refused_before_any_work(options, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("fastkd.training.loading.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(InputError) as refused:
        run(options, **changes)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student", "gpt2", "--student-layers", "0"], "student 'gpt2' and student_layers '0' exclude each other"),
        (["--student", "small-gpt2", "--student-width", "8"], "and student_width 8 exclude each other"),
        (["--student-layers", "0", "--from-scratch"], "from_scratch asks for random weights, but student_layers '0'"),
        (["--student-width", "-1"], "student_width is -1; it must be at least 0"),
    ],
)
def test_options_that_exclude_each_other(flags, message, capsys):
    assert main(["distill", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_flag_wins_over_a_file(tmp_path):
    def parse(*arguments):
        models = Parser("distill", "", GROUPS).parse(arguments)[0]
        return models.student, models.student_layers, models.student_width

    random, made = tmp_path / "random.yaml", tmp_path / "made.yaml"
    random.write_text("student: gpt2")
    made.write_text("student_layers: last:2\nstudent_width: 8")
    assert parse() == ("small-gpt2", "", 0)
    assert parse(str(random), "--student-layers", "0,2") == ("", "0,2", 0)
    assert parse(str(random), "--student-width", "16") == ("", "", 16)
    assert parse(str(made)) == ("", "last:2", 8)
    assert parse(str(made), "--student-width", "16") == ("", "last:2", 16)
    assert parse(str(made), "--student", "gpt2") == ("gpt2", "", 0)


def test_names():
    assert ModelOptions().student_name == "small-gpt2"
    assert ModelOptions(student_width=8).student_name == "8 channels of the teacher"
