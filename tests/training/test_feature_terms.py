"""Terms of hidden states and attention in `KDTrainer`: projectors and maps are trained, and resumed bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastkd.terms import AttentionTerm, Course, HiddenStateTerm, terms_named
from tests.features import frozen, gpt2, llama
from tests.training.test_trainer import logged, trainer, weights

TERMS = [
    {"type": "hidden", "layers": "learned", "weight": 0.5, "temperature": {"start": 1.0, "end": 0.1}},
    {"type": "attention", "relation": "qk", "weight": {"start": 0.2, "end": 0.0}},
]


def models():
    torch.manual_seed(3)
    return gpt2(16, 2, attention="sdpa"), frozen(llama(24, 3, attention="sdpa"))


def run(path, **settings):
    student, teacher = models()
    terms = terms_named(TERMS)
    torch.manual_seed(4)
    found = trainer(path, student, teacher=teacher, terms=terms, max_steps=6, **settings)
    found.args.optim = "adamw_torch"
    return found, terms


def test_resumed_is_uninterrupted(tmp_path):
    whole, (hidden, attention) = run(tmp_path / "whole", save_strategy="steps", save_steps=4)
    before = weights(hidden).clone()
    whole.train()
    assert hidden.learned.scores.any()
    assert not torch.equal(weights(hidden), before)
    assert hidden.temperature == pytest.approx(1.0 - 0.9 * 5 / 6)
    assert attention.weight == pytest.approx(0.2 / 6)
    rest, (resumed, _) = run(tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name in ("hidden", "attention"):
        assert len(logged(whole, name)) == 6
        assert logged(rest, name) == logged(whole, name)
    assert torch.equal(weights(resumed), weights(hidden))
    assert torch.equal(weights(rest.model), weights(whole.model))


def test_errors_come_before_the_first_step(tmp_path):
    student, teacher = models()
    for term, message in (
        (HiddenStateTerm([[0, 3]]), "names block 3 of the teacher, which has 3"),
        (HiddenStateTerm(projector="none"), "16 wide and the teacher's 24"),
        (AttentionTerm(), "attn_implementation='eager'"),
        (HiddenStateTerm(weight=Course(1.0, 0.0, "linear")), "which no cache has"),
    ):
        given = None if "cache" in message else teacher
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, student, teacher=given, terms=[term])
