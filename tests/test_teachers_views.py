"""A student that teaches itself on inputs made harder: what views do, and whose random numbers they draw."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.nn import functional

import fastkd
from fastkd.teachers import VIEWS, MultiView
from fastkd.terms import KDTerm
from tests import compare
from tests.teachers import (
    LENGTH,
    ROWS,
    VOCAB,
    assert_resumed_is_uninterrupted,
    counted,
    double,
    gpt2,
    inputs,
    kl,
    labelled,
    loss_of,
    rows_of,
    transformers,
)


@pytest.fixture(autouse=True)
def _one_thread(_restore_globals):
    torch.set_num_threads(1)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def said(mode, student, step=0):
    return mode.outputs(student, inputs(step)).projection.logits()


def reversed_text(found):
    return {**found, "input_ids": found["input_ids"].flip(1)}


def test_value_and_gradient_are_the_formulas():
    """Of a view that is known: the teacher's side has no gradient."""
    student = gpt2(0)
    exact, eager = copy.deepcopy(student).double(), copy.deepcopy(student)

    def formula(model):
        found, batch = labelled(0)
        with torch.no_grad():
            above, _ = rows_of(model(**reversed_text(found)).logits, batch.labels)
        below, labels = rows_of(model(**found).logits, batch.labels)
        return 0.5 * kl(above, below, 2.0) + 0.5 * functional.cross_entropy(below, labels)

    truth, near = formula(exact), formula(eager)
    loss, added = loss_of(MultiView(reversed_text), student, 0, KDTerm(fastkd.KDLoss(2.0)))
    assert added == {}
    for one in (truth, near, loss):
        one.backward()
    compare.assert_value(loss, truth, near)
    ours, yardstick, judge = (
        torch.cat([weight.grad.flatten() for weight in model.parameters()]) for model in (student, eager, exact)
    )
    compare.assert_gradient(ours, yardstick, judge)


def test_one_more_forward_a_batch():
    student = gpt2(0)
    calls = counted(student)
    loss_of(MultiView(list(VIEWS)), student, 0, KDTerm())
    assert len(calls) == 2


@pytest.mark.parametrize("make", [lambda: gpt2(0), llama])
def test_every_weight_learns_under_autocast(make):
    """Both forwards are in one context and in 16 bits. The first one caches nothing, which would have no graph."""
    student, seen = make(), set()

    def watch(_module, _args, found):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), found.dtype))

    for module in student.modules():
        if type(module).__name__ in ("Conv1D", "Linear") and module is not student.lm_head:
            module.register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_of(MultiView(), student, 0, KDTerm())
    loss.backward()
    assert not [name for name, weight in student.named_parameters() if weight.grad is None]
    assert seen == {(False, False, torch.bfloat16), (True, True, torch.bfloat16)}


def test_dropped_tokens_have_no_embedding():
    """Of a model without positions that sees one token a row: its logits are those of a zero vector, or the plain."""
    student = double(gpt2(0)).eval()
    with torch.no_grad():
        student.transformer.wpe.weight.zero_()
    ids = torch.arange(VOCAB)[:, None]
    found = MultiView("token_dropout:0.4").outputs(student, {"input_ids": ids}).projection.logits()[:, 0]
    with torch.no_grad():
        plain = student(ids).logits[:, 0]
        nothing = student(inputs_embeds=torch.zeros(1, 1, 16, dtype=torch.float64)).logits[0, 0]
    dropped = [torch.allclose(row, nothing, atol=1e-9) for row in found]
    assert all(
        gone != torch.allclose(row, own, atol=1e-9) for gone, row, own in zip(dropped, found, plain, strict=True)
    )
    assert 0.2 * VOCAB < sum(dropped) < 0.6 * VOCAB
    torch.testing.assert_close(student(ids).logits[:, 0], plain)  # nothing is left behind


def test_replaced_tokens_are_of_the_batch():
    """Padding neither replaces nor is replaced."""
    seen = []
    student = gpt2(0)
    student.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["input_ids"]), with_kwargs=True)
    found = inputs(0)
    found["input_ids"] = torch.randint(3, 30, (ROWS, LENGTH))
    found["input_ids"][0, LENGTH - 2 :] = VOCAB - 1
    MultiView("token_replacement:0.5").outputs(student, found)
    changed = seen[0] != found["input_ids"]
    assert 0.2 < changed.float().mean() < 0.7
    assert set(seen[0][changed].tolist()) <= set(found["input_ids"][found["attention_mask"].bool()].tolist())
    assert torch.equal(seen[0][0, LENGTH - 2 :], found["input_ids"][0, LENGTH - 2 :])


@pytest.mark.parametrize("make", [lambda: gpt2(0).eval(), lambda: gpt2(0), lambda: llama().eval()])
def test_attention_dropout_is_the_models_own(make):
    """The same as the model gives with that rate in its configuration; afterwards it is as before."""
    student = make()
    before = [(module.training, getattr(module, "p", None)) for module in student.modules()]
    plain = student(**inputs(0)).logits
    found = said(MultiView("attention_dropout:0.5"), student)
    assert not torch.allclose(found[:, 1:], plain[:, 1:], atol=1e-2)
    assert [(module.training, getattr(module, "p", None)) for module in student.modules()] == before
    torch.testing.assert_close(student(**inputs(0)).logits, plain)
    mode = MultiView("attention_dropout:0.5")
    mode.calls = 1
    twin = copy.deepcopy(student).train()
    for module in twin.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        elif hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.5
    torch.manual_seed(mode._seed())
    torch.testing.assert_close(twin(**inputs(0)).logits, found)


def test_random_numbers_are_drawn_aside():
    """The training's own do not depend on a view, nor a view on them; every batch and seed has others."""
    student = gpt2(0)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    mode = MultiView(list(VIEWS))
    first = said(mode, student)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.allclose(said(mode, student), first)
    torch.manual_seed(2)
    assert torch.equal(said(MultiView(list(VIEWS)), student), first)
    assert not torch.allclose(said(MultiView(list(VIEWS), seed=1), student), first)


def test_processes_draw_different_numbers(monkeypatch):
    student = gpt2(0)
    alone = said(MultiView("token_dropout"), student)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    found = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        found.append(said(MultiView("token_dropout"), student))
    assert torch.equal(found[0], alone)
    assert not torch.allclose(found[1], alone)


def test_a_callable_is_seeded_too():
    def shuffled(found):
        return {**found, "input_ids": found["input_ids"][:, torch.randperm(LENGTH)]}

    student = gpt2(0)
    torch.manual_seed(3)
    first = said(MultiView([shuffled, "token_dropout"]), student)
    torch.manual_seed(4)
    assert torch.equal(said(MultiView([shuffled, "token_dropout"]), student), first)


def test_resumed_is_uninterrupted(tmp_path):
    def make():
        return gpt2(0, dropout=0.1), MultiView(list(VIEWS))

    _, rest = assert_resumed_is_uninterrupted(make, tmp_path)
    assert rest.mode.calls == 5


def test_features_are_of_the_augmented_input():
    student = gpt2(0)
    found = MultiView(reversed_text).outputs(student, inputs(0), {}, ("hidden_states",))
    expected = student(**reversed_text(inputs(0)), output_hidden_states=True).hidden_states
    for one, other in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad


def test_wrong_views_are_refused():
    with pytest.raises(ValueError, match="there is no view 'token_drop': there are token_dropout, "):
        MultiView("token_drop")
    for rate in ("0", "1", "-0.1", "nan", "much"):
        with pytest.raises(ValueError, match=f"the rate of view 'token_dropout:{rate}' must be"):
            MultiView([f"token_dropout:{rate}"])
    with pytest.raises(ValueError, match="there are no views"):
        MultiView([])
    with pytest.raises(TypeError, match="a view is a name or a callable, got int"):
        MultiView([random.random, 3])
    with pytest.raises(TypeError, match="seed must be an int"):
        MultiView(seed=0.5)
    with pytest.raises(ValueError, match=r"attention_dropout finds no module .* in Linear"):
        MultiView("attention_dropout").check(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attentions, which the view attention_dropout drops a part of"):
        MultiView().check(gpt2(0), ("hidden_states", "attentions"))
    MultiView().check(gpt2(0), ("hidden_states", "projections"))
    MultiView("token_dropout").check(gpt2(0), ("attentions",))
    with pytest.raises(ValueError, match="which Linear lacks"):
        MultiView("token_dropout").check(torch.nn.Linear(2, 2))
    embedded = {"inputs_embeds": torch.zeros(1, 3, 16)}
    for view in ("token_dropout", "token_replacement"):
        with pytest.raises(ValueError, match=rf"{view} needs batches with input_ids, got \['inputs_embeds'\]"):
            MultiView(view).outputs(gpt2(0), embedded)
