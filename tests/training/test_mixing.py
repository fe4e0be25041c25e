"""Several corpora in wanted shares: what is mixed, what is judged by corpus, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from fastkd.cli import main
from fastkd.training.configuration import Parser
from fastkd.training.data import Windows, all_windows, load_corpus
from fastkd.training.judge import CE_ONLY, STUDENT, TEACHER
from fastkd.training.mixing import apportioned, mix, shares, without_repeats
from fastkd.training.options import GROUPS, DataOptions, InputError
from tests.training.conftest import changed, run
from tests.training.test_resume import interrupt_after, outcome

NAMES, WEIGHTS = ["reviews.txt", "news.txt", "code.txt"], [0.5, 0.3, 0.2]


def numbered(*sizes: int) -> list[torch.Tensor]:
    """Windows [n, 2] that say their corpus and their place in it."""
    return [torch.tensor([[task, number] for number in range(size)]) for task, size in enumerate(sizes)]


@pytest.fixture
def tokenizer(inputs):
    return transformers.AutoTokenizer.from_pretrained(inputs / "teacher")


@pytest.fixture
def corpora(inputs: Path, tmp_path: Path) -> list[str]:
    """Three files, of what the teacher wrote and of other text; one document is in two of them."""
    lines = (inputs / "text.txt").read_text().splitlines()
    known = [lines[:110], lines[109:180], [" ".join(reversed(line.split())) for line in lines[180:]]]
    for name, some in zip(NAMES, known, strict=True):
        (tmp_path / name).write_text("\n".join(some))
    return [str(tmp_path / name) for name in NAMES]


@pytest.fixture
def mixture(options, corpora):
    """A run on the three."""
    return changed(
        options, data=corpora[0], mix_data=corpora[1:], mix_weights=WEIGHTS, max_steps=6, eval_steps=3, eval_windows=8
    )


@pytest.mark.parametrize(
    ("weights", "total"), [(WEIGHTS, 200), ([1, 1, 1], 200), ([5, 3, 2], 7), ([0.7, 0.2, 0.1], 1), ([1e-3, 1, 2], 50)]
)
def test_shares_are_exact_to_a_window_wherever_one_stops(weights, total):
    found = mix(numbered(200, 150, 140), weights, total)
    assert len(found) == len({tuple(row) for row in found.tolist()}) == total  # and none is taken twice
    for stop in range(1, total + 1):
        for task, weight in enumerate(weights):
            assert abs((found[:stop, 0] == task).sum().item() - stop * weight / sum(weights)) < 1 + 1e-9


def test_what_shares_come_to():
    assert apportioned(10, [0.5, 0.3, 0.2]) == [5, 3, 2]
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]  # the first of equals has the window that is left
    assert apportioned(7, [0.55, 0.35, 0.1]) == [4, 2, 1]  # 3.85, 2.45 and 0.7
    assert sum(apportioned(10**7, [0.1] * 10)) == 10**7
    assert without_repeats([70, 30], [0.7, 0.3]) == 100  # 70 / 0.7 is 99.99… in binary
    assert without_repeats([70, 29], [0.7, 0.3]) == 96
    assert len(mix(numbered(70, 29), [0.7, 0.3])) == 96


def test_a_mixture_is_the_seeds_and_another_corpus_changes_nothing_of_the_first():
    windows = numbered(40, 30, 30)
    found = mix(windows, WEIGHTS, 50, seed=3)
    assert torch.equal(found, mix(windows, WEIGHTS, 50, seed=3))
    assert not torch.equal(found, mix(windows, WEIGHTS, 50, seed=4))
    two = mix(windows[:2], WEIGHTS[:2], 40, seed=3)
    assert torch.equal(found[found[:, 0] < 2][:, 1].sort().values, two[:, 1].sort().values)
    before = torch.random.get_rng_state()
    mix(windows, WEIGHTS)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are drawn


def test_a_corpus_that_is_too_small_is_refused_or_repeated():
    windows = numbered(60, 10)
    with pytest.raises(InputError, match=r"corpus 2 has 10 windows, but its share of 100 is 40.*--mix-repeat"):
        mix(windows, [0.6, 0.4], 100)
    found = mix(windows, [0.6, 0.4], 100, repeat=True)
    theirs = torch.bincount(found[found[:, 0] == 1, 1])
    assert theirs.tolist() == [4] * 10
    with pytest.raises(InputError, match="nothing has 0 windows"):  # which no repeating helps
        mix(numbered(60, 0), [0.6, 0.4], 100, repeat=True, names=["all", "nothing"])
    with pytest.raises(InputError, match="3 weights for 2 corpora"):
        mix(windows, WEIGHTS)
    for weight in (0.0, -0.5, math.nan, math.inf):
        with pytest.raises(InputError, match=f"weights has {weight:g}; every weight"):
            mix(windows, [0.5, weight])


def test_each_corpus_is_split_by_itself_and_no_document_is_in_two_parts(corpora, tokenizer, capsys):
    data = DataOptions(corpora[0], mix_data=corpora[1:], mix_weights=[5, 3, 2], max_length=16, out_of_domain="none")
    corpus = load_corpus(data, tokenizer, 64, 0)
    assert "news.txt: 1 of 71 documents are in another corpus too" in capsys.readouterr().out
    alone = [load_corpus(DataOptions(name, max_length=16, out_of_domain="none"), tokenizer, 64, 0) for name in corpora]
    first, _, last = corpus.tasks
    for task, one in ((first, alone[0]), (last, alone[2])):
        for kind in ("train", "validation", "held_out"):
            assert torch.equal(getattr(task, kind), getattr(one, kind))
    assert [task.name for task in corpus.tasks] == NAMES
    assert [task.share for task in corpus.tasks] == WEIGHTS
    assert [task.used for task in corpus.tasks] == apportioned(2 * len(first.train), WEIGHTS)
    for kind in ("train", "validation", "held_out"):
        mixed = rows(getattr(corpus, kind))
        own = [rows(getattr(task, kind)) for task in corpus.tasks]
        counts = [len(mixed & one) for one in own]
        assert sum(counts) == len(mixed) == len(getattr(corpus, kind))
        assert counts == apportioned(len(mixed), WEIGHTS)
        for other in {"train", "validation", "held_out"} - {kind}:
            assert not mixed & set().union(*(rows(getattr(task, other)) for task in corpus.tasks))
    assert rows(first.train) <= rows(corpus.train)  # all of data's
    whole, ends = all_windows(data, tokenizer), [all_windows(replace(data, mix_data=[], mix_weights=[1]), tokenizer)]
    ends.append(all_windows(replace(data, data=corpora[2], mix_data=[], mix_weights=[1]), tokenizer))
    assert torch.equal(whole[: len(ends[0])], ends[0])
    assert torch.equal(whole[-len(ends[1]) :], ends[1])
    assert len(whole) > len(ends[0]) + len(ends[1])


def test_each_window_is_known_to_be_of_its_corpus(corpora, tokenizer):
    data = DataOptions(corpora[0], mix_data=corpora[1:], mix_weights=[5, 3, 2], max_length=16, out_of_domain="none")
    corpus = load_corpus(data, tokenizer, 64, 0)
    assert corpus.origins is not None
    for place, task in enumerate(corpus.tasks):
        assert rows(corpus.train[corpus.origins == place]) <= rows(task.train)
    example = Windows(corpus.train, corpus=corpus.origins)[3]
    assert example.keys() == {"input_ids", "labels", "corpus"}
    assert example["corpus"] == corpus.origins[3]


def rows(windows):
    return {tuple(row) for row in windows.tolist()}


def test_one_weight_is_datas_share():
    assert DataOptions("a.txt", mix_data=["b.txt"]).corpus_weights == [0.7, 0.3]
    assert DataOptions("a.txt", mix_data=["b.txt", "c.txt"], mix_weights=[0.5]).corpus_weights == [1.0, 0.5, 0.5]
    four = DataOptions("a.txt", mix_data=["b.txt", "c.txt", "d.txt"], mix_weights=[0.5])
    assert shares(four.corpus_weights) == [Fraction(1, 2), *[Fraction(1, 6)] * 3]
    assert DataOptions("a.txt", mix_data=["b.txt"], mix_weights=[2, 1]).corpus_weights == [2, 1]
    assert DataOptions("a.txt", mix_data=["", "b.txt"]).corpora == ["a.txt", "b.txt"]  # as an empty flag means none


def parsed(tmp_path, mapping, *flags):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mapping))
    return Parser("distill", "", GROUPS).parse([str(tmp_path / "config.yaml"), *flags])[1]


def test_a_file_says_weights_beside_or_with_the_names(tmp_path):
    names = ["org/name:config", r"C:\news.txt"]  # what has colons of its own
    beside = parsed(tmp_path, {"data": "a.txt", "mix_data": names, "mix_weights": WEIGHTS})
    mappings = [{"data": name, "weight": weight} for name, weight in zip(names, WEIGHTS[1:], strict=True)]
    inside = parsed(tmp_path, {"data": "a.txt", "mix_data": mappings})
    flags = parsed(tmp_path, {"data": "a.txt"}, "--mix-data", *names, "--mix-weights", "0.5", "0.3", "0.2")
    assert beside == inside == flags
    assert inside.mix_data == names
    assert inside.mix_weights == WEIGHTS
    assert parsed(tmp_path, {"mix_data": "b.txt", "task_weight": 0.6}).corpus_weights == [0.6, 0.4]
    assert parsed(tmp_path, {"mix_data": mappings}, "--mix-weights", "2", "1", "1").mix_weights == [2, 1, 1]
    assert parsed(tmp_path, {"mix_data": mappings}, "--mix-data", "b.txt").corpus_weights == [0.7, 0.3]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"mix_data": [{"data": "b.txt", "weight": 0.6}, {"data": "c.txt", "weight": 0.4}]}, r"sum to 1: data has"),
        ({"mix_data": [{"data": "b.txt", "weight": 0.6}, "c.txt"]}, "'c.txt': if one corpus has a weight, each is"),
        ({"mix_data": [{"name": "b.txt", "weight": 0.6}]}, r"a mapping {data: NAME, weight: SHARE}"),
        ({"mix_data": {"data": "b.txt", "weight": "much"}}, "the weight 'much' for b.txt: it must be a number"),
        ({"mix_data": {"data": "b.txt", "weight": -0.5}}, r"the weight -0.5 for b.txt: it must be in \(0, 1\)"),
        ({"mix_data": {"data": "b.txt", "weight": 0.5}, "mix_weights": [0.5, 0.5]}, "keep one"),
        ({"mix_weights": [0.5, 0.5], "mix_data": {"data": "b.txt", "weight": 0.5}}, "keep one"),
        ({"mix_data": ["b.txt", "c.txt"], "mix_weights": [0.5, 0.5]}, r"2 weights, but there are 3 corpora \(a.txt, b"),
        ({"mix_weights": [0.5, 0.5]}, "2 weights, but there are 1 corpora"),
        ({"mix_data": ["b.txt"], "mix_weights": [0.5, 0]}, "mix_weights has 0; every weight must be"),
        ({"mix_data": ["b.txt"], "mix_weights": [0.5, ".nan"]}, "mix_weights"),
        ({"mix_data": ["b.txt"], "mix_weights": 1}, "leaves nothing for b.txt"),
        ({"mix_data": ["./a.txt"]}, "./a.txt is mixed with itself"),
        ({"mix_data": ["b.txt", "c.txt", "b.txt"]}, "b.txt is mixed with itself"),
        ({"mix_repeat": True}, "no mix_data whose windows"),
    ],
)
def test_contradictions_are_refused(tmp_path, mapping, message):
    with pytest.raises(InputError, match=message):
        parsed(tmp_path, {"data": "a.txt", **mapping})


def test_what_the_text_does_not_give_is_refused_before_any_work(mixture, corpora, tmp_path):
    before = sorted(tmp_path.iterdir())
    Path(corpora[1]).write_text(Path(corpora[0]).read_text())
    with pytest.raises(InputError, match=r"news.txt holds no document that .*reviews.txt does not hold too"):
        run(mixture)
    Path(corpora[1]).write_text("old\nfilm\nsnow")
    with pytest.raises(InputError, match=r"documents of .*news.txt are shorter than one window of 16 tokens"):
        run(mixture)
    Path(corpora[1]).write_text("old film")
    with pytest.raises(InputError, match=r"news.txt has only 1 distinct document"):
        run(mixture)
    some = Path(corpora[0]).read_text().splitlines()
    Path(corpora[1]).write_text("\n".join(f"{line} {line}" for line in some[:5]))
    with pytest.raises(InputError, match=r"news.txt has \d windows, but its share of \d+ is \d\d"):
        run(mixture)
    with pytest.raises(InputError, match=r"the weight 1e-06 of news.txt is no window of"):
        run(mixture, mix_weights=[0.9, 1e-6, 0.1])
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_is_judged_on_each_corpus(mixture, tokenizer, tmp_path, capsys):
    found = run(mixture, ce_baseline=True, cache_dir=str(tmp_path / "cache"))
    out, corpus = tmp_path / "out", load_corpus(mixture.data, tokenizer, 8, 0)
    shown = capsys.readouterr().out
    for task in corpus.tasks:
        counts = torch.ones(len(tokenizer), dtype=torch.float64)
        for token in task.train.flatten().tolist():
            counts[token] += 1
        baseline = -(counts / counts.sum()).log()[task.held_out[:, 1:]].mean().item()
        judged = {name: found["models"][name]["tasks"][task.name] for name in (TEACHER, STUDENT, CE_ONLY)}
        losses = {name: one["held_out"]["loss"] for name, one in judged.items()}
        assert judged[TEACHER]["kl"] == 0
        for name, one in judged.items():
            assert one["share"] == task.share
            assert one["held_out"]["windows"] == len(task.held_out)
            assert one["perplexity"] == pytest.approx(math.exp(losses[name]))
            wanted = 100 * (baseline - losses[name]) / (baseline - losses[TEACHER])
            known = losses[TEACHER] < baseline  # of reversed text the teacher knows nothing
            assert known == (task.name != "code.txt")
            assert one["retention"] == (pytest.approx(wanted, abs=1e-6) if known else None)
        assert judged[STUDENT]["kl"] > 0
        assert judged[STUDENT] != judged[CE_ONLY]
        assert f"{task.name}: KL(teacher ‖ student)" in shown
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["model"], row["task"]) for row in table] == [
        (model, task) for model in (TEACHER, STUDENT, CE_ONLY) for task in ("mixture", *NAMES)
    ]
    assert float(table[5]["kl"]) == found["models"][STUDENT]["tasks"]["reviews.txt"]["kl"]
    assert float(table[5]["kl_low"]) <= float(table[5]["kl"]) <= float(table[5]["kl_high"])
    assert json.loads((out / "metrics.json").read_text())["models"][STUDENT] == found["models"][STUDENT]
    page = (out / "report.html").read_text()
    assert "Each task" in page
    assert {"tasks-retention", "tasks-kl"} <= set(re.findall(r"tasks-[a-z]+", page))
    before = found["models"][STUDENT]["tasks"]
    assert main(["eval", str(out)]) == 0
    again = json.loads((out / "eval" / "metrics.json").read_text())
    for name, one in before.items():
        assert again["models"][STUDENT]["tasks"][name]["kl"] == pytest.approx(one["kl"], rel=1e-4)


def test_a_run_on_one_corpus_has_no_tasks(options, tmp_path, capsys):
    found = run(options, max_steps=2, eval_steps=2)
    assert "tasks" not in found["models"][STUDENT]
    with (tmp_path / "out" / "results.csv").open() as file:
        assert "task" not in next(csv.reader(file))
    assert "Each task" not in (tmp_path / "out" / "report.html").read_text()
    assert "text.txt: perplexity" not in capsys.readouterr().out


def test_an_interrupted_mixture_is_resumed_to_the_bit(mixture, corpora, tmp_path, monkeypatch):
    mixture = changed(mixture, logging_steps=1)
    whole = run(mixture, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run(mixture)
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {"train_text", "corpus_1_text", "corpus_2_text", "corpus_3_text"} <= state["inputs"].keys()
    kept = Path(corpora[2]).read_text()
    Path(corpora[2]).write_text(kept.replace("snow", "film"))
    with pytest.raises(InputError, match="corpus 3 text changed"):
        run(mixture, resume=True)
    Path(corpora[2]).write_text(kept)
    monkeypatch.chdir("/")
    assert main(["distill", str(tmp_path / "out" / "config.yaml"), "--resume"]) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    resumed = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert resumed["models"][STUDENT]["tasks"] == whole["models"][STUDENT]["tasks"]
    assert resumed["models"][STUDENT]["held_out"] == whole["models"][STUDENT]["held_out"]


def test_a_sweep_is_judged_on_the_mixtures_validation_text(mixture, tokenizer, monkeypatch):
    from fastkd.training import evaluation
    from fastkd.training.commands.sweep import SweepOptions, sweep

    seen = []
    unpatched = evaluation.predict

    def predict(model, windows, *others):
        seen.append(windows)
        return unpatched(model, windows, *others)

    monkeypatch.setattr("fastkd.training.judge.predict", predict)
    rows = sweep(mixture, SweepOptions(alpha=[0.5], temperature=[2.0]))
    corpus = load_corpus(mixture.data, tokenizer, 8, 0)
    assert all(torch.equal(windows, corpus.validation) for windows in seen)
    assert len(seen) == 3  # the teacher, the student before, the student
    assert rows[0]["loss"] > 0
