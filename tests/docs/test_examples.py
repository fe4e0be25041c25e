"""Every script of `examples/` runs, is short, and lowers its loss."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"chat": "trl", "lora": "peft", "trl_gkd": "trl"}
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")


@pytest.fixture(autouse=True)
def beside_tiny(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def loaded(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name, tmp_path):
    main = loaded(name)["main"]
    losses = main(*[str(tmp_path)] * main.__code__.co_argcount)
    tenth = max(len(losses) // 10, 1)
    assert sum(losses[-tenth:]) < 0.9 * sum(losses[:tenth])


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_says_how_to_run_it(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    assert f"python examples/{name}.py" in source


def test_the_page_has_each():
    page = (EXAMPLES.parent / "docs/examples.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f'"examples/{name}.py"' not in page] == []
    assert page.count('"examples/') == len(SCRIPTS)


def test_trl_has_the_same_loss(tmp_path):
    """The first step, whose batch is the same, of the example and of TRL's own trainer."""
    example = loaded("trl_gkd")
    ours, theirs = (
        example["train"](str(tmp_path), kind, steps=1)[0]
        for kind in (example["FusedGKDTrainer"], example["GKDTrainer"])
    )
    assert ours == pytest.approx(theirs, rel=2e-4)  # as logged, 4 digits


def test_chat_scores_answers_alone(tmp_path):
    import tiny

    example = loaded("chat")
    trainer = example["trainer"](str(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    for labels in batch["labels"]:
        answer = tiny.tokenizer().decode(labels[labels != -100])
        assert answer.startswith("The capital of")
        assert answer.endswith(".<eos>")
