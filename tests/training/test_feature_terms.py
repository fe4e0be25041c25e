"""Terms of hidden states and attention in `KDTrainer`: projectors and maps are trained, and resumed bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastkd.terms import AttentionTerm, Course, HiddenStateTerm, Term, terms_named
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


class Watched(Term):
    """What a term finds under mixed precision."""

    needs = ("hidden_states",)
    students_blocks = frozenset({1})

    def forward(self, student, teacher, batch):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        assert [state is not None for state in student.hidden_states] == [False, False, True]
        assert student.hidden_states[2].dtype == torch.float32  # what `feature_memory` says of Trainer's outputs
        return batch.mean(student.hidden_states[2].square().mean(-1))


def test_terms_are_in_the_precision_of_the_training(tmp_path):
    """In 16 bits where it is, as their products on GPUs have to be; and no copy is made of blocks that none reads."""
    student, teacher = models()
    found = trainer(tmp_path, student, teacher=teacher, terms=[Watched("watched")], max_steps=1, bf16=True)
    found.train()
    assert len(logged(found, "watched")) == 1
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("courses", "message"),
    [
        ({"temperature": Course(2.0, -1.0, "linear")}, "the end of temperature must be a finite number > 0, got -1.0"),
        ({"temperature": Course(0.0, 2.0, "linear")}, "the start of temperature must be a finite number > 0, got 0.0"),
        ({"soft_weight": Course(0.5, 1.5, "cosine")}, r"the end of soft_weight is 1.5, more than .* = 1 of the loss"),
        ({"soft_weight": Course(0.5, float("nan"), "cosine")}, "the end of soft_weight must be a finite number"),
    ],
    ids=str,
)
def test_a_course_that_would_fail_on_the_way_is_refused_at_once(tmp_path, courses, message):
    student, teacher = models()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, student, teacher=teacher, **courses)


def test_a_course_has_one_of_three_shapes():
    with pytest.raises(ValueError, match="the shape of a course must be one of constant, linear, cosine, got 'cosin'"):
        Course(1.0, 0.0, "cosin")


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
