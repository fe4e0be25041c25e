"""The blocks that a student is best begun with, against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from fastkd.students import choose_layers
from fastkd.students.layers import kept_blocks
from tests.causal_lms import batch, build
from tests.students import DEEP, MODELS, blocks, logits, shares_memory, skipping, tiny

pytest.importorskip("transformers")


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


def divergence(model, left_out, inputs):
    """Mean KL(model ‖ model without these blocks) over the tokens that the mask leaves, in float64."""
    p, q = (logits(one, inputs).double().log_softmax(-1) for one in (model, skipping(model, left_out)))
    each = (p.exp() * (p - q)).sum(-1)
    return each[inputs["attention_mask"].bool()].mean().item()


def test_chosen_one_by_one_as_the_formula_says(model):
    """The judge leaves blocks out of the model itself, with hooks, and compares probabilities in float64."""
    inputs, gone = batch("right"), []
    for _ in range(3):
        left = [one for one in range(4) if one not in gone]
        gone.append(min(left, key=lambda one, gone=tuple(gone): divergence(model, [*gone, one], inputs)))
    for count in (1, 2, 3):
        expected = sorted(set(range(4)) - set(gone[: 4 - count]))
        assert (
            choose_layers(model, count, [{name: rows[:1] for name, rows in inputs.items()}, rest(inputs)]) == expected
        )
    assert choose_layers(model, 4, [inputs]) == [0, 1, 2, 3]


def rest(inputs):
    return {name: rows[1:] for name, rows in inputs.items()}


def test_blocks_that_do_nothing_go_first():
    model = build("llama", **DEEP)
    for index in (0, 2):
        for weight in (blocks(model)[index].self_attn.o_proj.weight, blocks(model)[index].mlp.down_proj.weight):
            weight.data.zero_()
    assert choose_layers(model, 2, [batch()]) == [1, 3]


def test_what_is_padded_does_not_choose():
    """Whatever is in the padding, the choice is that of the text, which is another than that of the whole."""
    model, whole = tiny("llama"), batch()
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    short = {name: values[:, :2] for name, values in whole.items()}
    padded = {**whole, "attention_mask": whole["attention_mask"].clone()}
    padded["attention_mask"][:, 2:] = 0
    chosen = [choose_layers(model, 2, [one]) for one in (short, padded)]
    assert chosen[0] == chosen[1]
    changes = [[divergence(model, [one], inputs) for one in range(4)] for inputs in (short, padded, whole)]
    assert changes[0] == pytest.approx(changes[1], rel=1e-5)
    assert changes[0] != pytest.approx(changes[2], rel=1e-2)


def test_choosing_leaves_the_model_as_it_was():
    model = tiny("gpt2").train()
    before = copy.deepcopy(model.state_dict())
    choose_layers(model, 2, [{**batch(), "labels": batch()["input_ids"]}])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())


def test_choosing_copies_no_weights():
    model = tiny("llama")
    left = kept_blocks(model, [0, 3], copy=False)
    assert shares_memory(model, left) == {weight.data_ptr() for weight in left.parameters()}


@pytest.mark.parametrize(
    ("count", "batches", "error", "message"),
    [
        (0, [batch()], ValueError, "count must be from 1 to the model's 4 blocks, got 0"),
        (5, [batch()], ValueError, "from 1 to the model's 4 blocks, got 5"),
        (2.0, [batch()], TypeError, "count must be an int"),
        (2, [], ValueError, "batches have no tokens to compare predictions on"),
    ],
)
def test_bad_choices(count, batches, error, message):
    with pytest.raises(error, match=message):
        choose_layers(build("llama", **DEEP), count, batches)


def test_predictions_that_are_not_finite_choose_nothing():
    model = build("llama", **DEEP)
    blocks(model)[1].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="predictions without block 0 are not finite"):
        choose_layers(model, 2, [batch()])
