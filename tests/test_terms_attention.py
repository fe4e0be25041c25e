"""`AttentionTerm` against its formula in float64, relations without returned attentions, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastkd.terms import AttentionTerm, HiddenStateTerm, Terms, outputs_of, relations
from fastkd.terms.recording import recorded
from tests import compare
from tests.features import batch, both, counted, frozen, gpt2, gradients, llama, twins, value_of


def in_groups(rows, heads):
    """Means over heads that stand side by side."""
    return torch.stack([part.mean(1) for part in rows.chunk(heads, 1)], 1)


def relation_rows(term, outputs, block, given):
    """`[batch, heads, queries, keys]`, from the definitions."""
    if term.relation in ("attention", "qk"):
        return outputs.attentions[block]
    values = outputs.values[block]
    tokens = values.shape[2]
    products = values @ values.transpose(-1, -2) / values.shape[-1] ** 0.5
    seen = torch.ones(tokens, tokens).tril().bool() & given.inputs["attention_mask"].bool()[:, None, None]
    return products.masked_fill(~seen, -torch.inf).softmax(-1)


def formula(term, student, teacher, given):
    """KL row by row, from attentions that the models return themselves, or from their values."""
    ours, theirs = (with_values(model, given) for model in (student, teacher))
    total = 0.0
    for block, other in term.pairs:
        q, p = (relation_rows(term, *of, given) for of in ((ours, block), (theirs, other)))
        heads = min(q.shape[1], p.shape[1])
        q, p = in_groups(q, heads), in_groups(p, heads)
        kl = torch.special.xlogy(p, p) - p * torch.where(q > 0, q, 1.0).log()
        total = total + kl.sum(-1).mean(1)[counted(given)].mean()
    return total / len(term.pairs)


def with_values(model, given):
    """The model's outputs, and the values of each block's heads by hooks on its projections."""
    values, handles = [], []
    for module in model.modules():
        name = type(module).__name__
        if name == "LlamaAttention":
            part, which = module.v_proj, slice(None)
        elif name == "GPT2Attention":
            part, which = module.c_attn, slice(-module.embed_dim, None)
        else:
            continue

        def hook(_module, _args, out, size=module.head_dim, which=which):
            values.append(out[..., which].unflatten(-1, (-1, size)).transpose(1, 2))

        handles.append(part.register_forward_hook(hook))
    found = model(**given.inputs, output_attentions=True)
    for handle in handles:
        handle.remove()
    found.values = values
    return found


CASES = [
    {"layers": "uniform"},
    {"layers": "last:2", "relation": "qk"},
    {"layers": [[0, 1], [2, 4], [2, 2]], "relation": "values"},
]
#: Heads of the student, of the teacher, of the teacher's keys and values.
HEADS = [(2, 4, 2), (4, 4, 4), (8, 4, 2)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_formula(options, heads, monkeypatch):
    """Relations come from fused implementations, which return no attentions, and equal those that eager ones return."""
    monkeypatch.setitem(relations.CHUNK_BYTES, "cpu", 4 * 8 * 11 * 4)  # several chunks for each row of the batch
    ours, theirs, shared = heads
    student, teacher = gpt2(16, heads=ours), frozen(llama(24, heads=theirs, num_key_value_heads=shared))
    given, term = batch(), AttentionTerm(**options)
    judged = []
    for copies in twins(student, teacher):
        term.check(*copies)
        value = formula(term, *copies, given)
        value.backward()
        judged.append((value, copies[0]))
    (truth, exact), (near, eager) = judged
    if term.relation != "attention":
        for model in (student, teacher):
            model.set_attn_implementation("sdpa")
    term.check(student, teacher)
    found = value_of(term, student, teacher, given)
    (3 * found).backward()
    compare.assert_value(found, truth, near)
    assert truth > 0.01
    ours, theirs, best = (gradients(one) for one in (student, eager, exact))
    assert best.norm() > 0.01
    compare.assert_gradient(ours / 3, theirs, best)


def test_left_padding_and_a_row_of_padding_alone():
    student, teacher = gpt2(), frozen(llama())
    given = batch()
    given.inputs["attention_mask"][:] = 1
    given.inputs["attention_mask"][0, :4] = 0
    given.inputs["attention_mask"][1] = 0
    given.labels[0, :5] = -100
    given.labels[1] = -100
    found = {}
    for relation in ("attention", "qk"):
        term = AttentionTerm(relation=relation)
        term.check(student, teacher)
        found[relation] = value_of(term, student, teacher, given)
        student.zero_grad()
        found[relation].backward()
        found[relation + " gradient"] = gradients(student)
    compare.assert_value(found["qk"], found["attention"])
    assert torch.isfinite(found["qk gradient"]).all()
    torch.testing.assert_close(found["qk gradient"], found["attention gradient"], rtol=1e-4, atol=1e-6)


def test_where_the_host_cannot_look_all_rows_are_computed(monkeypatch):
    """As on a GPU: rows of several sequences at a time, with a weight of 0 on those that do not count."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    given.inputs["attention_mask"][1], given.labels[1] = 0, -100  # a row of padding alone
    for relation in ("attention", "qk", "values"):
        term = AttentionTerm(relation=relation)
        term.check(student, teacher)
        found = []
        for chunks in (relations._chunks, as_on_gpus):
            monkeypatch.setattr(relations, "_chunks", chunks)
            value = value_of(term, student, teacher, given)
            student.zero_grad()
            value.backward()
            found.append((value, gradients(student)))
        compare.assert_value(found[1][0], found[0][0])
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def as_on_gpus(counted, heads):
    for queries in torch.arange(counted.shape[1]).split(4):
        for part in (slice(0, 2), slice(2, 4)):
            yield relations.Chunk(part, queries, counted[part, queries])


def test_student_and_teacher_of_one_kind_agree_on_themselves():
    student, given = gpt2(), batch()
    term = AttentionTerm(relation="qk")
    term.check(student, student)
    ours, theirs = both(term, student, student, given)
    value = term(ours, theirs, given)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert gradients(student).abs().max() < 1e-6


def test_relations_of_a_model_within_another():
    """DistributedDataParallel has the model as a part; what was recorded leaves the table as it was."""
    student, given = gpt2(attention="sdpa"), batch()
    outer = torch.nn.ModuleDict({"module": student})
    with recorded(outer, {1}) as heads:
        student(**given.inputs)
    assert set(heads) == {1}
    assert heads[1].queries.shape == (3, 2, 11, 8)
    with recorded(outer) as heads:
        pass
    student(**given.inputs)
    assert heads == {}


def test_what_cannot_be_served_is_refused_before_the_first_step():
    student, teacher = gpt2(), frozen(llama())
    for who, models in (
        ("student", (gpt2(attention="sdpa"), teacher)),
        ("teacher", (student, llama(attention="sdpa"))),
    ):
        with pytest.raises(ValueError, match=f"the {who}'s implementation 'sdpa' does not return: .*'eager'"):
            AttentionTerm().check(*models)
        AttentionTerm(relation="qk").check(*models)
    with pytest.raises(ValueError, match=r"after a dropout of 0\.1"):
        AttentionTerm().check(gpt2(attn_pdrop=0.1), teacher)
    AttentionTerm(relation="values").check(gpt2(attn_pdrop=0.1), teacher)
    with pytest.raises(ValueError, match="the student has 3 heads and the teacher 4"):
        AttentionTerm().check(gpt2(24, heads=3), teacher)
    AttentionTerm(relation="qk").check(gpt2(24, heads=1), teacher)
    with pytest.raises(ValueError, match="names block 7 of the teacher, which has 5"):
        AttentionTerm([[0, 7]]).check(student, teacher)
    with pytest.raises(ValueError, match="which no cache has"):
        AttentionTerm().check(student, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "learned"}, "learned' mixes hidden states"),
        ({"relation": "keys"}, "relation must be one of attention, qk, values, got 'keys'"),
        ({"weight": -1.0}, r"weight of term 'attention' must be a finite number >= 0, got -1\.0"),
        ({"layers": "all"}, "'all' is no layer map"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionTerm(**options)


def test_wrong_batches_are_refused():
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = AttentionTerm(relation="qk")
    with pytest.raises(ValueError, match="knows no models"):
        value_of(term, student, teacher, given)
    term.check(student, teacher)
    shorter = {name: one[:, :-1] for name, one in given.inputs.items()}
    ours, theirs = outputs_of(student, given.inputs, term.needs), outputs_of(teacher, shorter, term.needs)
    with pytest.raises(ValueError, match=r"are of \(3, 11\) \(batch, tokens\), the teacher's of \(3, 10\)"):
        term(ours, theirs, given)
    with pytest.raises(ValueError, match="has no projections"):
        term(outputs_of(student, given.inputs), theirs, given)
    fused = gpt2(attention="sdpa")
    plain = AttentionTerm()
    plain.check(student, teacher)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        plain(outputs_of(fused, given.inputs, plain.needs), outputs_of(teacher, given.inputs, plain.needs), given)
    half = outputs_of(student, given.inputs, plain.needs)
    half.fields["attentions"] = tuple(one.half() for one in half.attentions)
    with pytest.raises(ValueError, match="fp16 probabilities overflow"):
        plain(half, outputs_of(teacher, given.inputs, plain.needs), given)


def test_bf16_probabilities():
    """Rows that bf16 has rounded sum to 1 again in the kernel."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = AttentionTerm()
    term.check(student, teacher)
    truth = value_of(term, student, teacher, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_of(term, student, teacher, given)
    found.backward()
    assert found.item() == pytest.approx(truth.item(), rel=0.05)
    assert torch.isfinite(gradients(student)).all()


def test_nothing_is_kept_of_blocks_that_no_term_reads():
    teacher, given = frozen(llama()), batch()
    terms = Terms([AttentionTerm([[0, 1]], "values"), HiddenStateTerm([[0, 3], [1, 4]])])
    terms.check(gpt2(), teacher)
    found = outputs_of(teacher, given.inputs, terms.teachers_needs)
    assert set(found.projections) == {1}
    assert [block for block, one in enumerate(found.hidden_states) if one is not None] == [4, 5]
    whole = outputs_of(teacher, given.inputs, terms.needs)
    assert set(whole.projections) == {0, 1, 2, 3, 4}
    for block in (4, 5):
        assert torch.equal(found.hidden_states[block], whole.hidden_states[block])
