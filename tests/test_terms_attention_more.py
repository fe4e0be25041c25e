"""`AttentionTerm` where attention is more than a softmax of products: what is followed, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastkd.terms import AttentionTerm, Batch, relations
from tests import compare
from tests.features import VOCAB, batch, both, built, frozen, gpt2, gradients, llama, transformers, value_of

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3}


def gemma2(**config):
    return built(transformers.Gemma2Config(**{**SMALL, "query_pre_attn_scalar": 1, **config}), "eager")


def bloom():
    settings = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.3)
    return built(settings, "eager")


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


WINDOWED = {
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    "phimoe": {"sliding_window": 10},
    "llama4_text": {"attention_chunk_size": 10, "layer_types": ["chunked_attention"] * 2},
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_only_the_mask_has_is_seen_too(kind):
    settings = transformers.AutoConfig.for_model(
        kind, **SMALL, num_experts=2, num_local_experts=2, num_experts_per_tok=1, **WINDOWED[kind]
    )
    model, plain = built(settings, "sdpa"), frozen(llama(heads=2))
    term = AttentionTerm("last", relation="qk")
    term.check(model, plain)
    with pytest.raises(ValueError, match="window of 10 tokens is shorter than rows of 11"):
        value_of(term, model, plain, batch())


def test_eager_attention_that_is_not_looked_up_is_refused(monkeypatch):
    """Most models of transformers 5.0 call it without a look into the table."""
    monkeypatch.delattr(transformers.AttentionInterface, "get_interface")
    eager, fused = gpt2(), gpt2(attention="sdpa")
    with pytest.raises(ValueError, match=r"before transformers 5\.1: upgrade it, or take attn_implementation='sdpa'"):
        AttentionTerm(relation="qk").check(fused, frozen(eager))
    AttentionTerm(relation="qk").check(fused, frozen(gpt2(attention="sdpa")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_keys_are_not_summed_in_16_bits(dtype, monkeypatch):
    """Every chunk of queries adds to them. Their error is that of one rounding, whatever the number of chunks."""
    shape = 1, 6, 256, 8  # six heads: dividing by them rounds too
    given = [torch.randn(shape).to(dtype) for _ in range(4)]
    live = torch.ones(1, 256, dtype=torch.bool)
    monkeypatch.setitem(relations.CHUNK_BYTES, "cpu", 4 * 6 * 256 * 2)  # two queries

    def gradients_in(wanted):
        a, b, *teacher = (one.to(wanted) for one in given)
        a.requires_grad_(), b.requires_grad_()
        sides = (relations.Products(*pair, 8**-0.5, None) for pair in ((a, b), teacher))
        relations.divergence_of_rows(*sides, live).backward()
        return a.grad.double(), b.grad.double()

    for exact, found in zip(gradients_in(torch.float64), gradients_in(dtype), strict=True):
        assert (found - exact).norm() <= torch.finfo(dtype).eps * 0.5 * exact.norm()


def test_probabilities_of_fp16_are_refused_also_where_autocast_is_of_it():
    """Trainer hands the term fp32 copies of them, whose gradients are rounded to fp16 all the same."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = AttentionTerm()
    term.check(student, teacher)
    models = both(term, student, teacher, given)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="gradients of fp16 probabilities"):
        term(*models, given)


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
    model, plain = bloom(), llama()
    for models in ((model, plain), (plain, model)):
        with pytest.raises(ValueError, match="BloomForCausalLM has no attention that can be recorded"):
            AttentionTerm("last", relation=relation).check(*models)
    AttentionTerm("last").check(model, frozen(plain))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("relation", ["attention", "qk", "values"])
def test_reentrant_checkpointing_is_refused(relation):
    attention = "eager" if relation == "attention" else "sdpa"
    student, teacher, given = gpt2(attention=attention).train(), frozen(llama()), batch()
    early, late = AttentionTerm(relation=relation), AttentionTerm(relation=relation)
    late.check(student, teacher)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    at_once = [] if relation == "attention" else [lambda: early.check(student, teacher)]
    # Where it was enabled later, as Trainer does; and of probabilities, which some models return with their gradient.
    for refused in (*at_once, lambda: value_of(late, student, teacher, given)):
        with pytest.raises(ValueError, match=r"reentrant gradient checkpointing .*'use_reentrant': False"):
            refused()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    early.check(student, teacher)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_blocks_that_return_their_probabilities_may_be_checkpointed_reentrantly():
    student, teacher, given = bloom().train(), frozen(llama()), batch()
    term = AttentionTerm("last")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": True})
            student.enable_input_require_grads()
        term.check(student, teacher)
        student.zero_grad()
        value_of(term, student, teacher, given).backward()
        found.append(gradients(student))
    assert found[0].norm() > 0
    torch.testing.assert_close(*found)


def test_dropout_of_a_teacher_that_is_trained_is_refused():
    student, teacher = gpt2(), gpt2(attn_pdrop=0.1)
    with pytest.raises(ValueError, match=r"the teacher, which is trained, returns .* after a dropout of 0\.1"):
        AttentionTerm().check(student, teacher)
    AttentionTerm(relation="qk").check(student, teacher)
    AttentionTerm().check(student, frozen(teacher))
