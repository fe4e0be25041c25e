"""Terms from configurations, and what a set of them keeps."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd.terms import TERMS, AttentionTerm, HiddenStateTerm, Term, Terms, term_named, terms_named
from tests import memory
from tests.features import transformers


def test_mappings_become_terms():
    hidden, attention, other = terms_named(
        [
            {"type": "hidden", "layers": [[0, 1]], "projector": "none", "loss": "cosine", "weight": 0.5},
            "attention",
            {"type": "attention", "relation": "values", "name": "values", "weight": {"start": 1, "end": 0.25}},
        ]
    )
    assert isinstance(hidden, HiddenStateTerm)
    assert (hidden.layers, hidden.projector, hidden.how.loss, hidden.weight) == ([[0, 1]], "none", "cosine", 0.5)
    assert isinstance(attention, AttentionTerm)
    assert (attention.name, attention.relation, attention.layers) == ("attention", "attention", "uniform")
    other.follow(0.5)
    assert (other.name, other.weight) == ("values", 0.625)
    learned = term_named(
        {"type": "hidden", "layers": "learned", "temperature": {"start": 4, "end": 2, "shape": "cosine"}}
    )
    learned.follow(1.0)
    assert learned.temperature == 2


def test_every_type_is_a_term_named_after_it():
    for name, kind in TERMS.items():
        term = term_named(name)
        assert type(term) is kind
        assert isinstance(term, Term)
        assert term.name == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "hiden"}, "no term of type 'hiden'; did you mean 'hidden'"),
        ({"type": "kl"}, "no term of type 'kl': it is one of hidden, attention"),
        ({"type": ["hidden"]}, r"no term of type \['hidden'\]"),
        ({"layers": "uniform"}, "a term needs a type, hidden, attention"),
        ({"type": "hidden", "layer": "last"}, "type 'hidden' has no 'layer'; did you mean 'layers'"),
        ({"type": "attention", "loss": "mse"}, "type 'attention' has no 'loss'"),
        ({"type": "hidden", "weight": -1}, "weight of term 'hidden' must be a finite number >= 0, got -1"),
        ({"type": "hidden", "weight": {"start": 1}}, "weight of the term 'hidden' is a number, or has start, end"),
        ({"type": "hidden", "weight": {"start": 1, "end": 0, "form": 1}}, "is a number, or has start, end and shape"),
        (
            {"type": "hidden", "weight": {"start": 1, "end": 0, "shape": "steep"}},
            "must be one of constant, linear, cos",
        ),
        ({"type": "hidden", "layers": "middle"}, "'middle' is no layer map"),
    ],
)
def test_wrong_mappings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        term_named(given)


def test_wrong_kinds_are_refused():
    for given, message in (
        (3, "a type or a mapping"),
        ({"type": "hidden", "weight": "0.5"}, "must be a number, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            term_named(given)
    with pytest.raises(TypeError, match="terms are a list, got 'hidden'"):
        terms_named("hidden")
    with pytest.raises(ValueError, match="two terms are named hidden: give one another `name`"):
        Terms(terms_named(["hidden", {"type": "hidden", "loss": "cosine"}]))


def config(width, blocks, heads, **more):
    return transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=heads // 4, **more
    )


def test_the_bytes_of_ten_layers():
    """10 · 16 · 2048 · 8192 numbers of 2 bytes are 5.37 GB, of a teacher that no one has to load."""
    student, teacher = config(4096, 32, 32), config(8192, 80, 64)
    term = HiddenStateTerm([[i, 8 * i] for i in range(10)])
    found = fastkd.feature_memory(term, student, teacher, batch=16, tokens=2048, dtype=torch.float16)
    assert found.teacher == 5_368_709_120
    gradients = 10 * 4 * (16 * 2048 * 4096 + 8192 * 4096)  # fp16's are kept in fp32
    assert found.gradients == gradients
    assert found.total == 5_368_709_120 + gradients
    rest = [AttentionTerm([[0, 0], [1, 8]], name=name, relation=name) for name in ("values", "qk")]
    more = fastkd.feature_memory(Terms([term, *rest]), student, teacher, batch=16, tokens=2048, dtype=torch.float16)
    assert more.teacher - found.teacher == 2 * 16 * 2048 * (64 + 2 * 16) * 128 * 2
    assert more.gradients - gradients == 2 * 4 * 16 * 2048 * 128 * (2 * 8 + 32 + 8)
    plain = fastkd.feature_memory(AttentionTerm("last:1"), student, teacher, batch=1, tokens=128)
    assert plain == (80 * 64 * 128 * 128 * 4, 32 * 128 * 128 * 4, 32 * 32 * 128 * 128 * 4)
    half = fastkd.feature_memory(AttentionTerm("last:1"), student, teacher, batch=1, tokens=128, dtype=torch.bfloat16)
    assert half.student == 32 * 32 * 128 * 128 * (2 + 4)
    assert found.student == more.student == 0
    with pytest.raises(ValueError, match="names block 80 of the teacher"):
        fastkd.feature_memory(HiddenStateTerm([[0, 80]]), student, teacher, batch=1, tokens=1)
    with pytest.raises(ValueError, match="tokens must be >= 1, got 0"):
        fastkd.feature_memory(term, student, teacher, batch=1, tokens=0)


SCRIPT = """
import torch, transformers, fastkd
from fastkd.terms import Batch, KDTerm, Terms, outputs_of, terms_named
from tests.memory import held
torch.manual_seed(0)
torch.set_num_threads(1)
def model(width):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_embd=width, n_layer=8, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
student, teacher = model(64), model(512).eval().requires_grad_(False)
inputs = {"input_ids": torch.randint(64, (4, 256))}
def step(terms):
    with torch.no_grad():
        theirs = outputs_of(teacher, inputs, terms.teachers_needs)
    ours = outputs_of(student, inputs, terms.needs)
    return theirs, ours, terms(ours, theirs, Batch(inputs["input_ids"], inputs))
for given in ([], [], ["hidden"], ["hidden", {"type": "attention", "relation": "qk"}]):
    terms = Terms([KDTerm(), *terms_named(given)])
    terms.check(student, teacher)
    print(held(lambda: step(terms)), fastkd.feature_memory(terms, student, teacher, batch=4, tokens=256).total)
"""


@pytest.mark.skipif(not memory.pathlib.Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
def test_a_step_keeps_what_was_predicted():
    """Within 10 %, from the forward to the backward, beside the logits alone; the first step brings libraries in."""
    found = memory.printed(SCRIPT)
    (_, alone, *peaks), (_, none, *predicted) = found[::2], found[1::2]
    assert none == 0
    for more, expected in zip(peaks, predicted, strict=True):
        assert more - alone == pytest.approx(expected, rel=0.1)


ATTENTIONS = """
import sys
import torch, transformers, fastkd
from fastkd.terms import AttentionTerm, Batch, KDTerm, Terms, outputs_of
from tests.memory import held
torch.manual_seed(0)
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
def model(attention, blocks):
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4,
        num_hidden_layers=blocks, max_position_embeddings=512)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
inputs = {"input_ids": torch.randint(64, (2, 512))}
def step(terms, student, teacher):
    with torch.no_grad():
        theirs = outputs_of(teacher, inputs, terms.teachers_needs)
    ours = outputs_of(student, inputs, terms.needs)
    return theirs, ours, terms(ours, theirs, Batch(inputs["input_ids"], inputs))
for attention, more in (("sdpa", []), ("sdpa", []), ("eager", [AttentionTerm("last:1")])):
    student, teacher = model(attention, 4).train(), model(attention, 2).eval().requires_grad_(False)
    terms = Terms([KDTerm(), *more])
    terms.check(student, teacher)
    print(held(lambda: step(terms, student, teacher)))
    print(fastkd.feature_memory(terms, student, teacher, batch=2, tokens=512, dtype=dtype).total)
"""


@pytest.mark.skipif(not memory.pathlib.Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attentions_cost_what_was_predicted(dtype):
    """Eager attention of the student included, against fused attention and the logits alone."""
    _, _, alone, none, more, expected = memory.printed(ATTENTIONS, dtype)
    assert none == 0
    assert more - alone == pytest.approx(expected, rel=0.1)
