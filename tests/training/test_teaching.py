"""`fastkd distill` with every mode of teachers and with terms: trained, resumed, reported, refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml

import fastkd
from fastkd.cli import main
from fastkd.teachers import Mutual
from fastkd.training.commands import sweep as command
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import GROUPS, TAKES, InputError, TeachingOptions, named_terms, set_title, term_set
from fastkd.training.setup import gather, with_teacher
from tests.training.conftest import STUDENT, changed, run
from tests.training.test_resume import interrupt_after, outcome


@pytest.fixture
def options(options):
    """A run of 6 steps with checkpoints at 3 and 6."""
    options = changed(options, max_steps=6, eval_steps=3, logging_steps=1, eval_windows=4, sample_tokens=2)
    return changed(options, batch_size=16, learning_rate=1e-3)


def asked(options, inputs, mode):
    """A run with a teacher of this mode."""
    teacher = str(inputs / "teacher")
    for_mode = {
        "cached": {"cache_dir": str(inputs.parent / "cache")},
        "mixture": {"more_teachers": [teacher], "teacher_weights": [3.0, 1.0]},
        "routed": {"more_teachers": [teacher], "mix_data": [str(inputs / "other.txt")]},
        "snapshot": {"snapshot_every": 2},
        "online": {"teacher_learning_rate": 1e-4},
        "multi_view": {"views": ["token_dropout"]},
    }
    if mode == "routed":
        half = (inputs / "text.txt").read_text().splitlines()[::2]
        (inputs / "other.txt").write_text("\n".join(f"the {line}" for line in half))
    return changed(options, teacher_mode=mode, **for_mode.get(mode, {}))


@pytest.mark.parametrize("mode", TAKES)
def test_every_mode_is_resumed_to_the_bit(options, inputs, tmp_path, monkeypatch, mode):
    """And what has learnt beside the student is saved and judged."""
    wanted = asked(options, inputs, mode)
    whole = run(wanted, output=str(tmp_path / "whole"))
    rest = changed(wanted, output=str(tmp_path / "rest"))
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(rest)
    monkeypatch.undo()
    run(rest, resume=True)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "rest")
    history = whole["training"]["student"]["history"]
    assert any(line.get("soft", 0) > 0 for line in history)
    left = {"mutual": ("peer", "second student"), "ema": ("ema", "moving average")}
    left["online"] = ("trained-teacher", "teacher after training")
    folder, name = left.get(mode, ("", ""))
    assert set(whole["models"]) - {"teacher", "student", "student before"} == ({name} if name else set())
    if name:
        one, other = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / each / folder) for each in ("whole", "rest")
        )
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert (tmp_path / "whole" / folder / "tokenizer.json").is_file()
    if mode in ("mutual", "online"):
        assert any(line.get("peer_loss" if mode == "mutual" else "teacher_loss", 0) > 0 for line in history)


def test_a_teacher_that_is_trained_judges_as_it_was(options, inputs, tmp_path):
    """What was found with it is what is found with the same teacher read anew."""
    found = run(changed(asked(options, inputs, "online"), teacher_learning_rate=3e-2))["models"]
    judge = with_teacher(options, gather(options)).judge
    for name, folder in (("student", "out"), ("teacher after training", "out/trained-teacher")):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        again = judge.judge(name, model.eval()).held_out
        assert again.kl > 0.01
        for measure in ("kl", "top1_agreement", "probability_correlation"):
            assert found[name][measure] == pytest.approx(getattr(again, measure), rel=1e-5)


def test_a_schedule_reaches_the_second_student(options, monkeypatch):
    seen, loss = [], Mutual.loss

    def watched(self, *given):
        seen.append((self._term.kd.temperature, self._term.kd.soft_weight))
        return loss(self, *given)

    monkeypatch.setattr(Mutual, "loss", watched)
    changes = {"final_temperature": 1.0, "temperature_schedule": "linear"}
    changes |= {"final_soft_weight": 0.2, "weight_schedule": "linear"}
    metrics = run(options, teacher_mode="mutual", temperature=4.0, **changes)
    history = [line for line in metrics["training"]["student"]["history"] if "loss" in line]
    assert seen == [(line["temperature"], line["soft_weight"]) for line in history]
    assert len(set(seen)) == 6


def test_terms_are_trained_logged_and_resumed(options, tmp_path, monkeypatch, capsys):
    options = changed(options, terms=["hidden", json.dumps({"type": "attention", "weight": 0.5})])
    whole = run(options, output=str(tmp_path / "whole"))
    rest = changed(options, output=str(tmp_path / "rest"))
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(rest)
    monkeypatch.undo()
    run(rest, resume=True)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "rest")
    lines = [line for line in whole["training"]["student"]["history"] if "loss" in line]
    for line in lines:
        parts = 0.5 * line["soft"] + 0.5 * line["hard"] + line["hidden"] + 0.5 * line["attention"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "hidden: of a term" in page
    assert "attention=" in capsys.readouterr().err


def test_heads_that_predict_further_ahead_are_saved_beside_the_student(options, tmp_path):
    """A term that needs no teacher."""
    terms = ['{"type": "multi_token", "heads": 2}']
    found = run(options, soft_weight=0.0, hard_weight=1.0, terms=terms)
    assert all(line["multi_token"] > 0 for line in found["training"]["student"]["history"] if "loss" in line)
    heads = fastkd.MultiTokenHeads.from_pretrained(tmp_path / "out")
    assert len(heads) == 2


def test_attention_of_a_second_student(options):
    """Whose implementation is not the teacher's."""
    found = run(options, teacher_mode="mutual", terms=["attention"], max_steps=3)
    assert all(line["attention"] > 0 for line in found["training"]["student"]["history"] if "loss" in line)


def test_a_term_teaches_without_the_divergence(options):
    found = run(options, soft_weight=0.0, hard_weight=1.0, terms=["hidden"])
    lines = [line for line in found["training"]["student"]["history"] if "loss" in line]
    assert all(line["hidden"] > 0 and not line["soft"] for line in lines)


def test_a_file_has_terms_as_mappings(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("teaching:\n  terms:\n  - hidden\n  - {type: attention, weight: 0.5}\n  teacher_mode: ema\n")
    *groups, _ = Parser("distill", "", GROUPS).parse([str(file)])
    teaching = groups[-1]
    assert named_terms(teaching.terms) == [{"type": "hidden"}, {"type": "attention", "weight": 0.5}]
    file.write_text(dump(groups))  # which reads as the same
    assert Parser("distill", "", GROUPS).parse([str(file)])[-2] == teaching
    assert Parser("distill", "", GROUPS).parse([str(file), "--terms", "attention"])[-2].terms == ["attention"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema_decay": 0.5}, "ema_decay is 0.5, but teacher_mode is 'frozen': it is for ema"),
        ({"teacher_mode": "ema", "ema_decay": 1.0}, r"ema_decay is 1.0; it must be in \[0, 1\)"),
        ({"teacher_mode": "mixture"}, "takes several teachers: name them with more_teachers"),
        ({"teacher_mode": "mixture", "more_teachers": ["a"], "teacher_weights": [1.0]}, "1 numbers for 2 teachers"),
        ({"teacher_mode": "mixture", "more_teachers": ["a"], "teacher_weights": [1.0, -1.0]}, "none may be below 0"),
        ({"teacher_mode": "online", "teacher_learning_rate": 0.0}, "must be above 0"),
        ({"terms": ["{type: hidden}"]}, "is no JSON"),
        ({"terms": ['{"weight": 1}']}, "does not say its type"),
        ({"terms": ['["hidden"]']}, "does not say its type"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TeachingOptions(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_mode": "cached"}, "there is no cache_dir"),
        ({"teacher_mode": "ema", "cache_dir": "cache"}, "take cache_dir away"),
        ({"terms": ["hidden"], "cache_dir": "cache"}, "which no cache has"),
        ({"teacher_mode": "ema", "soft_weight": 0.0}, "nothing is taught"),
        ({"teacher_mode": "online", "teacher_quantization": "8bit"}, "cannot be trained"),
        ({"teacher_mode": "snapshot", "snapshot_every": 6}, "6 steps in 1 .* a snapshot is taken every 6 steps"),
        ({"teacher_mode": "snapshot", "max_steps": None, "epochs": 1.0}, "a snapshot is taken at each epoch's end"),
        ({"teacher_mode": "snapshot"}, r"6 steps in 1 epoch\(s\), and a snapshot is taken at each epoch's end"),
        (
            {"teacher_mode": "snapshot", "snapshot_every": 1000, "max_steps": None, "epochs": 3.0},
            r"steps in 3 epoch\(s\), and a snapshot is taken every 1000 steps",
        ),
        ({"teacher_mode": "mixture", "more_teachers": ["a"], "divergence": "mse"}, "Mixed cannot serve this loss"),
        ({"teacher_mode": "multi_view", "terms": ["attention"]}, "the view attention_dropout drops"),
        ({"terms": ["hiden"]}, "did you mean 'hidden'"),
        ({"terms": ['{"type": "hidden", "weight": -1}']}, "got -1"),
        ({"terms": ['{"type": "hidden", "layer": "uniform"}']}, "did you mean 'layers'"),
        ({"terms": ['{"type": "hidden", "layers": [[0, 9]]}']}, "9"),
        ({"teacher_mode": "routed", "more_teachers": ["a"]}, "2 teachers for 1 corpora"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_any_work(options, tmp_path, monkeypatch, values, message):
    monkeypatch.setattr("fastkd.training.loading.load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    with pytest.raises(InputError, match=message):
        run(options, **values)
    assert not (tmp_path / "out").exists()


def test_teachers_of_another_tokenizer_are_refused(options, inputs, tmp_path):
    other = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    other.add_tokens(["unheard"])
    transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher").save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="the tokenizers differ in 1 tokens"):
        run(options, teacher_mode="mixture", more_teachers=[str(tmp_path / "other")])


@pytest.mark.parametrize("mode", ["mixture", "routed", "mutual"])
def test_a_model_beside_the_teacher_may_be_padded(options, inputs, tmp_path, mode):
    """Its head has four rows more than the tokenizer has tokens."""
    other = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    other.resize_token_embeddings(other.config.vocab_size + 4, mean_resizing=False)
    other.save_pretrained(tmp_path / "padded")
    transformers.AutoTokenizer.from_pretrained(inputs / "teacher").save_pretrained(tmp_path / "padded")
    padded = str(tmp_path / "padded")
    given = {"peer": padded} if mode == "mutual" else {"more_teachers": [padded]}
    found = run(changed(asked(options, inputs, mode), max_steps=2, **given))
    assert all(line["soft"] > 0 for line in found["training"]["student"]["history"] if "loss" in line)


def test_models_beside_the_teacher_have_positions_for_the_text(options, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.training.setup.load_corpus", lambda *_: pytest.fail("text was read"))
    (tmp_path / "short.json").write_text(json.dumps(STUDENT | {"n_positions": 8}))
    with pytest.raises(InputError, match="max_length 16 is more than the peer's 8 positions"):
        run(options, teacher_mode="mutual", peer=str(tmp_path / "short.json"))
    config = transformers.AutoConfig.from_pretrained(inputs / "teacher", max_position_embeddings=8)
    for one in (config, transformers.AutoTokenizer.from_pretrained(inputs / "teacher")):
        one.save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match="max_length 16 is more than the teacher 2's 8 positions"):
        run(options, teacher_mode="mixture", more_teachers=[str(tmp_path / "short")])


def test_two_of_the_same_weights_are_refused(options, inputs):
    student = str(inputs / "teacher")
    with pytest.raises(InputError, match="name another peer"):
        run(options, student=student, teacher_mode="mutual")


def test_sets_of_a_sweep():
    assert term_set("none") == []
    assert term_set("hidden+attention") == ["hidden", "attention"]
    assert set_title(term_set("hidden+attention")) == "hidden + attention"
    assert set_title(term_set("none")) == "none"
    assert set_title(
        term_set('[{"type": "attention", "relation": "qk", "weight": 0.5}, "hidden", {"type": "hidden"}]')
    ) == ("attention (relation qk, weight 0.5) + hidden + hidden")
    assert term_set('["hidden", {"type": "attention"}]') == ["hidden", '{"type": "attention"}']
    with pytest.raises(InputError, match="no JSON"):
        term_set("[hidden")


def sets_of(*arguments):
    grid, _ = Parser("sweep", "", (command.SweepOptions,)).parse([*map(str, arguments)])
    return grid, [term_set(given) for given in grid.terms]


@pytest.mark.parametrize(
    ("terms", "sets"),
    [
        (["hidden", "attention"], [["hidden", "attention"]]),
        ("hidden", [["hidden"]]),
        ([{"type": "hidden", "layers": "last:2"}], [['{"type": "hidden", "layers": "last:2"}']]),
        ([], [[]]),
        ("none", [[]]),
        (["none", "hidden"], [[], ["hidden"]]),
        ([["hidden"], "attention"], [["hidden"], ["attention"]]),
        (["hidden+attention", "hidden"], [["hidden", "attention"], ["hidden"]]),
        ([["hidden", {"type": "attention"}]], [["hidden", '{"type": "attention"}']]),
    ],
)
def test_terms_of_a_sweeps_file(tmp_path, terms, sets):
    """A distillation's are one set. What a sweep writes, it reads as the same."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"terms": terms}, sort_keys=False))
    grid, found = sets_of(file)
    assert found == sets
    file.write_text(dump([grid]))
    assert sets_of(file) == (grid, sets)


def test_terms_of_a_sweeps_flags_are_sets(tmp_path):
    """The file that keeps them has them as sets too, and flags win over any file's."""
    grid, found = sets_of("--terms", "hidden", "attention")
    assert found == [["hidden"], ["attention"]]
    assert [cell.terms for cell in grid.cells()][-2:] == ["hidden", "attention"]
    (tmp_path / "config.yaml").write_text(dump([grid]))
    assert sets_of(tmp_path / "config.yaml") == (grid, found)
    assert sets_of(tmp_path / "config.yaml", "--terms", "multi_token")[1] == [["multi_token"]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema_decay": 0.5}, "ema_decay is 0.5, but teacher_mode is 'frozen': it is for ema"),
        ({"peer": "x", "teacher_mode": ["frozen", "ema"]}, "but teacher_mode is 'frozen' and 'ema': it is for mutual"),
        ({"alpha": [0.0], "terms": ["hidden"]}, "terms is .*hidden.*no teacher"),
        ({"alpha": [1.0], "alpha_on": "hard", "teacher_mode": ["frozen", "ema"]}, "teacher_mode is .*no teacher"),
        ({"alpha": [0.0], "assistant": "x.json"}, "assistant is 'x.json'.*no teacher"),
        ({"terms": ["none", "[hidden"]}, "no JSON"),
    ],
)
def test_what_no_student_of_a_sweep_has_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        command.SweepOptions(**values)
    taken = {"ema_decay": 0.5, "teacher_mode": ["frozen", "ema"], "alpha": [0.0, 0.5], "terms": ["none", "hidden"]}
    assert command.SweepOptions(**taken).cells()


@pytest.fixture
def sweep_flags(inputs, tmp_path):
    """Of a sweep of short runs, with an assistant."""
    settings = {"max_steps": "4", "eval_steps": "4", "batch_size": "16", "eval_windows": "4", "device": "cpu"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    places = {"teacher": "teacher", "data": "text.txt", "assistant": "student.json"}
    flags += [f"--{name}={inputs / file}" for name, file in places.items()]
    return [*flags, "--max-length=16", "--out-of-domain=none", f"--output={tmp_path / 'sweep'}", "--temperature", "1"]


def test_cells_of_a_sweep_leave_the_teacher_as_it_was(sweep_flags, monkeypatch):
    """Attention is eager where a term needs it alone; a student is made of the teacher, not of its assistant."""
    seen = []

    def fit(setup, student, given, directory):
        directory.mkdir(parents=True, exist_ok=True)
        teacher = setup.teacher.config
        seen.append((student.config.model_type, teacher.model_type, teacher._attn_implementation))

    monkeypatch.setattr(command, "_fit", fit)
    made = ["--student-layers", "last:1", "--alpha", "0.5"]
    assert main(["sweep", *sweep_flags, *made, "--terms", "none", "attention"]) == 0
    assert [kinds[:2] for kinds in seen] == [
        ("llama", "llama"),
        ("llama", "llama"),
        ("gpt2", "llama"),  # the assistant learns
        ("llama", "gpt2"),  # and teaches
    ]
    implementations = [kinds[2] for kinds in seen[:3]]
    assert implementations[1] == "eager"
    assert implementations[0] == implementations[2] != "eager"


@pytest.mark.parametrize(
    ("assistant", "terms", "message"),
    [
        ({"n_positions": 8}, "none", "student's place: max_length 16 is more than the student's 8 positions"),
        ({"vocab_size": 5}, "none", "student's place: the student's vocabulary has 5 ids"),
        ({}, '{"type": "hidden", "layers": [[0, 2]]}', "teacher's place: terms: "),
        ("other tokenizer", "none", "student's place: the tokenizers differ in 1 tokens"),
    ],
)
def test_an_assistant_that_cannot_learn_or_teach_is_refused_before_any_work(
    sweep_flags, inputs, tmp_path, monkeypatch, capsys, assistant, terms, message
):
    monkeypatch.setattr("fastkd.training.loading.load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    place = tmp_path / "assistant"
    if isinstance(assistant, dict):
        place.write_text(json.dumps(STUDENT | assistant))
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
        tokenizer.add_tokens(["unheard"])
        for one in (tokenizer, transformers.AutoConfig.from_pretrained(inputs / "teacher")):
            one.save_pretrained(place)
    flags = [*sweep_flags, f"--student={inputs / 'student.json'}", f"--assistant={place}", "--alpha", "0.5"]
    assert main(["sweep", *flags, "--terms", terms]) == 2
    told = capsys.readouterr().err
    assert f"the assistant {str(place)!r}, in the {message}" in told
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_too_short_for_a_mode_is_refused_before_any_work(sweep_flags, inputs, monkeypatch, capsys):
    monkeypatch.setattr("fastkd.training.loading.load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    flags = [*sweep_flags, f"--student={inputs / 'student.json'}", "--teacher-mode", "frozen", "snapshot"]
    assert main(["sweep", *flags]) == 2
    assert "4 steps in 1 epoch(s), and a snapshot is taken at each epoch's end" in capsys.readouterr().err


def test_cells_of_a_sweep_may_have_padded_teachers(sweep_flags, inputs, tmp_path, monkeypatch):
    """The ids that count are those of each cell's own models."""
    seen, size = [], transformers.AutoConfig.from_pretrained(inputs / "teacher").vocab_size

    def fit(setup, student, given, directory):
        directory.mkdir(parents=True, exist_ok=True)
        seen.append(setup.counted)

    monkeypatch.setattr(command, "_fit", fit)
    config = transformers.AutoConfig.from_pretrained(inputs / "teacher", vocab_size=size + 4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "padded")
    transformers.AutoTokenizer.from_pretrained(inputs / "teacher").save_pretrained(tmp_path / "padded")
    flags = [*sweep_flags, f"--student={inputs / 'student.json'}", "--alpha", "0.5"]
    flags += ["--teacher-mode", "frozen", "mixture", f"--more-teachers={tmp_path / 'padded'}"]
    assert main(["sweep", *flags, f"--assistant={tmp_path / 'padded'}"]) == 0
    assert seen == [None, size, size, size]  # frozen, mixture, the assistant, and the student that it teaches


def test_an_ablation(sweep_flags, inputs, tmp_path, capsys):
    """One thing differs from the first of each; seeds have a spread; what is resumed goes on."""
    flags = [*sweep_flags, f"--student={inputs / 'student.json'}"]
    flags += ["--alpha", "0", "0.5", "--terms", "none", "hidden", "--teacher-mode", "frozen", "ema"]
    flags += ["--seeds", "0", "1"]
    assert main(["sweep", *flags]) == 0
    rows = (tmp_path / "sweep" / "results.csv").read_text().splitlines()
    header = rows[0].split(",")
    kinds = [tuple(row.split(",")[header.index(name)] for name in ("teacher", "terms")) for row in rows[1:]]
    expected = [("frozen", "none"), ("frozen", "hidden"), ("ema", "none"), ("progressive", "none"), ("–", "none")]
    assert sorted(kinds) == sorted(expected)
    assert "kl_spread" in header
    text = (tmp_path / "sweep" / "results.md").read_text()
    assert text.count("±") > len(expected)
    assert (tmp_path / "sweep" / "ablation.png").is_file()
    assert "student 10 of 10" in capsys.readouterr().out
