"""`AttentionTerm` where attention is more than a softmax of products: what is followed, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastkd.terms import AttentionTerm, Batch
from tests import compare
from tests.features import VOCAB, batch, built, frozen, gpt2, gradients, llama, transformers, value_of

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3}


def gemma2(**config):
    return built(transformers.Gemma2Config(**{**SMALL, "query_pre_attn_scalar": 1, **config}), "eager")


def both_ways(student, teacher, given):
    """Value and gradient by the attentions that the models return, and by queries and keys."""
    found = []
    for relation in ("attention", "qk"):
        term = AttentionTerm("last:2", relation=relation)
        term.check(student, teacher)
        student.zero_grad()
        value = value_of(term, student, teacher, given)
        value.backward()
        found.append((value, gradients(student)))
    return found


def test_softcaps_are_followed():
    student, teacher = gemma2(attn_logit_softcapping=0.5), frozen(gemma2(attn_logit_softcapping=2.0))
    (returned, gradient), (made, ours) = both_ways(student, teacher, batch())
    compare.assert_value(made, returned)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)
    for model in (student, teacher):  # the caps matter
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    assert both_ways(student, teacher, batch())[0][0].item() != pytest.approx(returned.item(), rel=0.1)


def test_a_window_that_is_shorter_than_the_rows_is_refused():
    long, short = (gemma2(sliding_window=window) for window in (11, 10))
    (returned, _), (made, _) = both_ways(long, frozen(gemma2()), batch())
    compare.assert_value(made, returned)
    term = AttentionTerm("last:2", relation="qk")
    for models in ((short, long), (long, short)):
        term.check(*models)
        with pytest.raises(ValueError, match=r"window of 10 tokens is shorter than rows of 11: .*'attention'"):
            value_of(term, *models, batch())
    AttentionTerm("last:1", relation="qk").check(short, long)


def test_sinks_are_refused():
    settings = transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    model, plain = built(settings, "eager"), frozen(llama(heads=2))
    for relation in ("attention", "qk"):
        for whose, models in (("student", (model, plain)), ("teacher", (plain, model))):
            with pytest.raises(ValueError, match=f"the {whose}, GptOssForCausalLM, has attention sinks"):
                AttentionTerm("last", relation=relation).check(*models)


@pytest.mark.parametrize("relation", ["qk", "values"])
def test_masks_and_packed_rows_that_are_not_followed_are_refused(relation):
    student, teacher, given = llama(16, 2, 4), frozen(llama()), batch()
    term = AttentionTerm(relation=relation)
    term.check(student, teacher)
    mask = given.inputs["attention_mask"]
    square = torch.zeros(3, 1, 11, 11).masked_fill(~torch.ones(11, 11).tril().bool(), torch.finfo().min)
    with pytest.raises(ValueError, match=r"attention_mask \[batch, tokens\], got \(3, 1, 11, 11\)"):
        value_of(term, student, teacher, Batch(given.labels, {**given.inputs, "attention_mask": square}))
    positions = torch.arange(11).expand(3, -1).clone()
    packed = positions.clone()
    packed[0, 6:] -= 6
    for more in ({}, {"attention_mask": mask}):
        inputs = {"input_ids": given.inputs["input_ids"], **more}
        with pytest.raises(ValueError, match="position_ids begin again within a row"):
            value_of(term, student, teacher, Batch(given.labels, {**inputs, "position_ids": packed}))
        value_of(term, student, teacher, Batch(given.labels, {**inputs, "position_ids": positions}))
    padded = (mask.flip(1).cumsum(1) - 1).masked_fill(mask.flip(1) == 0, 1)  # as generation makes them
    value_of(
        term,
        student,
        teacher,
        Batch(
            given.labels.flip(1),
            {"input_ids": given.inputs["input_ids"], "attention_mask": mask.flip(1), "position_ids": padded},
        ),
    )


@pytest.mark.parametrize("relation", ["qk", "values"])
def test_models_without_the_table_are_refused_before_the_first_step(relation):
    settings = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4)
    model, plain = built(settings, "eager"), llama()
    for models in ((model, plain), (plain, model)):
        with pytest.raises(ValueError, match="BloomForCausalLM has no attention that can be recorded"):
            AttentionTerm("last", relation=relation).check(*models)
    AttentionTerm("last").check(model, frozen(plain))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("relation", ["qk", "values"])
def test_reentrant_checkpointing_is_refused(relation):
    student, teacher, given = gpt2(attention="sdpa").train(), frozen(llama()), batch()
    early, late = AttentionTerm(relation=relation), AttentionTerm(relation=relation)
    late.check(student, teacher)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    for refused in (
        lambda: early.check(student, teacher),
        lambda: value_of(late, student, teacher, given),  # where it was enabled later, as Trainer does
    ):
        with pytest.raises(ValueError, match=r"reentrant gradient checkpointing .*'use_reentrant': False"):
            refused()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    early.check(student, teacher)
    AttentionTerm("last").check(gpt2(), teacher)


def test_dropout_of_a_teacher_that_is_trained_is_refused():
    student, teacher = gpt2(), gpt2(attn_pdrop=0.1)
    with pytest.raises(ValueError, match=r"the teacher, which is trained, returns .* after a dropout of 0\.1"):
        AttentionTerm().check(student, teacher)
    AttentionTerm(relation="qk").check(student, teacher)
    AttentionTerm().check(student, frozen(teacher))
