"""Extra heads predict what they promise, see nothing they must not, and count what counts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd.terms import Batch, Course, Outputs, outputs_of
from tests import compare

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROWS, TOKENS, VOCAB, WIDTH = 3, 9, 61, 16
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 24}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {"gpt2": GPT2, "llama": DECODER, "qwen2": DECODER, "qwen3": DECODER}
#: Blocks of another width of attention in each layer; no rotary embedding in every fourth.
LISTED = {"gemma3_text": {**DECODER, "sliding_window": 4}, "smollm3": {**DECODER, "no_rope_layers": [1, 0]}}
#: Embeddings are scaled, wherever they come from.
LISTED |= {"granite": {**DECODER, "embedding_multiplier": 12.0}}


def causal_lm(kind: str, std: float = 0.4, **changed):
    config = transformers.AutoConfig.for_model(kind, **{**{**KINDS, **LISTED}[kind], **changed})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return random_weights(model, std)


def random_weights(model: nn.Module, std: float = 0.4):
    """Far from the initial ones, at which attention hardly looks anywhere and logits are flat."""
    for weight in model.parameters():
        nn.init.normal_(weight, std=std)
    return model


def heads_of(model, n: int = 2, **options) -> fastkd.MultiTokenHeads:
    return random_weights(fastkd.MultiTokenHeads(model.config, n, **options)).eval()


def ids(rows: int = ROWS, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens))


def value(student, term, labels, **inputs):
    """What the term says of a batch; labels of −100 beside real tokens."""
    seen = outputs_of(student, {key: given for key, given in inputs.items() if key != "num_items"})
    return term(seen, Outputs(None), Batch(labels, inputs, inputs.get("num_items")))


def formula(student, heads, input_ids, labels, ahead, dtype, mask=None):
    """(loss, hard, soft) of the head `ahead` alone, from logits in full and a loop over positions."""
    student, heads = student.to(dtype), heads.to(dtype)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    hidden = (student.base_model)(**inputs).last_hidden_state
    output = student.get_output_embeddings().weight
    mine = heads.outputs[ahead - 1] if len(heads.outputs) else output
    logits = heads(hidden, mask)[ahead - 1] @ mine.T
    main = (hidden @ output.T).detach()
    hard = soft = torch.zeros((), dtype=dtype)
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1 - ahead):
            target = labels[row, t + 1 + ahead]
            if target == -100 or (mask is not None and not mask[row, t]):
                continue
            p, q = (main[row, t + ahead] / 2).log_softmax(-1), (logits[row, t] / 2).log_softmax(-1)
            hard = hard - logits[row, t].log_softmax(-1)[target]
            soft = soft + 4 * (p.exp() * (p - q)).sum()
    learnt = labels[:, 1:] != -100
    divisor = (learnt if mask is None else learnt & mask[:, :-1].bool()).sum()
    return 0.3 * hard / divisor + 0.1 * soft / divisor, hard / divisor, soft / divisor


def masked_batch():
    """Labels that are not learnt at the beginning, in the middle and at the padded end; a row that begins padded."""
    input_ids, mask = ids(), torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -2:] = mask[1, :3] = 0
    labels = torch.where(mask.bool(), input_ids, -100)
    labels[2, :3], labels[2, 5] = -100, -100
    return input_ids, labels, mask


@pytest.mark.parametrize("share_output", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_formula(kind, share_output):
    student = causal_lm(kind, 0.3)
    heads = heads_of(student, 2, share_output=share_output)
    input_ids, labels, mask = masked_batch()
    found = {}
    for name, dtype in (("truth", torch.float64), ("eager", torch.float32)):
        models = copy.deepcopy(student), copy.deepcopy(heads)
        both = [formula(*models, input_ids, labels, ahead, dtype, mask) for ahead in (1, 2)]
        loss, hard, soft = (torch.stack(one).mean() for one in zip(*both, strict=True))
        loss.backward()
        found[name] = loss, hard, soft, gradients(*models)
    term = fastkd.MultiTokenTerm(heads)
    got = value(student, term, labels, input_ids=input_ids, attention_mask=mask)
    got["loss"].backward()
    for part, true, eager in zip(
        ("loss", "multi_token_hard", "multi_token_soft"), found["truth"], found["eager"], strict=False
    ):
        compare.assert_value(got[part], true, eager, part)
    assert got["multi_token"] == got["loss"]
    ours = gradients(student, heads)
    assert ours.keys() == found["truth"][3].keys()
    for which in ("student", "heads"):
        joined = [
            torch.cat([g.flatten() for n, g in one.items() if n.startswith(which)])
            for one in (ours, found["eager"][3], found["truth"][3])
        ]
        assert joined[2].abs().max() > 1e-3
        compare.assert_gradient(*joined, which)


def gradients(student, heads):
    both = nn.ModuleDict({"student": student, "heads": heads})
    return {name: weight.grad for name, weight in both.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", [*KINDS, *LISTED])
def test_a_head_is_a_layer_of_the_student(kind, padding):
    """With the weights of the last layer, on the hidden states before it, it is what the student's own body does."""
    student = causal_lm(kind).double()
    heads = heads_of(student, 1).double()
    theirs = {
        name.replace(".1.", ".0."): weight
        for name, weight in student.base_model.state_dict().items()
        if ".0." not in name
    }
    heads.blocks[0].load_state_dict({name: theirs[name] for name in heads.blocks[0].state_dict()})
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    seen = student(ids(), attention_mask=mask, output_hidden_states=True, use_cache=False)
    (got,) = heads(seen.hidden_states[-2], mask)
    counted = mask.bool()
    torch.testing.assert_close(got[counted], seen.hidden_states[-1][counted], rtol=1e-10, atol=1e-10)
    if padding == "left" and kind == "llama":  # and the mask takes part
        assert not torch.allclose(heads(seen.hidden_states[-2])[0][1, 3:], got[1, 3:])


@pytest.mark.parametrize("kind", [*KINDS, *LISTED])
def test_no_head_sees_what_it_is_to_predict(kind):
    """A token that changes, changes nothing before it: of any head, so least of all where it is the target."""
    student = causal_lm(kind)
    heads = heads_of(student, 3)
    input_ids = ids()
    with torch.no_grad():
        before = heads.project(fastkd.project(student, input_ids=input_ids))
        for changed in range(TOKENS):
            other = input_ids.clone()
            other[:, changed] = (other[:, changed] - 3 + 7) % (VOCAB - 3) + 3
            after = heads.project(fastkd.project(student, input_ids=other))
            for one, two in zip(before, after, strict=True):
                assert torch.equal(one.hidden[:, :changed], two.hidden[:, :changed])
                assert not torch.allclose(one.hidden[:, changed], two.hidden[:, changed], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_of_16_bits_stay_in_them(kind, dtype):
    model = causal_lm(kind)
    exact, short = heads_of(model, 1), fastkd.MultiTokenHeads(model.config, 1).eval()
    short.load_state_dict(exact.state_dict())
    hidden = torch.randn(1, TOKENS, WIDTH)
    (found,) = short.to(dtype)(hidden)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact(hidden)[0], rtol=0.1, atol=0.1)


def test_a_body_that_changes_its_input_is_refused(monkeypatch):
    """Hidden states of the trunk are no embeddings: what is done to these would be done to them."""
    before = transformers.LlamaModel.forward
    monkeypatch.setattr(
        transformers.LlamaModel,
        "forward",
        lambda self, *args, inputs_embeds, **options: before(self, *args, inputs_embeds=inputs_embeds * 2, **options),
    )
    with pytest.raises(ValueError, match="LlamaModel changes its inputs_embeds before the first block"):
        fastkd.MultiTokenHeads(causal_lm("llama").config, 1)


def test_heads_are_made_without_running_their_attention(monkeypatch):
    """It may be a kernel of another device and dtype, to which the heads are moved once they are made."""
    config = causal_lm("llama").config
    config._attn_implementation = "of a GPU"

    def refuse(*given, **options):
        raise AssertionError("attention is run")

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "of a GPU", refuse)
    heads = fastkd.MultiTokenHeads(config, 1)
    with pytest.raises(AssertionError, match="attention is run"):
        heads(torch.randn(1, TOKENS, WIDTH))


def test_heads_on_the_meta_device_are_not_run():
    """As the command checks terms, before any model is loaded."""
    config = causal_lm("llama").config
    with torch.device("meta"):
        heads = fastkd.MultiTokenHeads(config, 1)
    assert next(heads.parameters()).is_meta


def test_no_gradient_comes_from_later_positions():
    heads = heads_of(causal_lm("llama"), 2)
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    for head in heads(hidden):
        (found,) = torch.autograd.grad(head[:, 4].square().sum(), hidden, retain_graph=True)
        assert found[:, 5:].abs().max() == 0 < found[:, :5].abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nothing(side):
    """A padded row is worth what it is worth alone, whatever stands in the padding."""
    student = causal_lm("llama")
    term = fastkd.MultiTokenTerm(heads_of(student, 2))
    whole, short = ids(1), ids(1, 5)
    alone = [value(student, term, one, input_ids=one, num_items=1.0)["loss"] for one in (whole, short)]
    for filler in (0, 9):
        padding = torch.full((1, 4), filler)
        parts = [padding, short] if side == "left" else [short, padding]
        masks = [torch.zeros(1, 4), torch.ones(1, 5)] if side == "left" else [torch.ones(1, 5), torch.zeros(1, 4)]
        mask = torch.cat([torch.ones(1, TOKENS), torch.cat(masks, 1)]).long()
        input_ids = torch.cat([whole, torch.cat(parts, 1)])
        labels = torch.where(mask.bool(), input_ids, -100)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "num_items": 1.0}
        torch.testing.assert_close(value(student, term, labels, **given)["loss"], sum(alone), rtol=1e-5, atol=1e-5)


def test_a_document_predicts_nothing_of_the_next():
    """Rows of packed documents, told apart by their positions, are worth what the documents are."""
    student = causal_lm("llama")
    term = fastkd.MultiTokenTerm(heads_of(student, 2))
    first, second = ids(1, 4), ids(1, 5)
    alone = sum(value(student, term, one, input_ids=one, num_items=1.0)["loss"] for one in (first, second))
    packed = torch.cat([first, second], 1)
    labels = packed.clone()
    labels[0, 4] = -100  # as DataCollatorWithFlattening has it
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    given = {"input_ids": packed, "position_ids": positions, "num_items": 1.0}
    torch.testing.assert_close(value(student, term, labels, **given)["loss"], alone, rtol=1e-5, atol=1e-5)


def test_rows_without_targets_are_worth_nothing():
    student = causal_lm("gpt2")
    term = fastkd.MultiTokenTerm(heads_of(student, 4))
    input_ids = ids(2, 3)
    got = value(student, term, input_ids, input_ids=input_ids)
    only_first = formula(student, term.heads, input_ids, input_ids, 1, torch.float32)[0] / 4
    torch.testing.assert_close(got["loss"], only_first, rtol=1e-5, atol=1e-6)
    nothing = value(student, term, torch.full_like(input_ids, -100), input_ids=input_ids)["loss"]
    nothing.backward()
    assert nothing == 0
    assert all(not weight.grad.any() for weight in student.parameters() if weight.grad is not None)


def test_no_logits_are_formed():
    """Nothing as large as the logits of one head, which are larger than the output head here, is made on the way."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in tree_leaves(found) if isinstance(one, torch.Tensor))
            return found

    vocab = 997
    student = causal_lm("llama", 0.3, vocab_size=vocab)
    term, input_ids = fastkd.MultiTokenTerm(heads_of(student)), ids()
    seen = outputs_of(student, {"input_ids": input_ids})
    with Sizes():
        term(seen, Outputs(None), Batch(input_ids, {"input_ids": input_ids}))["loss"].backward()
        assert max(sizes) < ROWS * TOKENS * vocab
        student(input_ids)
        assert max(sizes) == ROWS * TOKENS * vocab


def test_16_bit_students_have_heads_of_32():
    student = causal_lm("llama", 0.2).bfloat16()
    term = fastkd.MultiTokenTerm(heads_of(student))
    input_ids = ids()
    loss = value(student, term, input_ids, input_ids=input_ids)["loss"]
    loss.backward()
    wide = value(copy.deepcopy(student).float(), term, input_ids, input_ids=input_ids)["loss"]
    assert loss.item() == pytest.approx(wide.item(), rel=2e-2)
    assert {weight.grad.dtype for weight in term.parameters()} == {torch.float32}


def test_training_accumulates_exactly_and_changes_both(tmp_path):
    from tests.training.test_trainer import Ragged, logged, model, teacher, trainer, weights, windows

    runs = {}
    for name, settings in (("one", {"per_device_train_batch_size": 16}), ("four", {"gradient_accumulation_steps": 4})):
        student = model(0)
        torch.manual_seed(3)
        term = fastkd.MultiTokenTerm(fastkd.MultiTokenHeads(student.config, 2), Course(1.0, 0.5, "linear"))
        start = weights(term).clone()
        found = trainer(tmp_path / name, student, teacher=teacher(), data=Ragged(windows()), terms=[term], **settings)
        found.train()
        assert not torch.equal(start, weights(term))
        logs = [torch.tensor(logged(found, key)) for key in ("multi_token", "multi_token_hard", "multi_token_soft")]
        torch.testing.assert_close(logs[0], 0.3 * logs[1] + 0.1 * logs[2], rtol=1e-4, atol=1e-5)
        runs[name] = [weights(student), weights(term), *logs]
    for one, four in zip(*runs.values(), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share_output", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_kept_beside_the_student_or_dropped(tmp_path, kind, share_output):
    student = causal_lm(kind)
    heads = heads_of(student, 2, share_output=share_output)
    prompt = ids(1, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = student.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    student.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("multi_token*"))
    with pytest.raises(FileNotFoundError, match="saved without its heads"):
        fastkd.MultiTokenHeads.from_pretrained(tmp_path)
    heads.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **options), written)
    again = fastkd.MultiTokenHeads.from_pretrained(tmp_path).eval()
    trunk = fastkd.project(loaded, input_ids=prompt)
    for one, two in zip(heads.project(trunk), again.project(trunk), strict=True):
        assert torch.equal(one.logits(), two.logits())
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_embd" if kind == "gpt2" else "intermediate_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is not of the student whose config\.json is beside it"):
        fastkd.MultiTokenHeads.from_pretrained(tmp_path)


def test_the_term_holds_no_parameter_of_the_student():
    from fastkd.terms import Terms

    student = causal_lm("llama")
    term = fastkd.MultiTokenTerm(heads_of(student))
    assert len(Terms([term], student).trained) == len(list(term.heads.parameters()))
    assert all(VOCAB not in weight.shape for weight in term.parameters())


def test_two_terms_would_save_one_file():
    from fastkd.terms import Terms

    terms = [fastkd.MultiTokenTerm(1), fastkd.MultiTokenTerm(2, name="further")]
    with pytest.raises(ValueError, match="'multi_token' and 'further' would overwrite each other's multi_token_heads"):
        Terms(terms)


def test_bad_input_is_refused():
    student = causal_lm("llama")
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n must be >= 1, got {n}"):
            fastkd.MultiTokenHeads(student.config, n)
    for n in (1.5, True):
        with pytest.raises(TypeError, match="n must be an int"):
            fastkd.MultiTokenHeads(student.config, n)
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM: pass student\.config"):
        fastkd.MultiTokenHeads(student, 2)
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
        fastkd.MultiTokenHeads(transformers.T5Config(), 2)
    opt = transformers.OPTConfig(hidden_size=16, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=16)
    with pytest.raises(ValueError, match="OPTLearnedPositionalEmbedding, which cannot be left out"):
        fastkd.MultiTokenHeads(opt, 1)
    with pytest.raises(TypeError, match=r"heads must be fastkd\.MultiTokenHeads or a number, got LlamaForCausalLM"):
        fastkd.MultiTokenTerm(student)
    for wrong in ({"hard_weight": -0.3}, {"soft_weight": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fastkd.MultiTokenTerm(heads_of(student), **wrong)
    wide = causal_lm("llama", hidden_size=24, head_dim=12)
    with pytest.raises(ValueError, match="heads of width 16, but the student's is 24"):
        fastkd.MultiTokenTerm(heads_of(student)).check(wide, None)
    with pytest.raises(ValueError, match=r"\(3, 9, 24\) do not fit heads of width 16"):
        heads_of(student)(torch.randn(ROWS, TOKENS, 24))
