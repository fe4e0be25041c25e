"""Students made from their teachers: the same function where all is kept, and one that works where it is not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import fastkd
from fastkd.students import keep_layers, narrow, parse_layers
from fastkd.students.activity import observed
from tests.causal_lms import V, batch, build, llama
from tests.students import DEEP, GPT2, MODELS, blocks, logits, shares_memory, skipping, tiny

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


def generated(model, use_cache):
    ids = torch.arange(3, 9).view(1, -1)
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, use_cache=use_cache, **kwargs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,2,4", [0, 2, 4]),
        ("0-8, 10, 12-13,29", [*range(9), 10, 12, 13, 29]),
        ("7", [7]),
        ("uniform:1", [0]),
        ("uniform:2", [0, 15]),
        ("uniform:4", [0, 8, 15, 22]),
        ("uniform:20", [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21, 22, 24, 26, 27, 28]),
        ("uniform:30", list(range(30))),
        ("last:3", [27, 28, 29]),
        ("every:7", [0, 7, 14, 21, 28]),
    ],
)
def test_layers_as_text(text, expected):
    assert parse_layers(text, 30) == expected


def test_uniform_is_as_even_as_integers_allow():
    for layers in range(1, 40):
        for count in range(1, layers + 1):
            found = parse_layers(f"uniform:{count}", layers)
            steps = {after - before for before, after in itertools.pairwise(found)}
            assert len(found) == count
            assert found[0] == 0
            assert not steps or max(steps) - min(steps) <= 1
            assert all(abs(one - place * layers / count) <= 0.5 for place, one in enumerate(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,2,9", "of which '9' is no block of a model that has 0 to 3"),
        ("0-9", "of which '0-9' is no block"),
        ("2-1", "of which '2-1' is no block"),
        ("0,0", "0 after 0; each block is taken once"),
        ("0-2,1", "1 after 2"),
        ("", "they must be indices from 0"),
        ("first:2", "'first:2'; they must be indices"),
        ("0,-1", "they must be indices"),
        ("uniform:5", "N must be from 1 to the model's 4 blocks"),
        ("every:0", "N must be from 1"),
    ],
)
def test_bad_layers_as_text(text, message):
    with pytest.raises(ValueError, match="layers") as refused:
        parse_layers(text, 4)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("layers", "message"), [([], "empty"), ([4], "has 4"), ([-1], "has -1"), ([1, 0], "0 after 1"), ([2, 2], "2 after")]
)
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        keep_layers(build("llama", **DEEP), layers)


def test_all_layers_kept_is_the_model(model):
    inputs = batch("right")
    student = keep_layers(model, range(4))
    torch.testing.assert_close(logits(student, inputs), logits(model, inputs), rtol=0, atol=0)
    assert not shares_memory(model, student)
    assert student.config.to_dict() == model.config.to_dict()


def test_a_block_less_is_the_model_without_it(model):
    """The judge is the model itself, with a hook that lets the hidden states past the blocks that are left out."""
    inputs, kept = batch("right"), [0, 3]
    student = keep_layers(model, kept)
    assert [len(blocks(one)) for one in (student, model)] == [2, 4]
    expected = logits(skipping(model, [1, 2]), inputs)
    torch.testing.assert_close(logits(student, inputs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3


def test_a_cache_changes_nothing(model):
    for student in (keep_layers(model, "1,3"), keep_layers(model, "last:1")):
        assert student.config.num_hidden_layers == len(blocks(student))
        assert torch.equal(generated(student, True), generated(student, False))


def test_it_is_saved_and_loaded(model, tmp_path):
    student = keep_layers(model, "uniform:2")
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = batch()
    torch.testing.assert_close(logits(loaded, inputs), logits(student, inputs), rtol=0, atol=0)


def test_ties_stay_and_training_works(model):
    student = keep_layers(model.requires_grad_(False), [0, 2]).train()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    student(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(weight.requires_grad for weight in student.parameters())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_settings_by_place_are_refused():
    model = build("gpt2", **GPT2, scale_attn_by_inverse_layer_idx=True)
    keep_layers(model, [0, 1])
    with pytest.raises(ValueError, match=r"block 3 at 1 would have attn.scaling 0.17.* in place of 0.08"):
        keep_layers(model, [0, 3])


def test_what_is_no_causal_lm():
    with pytest.raises(TypeError, match="got Linear"):
        keep_layers(torch.nn.Linear(2, 2), [0])
    model = llama()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is quantised \(torch.int8\)"):
        keep_layers(model, [0])


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(TypeError, match="with adapters: pass model"):
        keep_layers(model, [0])


def test_it_is_offered():
    assert fastkd.students.keep_layers is keep_layers


# A width ---------------------------------------------------------------------------------------------------------


WIDE, NARROW = 32, 16
#: What writes into the residual stream, along which axis: only channels that live are written to.
WRITES = {"embed_tokens.weight": 1, "o_proj.weight": 0, "down_proj.weight": 0}
WRITES |= {"wte.weight": 1, "wpe.weight": 1, "c_proj.weight": 1, "c_proj.bias": 0}


def half_dead(model):
    """Silence random halves of the channels and, by block, of the groups of heads and of the neurons, for ever.

    What lives has mean 0 over the channels, so that a LayerNorm of the living alone takes away the same mean, 0.
    """
    config = model.config
    size = getattr(config, "head_dim", None) or WIDE // config.num_attention_heads
    with torch.no_grad():
        dead = torch.randperm(WIDE)[: WIDE - NARROW]
        live = torch.tensor([one for one in range(WIDE) if one not in dead])
        for name, weight in model.named_parameters():
            for ending, axis in WRITES.items():
                if name.endswith(ending):
                    weight.index_fill_(axis, dead, 0.0)
                    weight.index_copy_(axis, live, centred(weight.index_select(axis, live), axis))
            if "norm" in name or ".ln_" in name:
                weight[dead] = 0.0
        for block in blocks(model):
            if hasattr(block, "attn"):
                rows = 2 * WIDE + choice(config.num_attention_heads, size)  # values are the last third
                silence(block.attn.c_attn, rows, axis=1)
                silence(block.mlp.c_fc, choice(4 * WIDE, 1), axis=1)
            else:
                silence(block.self_attn.v_proj, choice(config.num_key_value_heads, size), axis=0)
                silence(block.mlp.up_proj, choice(config.intermediate_size, 1), axis=0)
    return model


def centred(values, axis):
    return values - values.mean(axis, keepdim=True)


def choice(count, size):
    """The rows of a random half of `count` parts of `size` rows."""
    return (torch.randperm(count)[: count // 2, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def silence(projection, rows, axis):
    projection.weight.index_fill_(axis, rows, 0.0)
    if projection.bias is not None:
        projection.bias[rows] = 0.0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_what_is_dead_is_left_out(kind):
    """The student is the same function. Its norms divide by the root mean square of half as many channels."""
    eps = {"layer_norm_epsilon": 1e-12} if kind == "gpt2" else {"rms_norm_eps": 1e-12}
    model = half_dead(build(kind, **MODELS[kind] | eps))
    student = narrow(model, NARROW, [batch("right")])
    for module in student.modules():
        if "Norm" in type(module).__name__:
            module.weight.data *= (WIDE / NARROW) ** 0.5
    inputs = batch()
    torch.testing.assert_close(logits(student, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)  # RMSNorm is fp32
    assert student.num_parameters() < 0.5 * model.num_parameters()


def test_heads_of_one_group_are_shared_out():
    """One head of keys cannot be halved: half of its query heads go."""
    model = build("llama", **{**DEEP, "num_key_value_heads": 1})
    student = narrow(model, NARROW, [batch()])
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (16, 16)


def test_padding_does_not_count():
    model, whole = llama(), batch()
    short = {name: values[:, :4] for name, values in whole.items()}
    padded = {**whole, "attention_mask": whole["attention_mask"].clone()}
    padded["attention_mask"][:, 4:] = 0
    norms, projections = {"norm": model.model.norm}, {"down": model.model.layers[0].mlp.down_proj}
    ours, expected, other = (observed(model, [one], norms, projections) for one in (padded, short, whole))
    torch.testing.assert_close(ours.channels, expected.channels)
    torch.testing.assert_close(ours.inputs, expected.inputs)
    assert (other.channels - expected.channels).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("width", "batches", "message"),
    [
        (WIDE, [batch()], "width must be from 1 to 31, below the model's 32, got 32"),
        (0, [batch()], "width must be from 1 to 31"),
        (12, [batch()], "width 12 gives no whole number of heads: of 4 heads in 2 groups over 32 channels"),
        (12, [batch()], "widths of 16 do"),
    ],
)
def test_bad_widths(width, batches, message):
    with pytest.raises(ValueError, match="width") as refused:
        narrow(build("llama", **DEEP), width, batches)
    assert message in str(refused.value)


def test_without_text_nothing_is_ranked():
    with pytest.raises(ValueError, match="batches have no tokens"):
        narrow(build("llama", **DEEP), NARROW, [])


@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        ("gpt_neox", DEEP, "attention.query_key_value"),
        ("gptj", {**GPT2, "rotary_dim": 4}, "attn.k_proj"),  # its heads leave by `out_proj`
    ],
)
def test_unknown_projections_are_named(kind, config, name):
    with pytest.raises(ValueError, match=f"{name}.* does not know how"):
        narrow(build(kind, **config), NARROW, [batch()])


def test_embeddings_of_another_width_are_refused():
    model = build("opt", **DEEP, ffn_dim=32, word_embed_proj_dim=32)
    with pytest.raises(ValueError, match="word_embed_proj_dim=32: fastkd does not know"):
        narrow(model, NARROW, [batch()])


def test_norms_over_heads_are_of_the_heads_kept():
    model = build("olmo2", **DEEP)
    for layer in model.model.layers:
        silence(layer.self_attn.v_proj, torch.arange(8, 16), axis=0)  # so of two groups the first stays
    student = narrow(model, NARROW, [batch()])
    for ours, theirs in zip(student.model.layers, model.model.layers, strict=False):
        assert torch.equal(ours.self_attn.q_norm.weight, theirs.self_attn.q_norm.weight[:16])
        assert torch.equal(ours.self_attn.k_norm.weight, theirs.self_attn.k_norm.weight[:8])


def test_the_teacher_is_left_as_it_was():
    model = build("llama", **DEEP).train()
    before = copy.deepcopy(model.state_dict())
    student = narrow(model, NARROW, [batch()])
    assert model.training
    assert student.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_narrower(kind):
    model = tiny(kind)
    student = narrow(model, 16, [batch("right"), batch("left")])
    assert student.get_input_embeddings().weight.shape == (V, 16)
    assert student.config.hidden_size == 16
    assert student.config.num_attention_heads == 2
    assert torch.equal(generated(student, True), generated(student, False))
    assert not shares_memory(model, student)
    student.train()(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in student.parameters() if weight.requires_grad)
    ours, whole = (one.get_input_embeddings().weight is one.get_output_embeddings().weight for one in (student, model))
    assert ours == whole


def test_a_narrow_one_is_saved_and_loaded(model, tmp_path):
    student = narrow(model, NARROW, [batch("right")])
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = batch()
    torch.testing.assert_close(logits(loaded, inputs), logits(student, inputs), rtol=0, atol=0)


def test_students_are_made_without_random_numbers_and_without_weights():
    model, before = tiny("gemma3_text"), torch.get_rng_state()
    narrow(model, NARROW, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    assert torch.equal(torch.get_rng_state(), before)
    student = keep_layers(model.to("meta"), [0])
    assert {one.device.type for one in (*student.parameters(), *student.buffers())} == {"meta"}
