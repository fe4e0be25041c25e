"""`HiddenStateTerm` against its formula in float64, what it refuses, what it costs, and how it is trained."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd.terms import (
    Batch,
    Course,
    HiddenStateTerm,
    KDTerm,
    MultiTokenTerm,
    Outputs,
    Terms,
    hidden,
    outputs_of,
    rows_apart,
    term_named,
)
from tests import compare
from tests.features import batch, both, counted, everywhere, frozen, gpt2, gradients, llama, twins, value_of


def formula(term, student, teacher, given):
    """The docstring's, row by row, with whole tensors."""
    ours, theirs = (model(**given.inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    total = 0.0
    for number, (block, others) in enumerate(term.pairs):
        x, y = ours[block + 1], theirs[others[0] + 1]
        if term.learned is not None:
            shares = (term.learned.scores[number] / term.temperature).softmax(0)
            y = sum(share * theirs[other + 1] for share, other in zip(shares, others, strict=True))
        p = x @ term.projectors[number].weight.T if term.projectors else x
        if term.how.loss == "cosine":
            apart = 1 - torch.nn.functional.cosine_similarity(p, y, -1)
        else:
            if term.how.normalise:
                p, y = (one / (one.square().mean(-1, keepdim=True) + 1e-12).sqrt() for one in (p, y))
            apart = {
                "mse": torch.nn.functional.mse_loss,
                "smooth_l1": torch.nn.functional.smooth_l1_loss,
            }[term.how.loss](p, y.expand_as(p), reduction="none").mean(-1)
        total = total + apart[counted(given)].mean()
    return total / len(term.pairs)


CASES = [
    {"layers": "uniform"},
    {"layers": "uniform", "normalise": False},
    {"layers": "last:2", "loss": "cosine"},
    {"layers": [[0, 1], [2, 4], [2, 2]], "loss": "smooth_l1"},
    {"layers": "last", "loss": "smooth_l1", "normalise": False},
    {"layers": "learned", "temperature": 0.7},
    {"layers": "learned", "loss": "smooth_l1", "normalise": False},
]


@pytest.mark.parametrize("equal_widths", [False, True], ids=["projected", "as they are"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_formula(options, equal_widths, monkeypatch):
    monkeypatch.setitem(rows_apart.CHUNK_BYTES, "cpu", 4)
    monkeypatch.setattr(rows_apart, "_LEAST_ROWS", 5)  # several chunks, the last one shorter
    student, teacher, given = gpt2(16), frozen(llama(16 if equal_widths else 24)), batch()
    term = HiddenStateTerm(**options)
    term.check(student, teacher)
    assert bool(term.projectors) is not equal_widths
    if term.learned is not None:
        torch.nn.init.normal_(term.learned.scores)
    judged = []
    for copies in twins(student, teacher, term):
        value = formula(copies[2], *copies[:2], given)
        value.backward()
        judged.append((value, copies))
    (truth, exact), (near, eager) = judged
    found = value_of(term, student, teacher, given)
    (3 * found).backward()
    compare.assert_value(found, truth, near)
    for number, what in ((0, "student"), (2, "term")):
        ours, theirs, best = (gradients(one[number]) for one in ((student, teacher, term), eager, exact))
        assert (best.norm() > 0) == (what == "student" or bool(list(term.parameters())))
        compare.assert_gradient(ours / 3, theirs, best, what)


def test_a_wrong_gradient_would_be_seen():
    """The judge's tolerance is below the effect of one masked row that counts."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm()
    term.check(student, teacher)
    value_of(term, student, teacher, given).backward()
    right = gradients(student)
    student.zero_grad()
    other = Batch(given.labels.clone(), given.inputs)
    other.labels[2, 3] = 1
    value_of(term, student, teacher, other).backward()
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_gradient(gradients(student), right, right)


def test_float64_models_have_float64_arithmetic():
    student, teacher, given = gpt2().double(), frozen(llama()).double(), batch()
    term = HiddenStateTerm(loss="smooth_l1").double()
    term.check(student, teacher)
    term.double()
    found = value_of(term, student, teacher, given)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(formula(term, student, teacher, given).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_hidden_states(dtype):
    """Rounded once, at the end; loss scales of fp16 training do not overflow them, nor do small gradients vanish."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm("last:1")
    term.check(student, teacher)
    narrow = [one.hidden_states[-1].detach().to(dtype) for one in both(term, student, teacher, given)]
    found = []
    for arithmetic in (torch.float32, torch.float64):
        x, y = (one.detach() if arithmetic == torch.float32 else one.detach().double() for one in narrow)
        x.requires_grad_()
        value = term.to(arithmetic)(everywhere(x), everywhere(y), Batch(given.labels, given.inputs, num_items=1e5))
        (value * 2.0**14).backward()
        found.append((value, x.grad))
    (value, gradient), (truth, exact) = found
    assert gradient.dtype == dtype
    compare.assert_value(value, truth)
    assert compare.relative_error(gradient, exact) < compare.LOW_PRECISION


def test_masked_rows_cost_nothing_and_count_nothing(monkeypatch):
    """Products see the rows that count alone, and a NaN in another row stays there."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm("last:1")
    term.check(student, teacher)
    ours, theirs = both(term, student, teacher, given)
    masked = ~counted(given)[..., None]
    x, y = (one.hidden_states[-1].detach().masked_fill(masked, torch.nan) for one in (ours, theirs))
    seen, product = [], rows_apart.product

    def recorded(a, b, out, accumulate=False):
        seen.append(tuple(a.shape))
        product(a, b, out, accumulate)

    monkeypatch.setattr(rows_apart, "product", recorded)
    value = term(everywhere(x.requires_grad_()), everywhere(y), given)
    value.backward()
    live = int(counted(given).sum())
    assert seen == [(live, 16), (24, live), (live, 24)]
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~counted(given)].any()
    assert x.grad[counted(given)].any(-1).all()


def test_parts_of_a_step_add_up():
    """With `num_items`, batches that are accumulated are one batch."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm()
    term.check(student, teacher)
    whole = value_of(term, student, teacher, given)
    count = counted(given).sum()
    parts = []
    for row in range(3):
        inputs = {name: one[row : row + 1] for name, one in given.inputs.items()}
        parts.append(value_of(term, student, teacher, Batch(given.labels[row : row + 1], inputs, num_items=count)))
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mixture_of_layers_is_not_rounded_to_16_bits(dtype):
    """The teacher's states have 16 bits; their mixture, and what follows of it, has as many as the student's."""
    x, shares, *layers = torch.randn(20, 12), torch.tensor([0.5, 0.3, 0.2]), *torch.randn(3, 20, 12).to(dtype)
    how, counted = rows_apart.Comparison("mse", True), torch.ones(20, dtype=torch.bool)
    found = {}
    for wanted in (torch.float64, torch.float32):
        ours, part = x.to(wanted).requires_grad_(), shares.to(wanted).requires_grad_()
        theirs = [one.double() for one in layers] if wanted == torch.float64 else layers
        value = rows_apart.distance(ours, theirs, None, counted, how, shares=part)
        found[wanted] = value, *torch.autograd.grad(value, (ours, part))
    for exact, near in zip(found[torch.float64], found[torch.float32], strict=True):
        assert (near - exact).norm() <= 1e-6 * exact.norm()


def test_without_gradients_there_are_none():
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm()
    term.check(student, teacher)
    with torch.no_grad():
        assert not value_of(term, student, teacher, given).requires_grad


def test_the_learned_map_follows_the_training():
    term = HiddenStateTerm("learned", temperature=Course(2.0, 0.5, "linear"), weight=Course(1.0, 0.0, "linear"))
    term.follow(0.5)
    assert (term.temperature, term.weight) == (1.25, 0.5)


def test_a_loop_of_ones_own():
    """Student, projectors and the learned map are trained: the value falls."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    terms = Terms([KDTerm(fastkd.KDLoss(hard_weight=0.0)), HiddenStateTerm("learned", weight=0.5)], student)
    terms.check(student, teacher)
    optimizer = torch.optim.Adam([*student.parameters(), *terms.parameters()], 1e-2)
    values = []
    for _ in range(30):
        with torch.no_grad():
            theirs = outputs_of(teacher, given.inputs, terms.needs)
        terms(outputs_of(student, given.inputs, terms.needs), theirs, given).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(terms.take_sums()["hidden"].item())
    assert values[-1] < 0.7 * values[0]
    assert terms[1].learned.scores.std() > 0.01


def test_what_cannot_be_served_is_refused_before_the_first_step():
    student, teacher = gpt2(16, 3), frozen(llama(24, 5))
    for options, message in (
        ({"layers": [[0, 5]]}, "names block 5 of the teacher, which has 5"),
        ({"layers": [[3, 0]]}, "names block 3 of the student, which has 3"),
        ({"projector": "none"}, "projector='none', but the student's hidden states are 16 wide and the teacher's 24"),
    ):
        with pytest.raises(ValueError, match=message):
            HiddenStateTerm(**options).check(student, teacher)
    with pytest.raises(ValueError, match="which no cache has"):
        HiddenStateTerm().check(student, None)
    term = HiddenStateTerm()
    term.check(student, teacher)
    first = term.projectors[0].weight
    term.check(student, teacher)
    assert term.projectors[0].weight is first
    with pytest.raises(ValueError, match="was made for other models"):
        term.check(student, frozen(llama(16, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3.0}, "temperature=3.0 is of layers='learned' alone, but layers='uniform'"),
        ({"weight": "0.5"}, "weight of term 'hidden' must be a finite number >= 0, got '0.5'"),
        ({"weight": True}, "weight of term 'hidden' must be a finite number >= 0, got True"),
        ({"weight": Course(1.0, -1.0, "linear")}, "the end of the weight of term 'hidden' must be a finite number"),
        ({"projector": "mlp"}, "projector must be 'linear' or 'none', got 'mlp'"),
        ({"loss": "kl"}, "loss must be one of mse, cosine, smooth_l1, got 'kl'"),
        ({"loss": "cosine", "normalise": False}, "cosine' normalises"),
        ({"weight": -0.5}, "weight of term 'hidden' must be a finite number >= 0, got -0.5"),
        ({"layers": "learned", "temperature": 0.0}, "temperature must be"),
        ({"layers": "first"}, "'first' is no layer map"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HiddenStateTerm(**options)


def test_unequal_batches_are_refused():
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm()
    with pytest.raises(ValueError, match="knows no models"):
        value_of(term, student, teacher, given)
    term.check(student, teacher)
    shorter = Batch(given.labels[:, :-1], {name: one[:, :-1] for name, one in given.inputs.items()})
    ours = outputs_of(student, given.inputs, term.needs)
    theirs = outputs_of(teacher, shorter.inputs, term.needs)
    with pytest.raises(ValueError, match=r"are of \(3, 11\) \(batch, tokens\), the teacher's of \(3, 10\)"):
        term(ours, theirs, given)
    with pytest.raises(ValueError, match=r"labels are \(3, 10\)"):
        term(ours, outputs_of(teacher, given.inputs, term.needs), shorter)
    with pytest.raises(ValueError, match="has no hidden_states"):
        term(outputs_of(student, given.inputs), outputs_of(teacher, given.inputs), given)


@pytest.mark.parametrize("live", [False, True], ids=["unknown", "told"])
def test_where_the_host_cannot_look(live, monkeypatch):
    """As on a GPU: all rows are computed and the others weigh 0, or as many as were told, those that count first."""
    student, teacher, given = gpt2(), frozen(llama()), batch()
    given = Batch(given.labels, given.inputs, live=int(counted(given).sum()) if live else None)
    term = HiddenStateTerm(loss="smooth_l1")
    term.check(student, teacher)
    found = []
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(hidden, "_HOSTS", {kind if kind == "cpu" else "none"})
        student.zero_grad()
        value = value_of(term, student, teacher, given)
        value.backward()
        found.append((value, gradients(student)))
    compare.assert_value(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", ["hidden", {"type": "attention", "relation": "qk"}], ids=["hidden", "qk"])
def test_gradient_checkpointing_changes_nothing(kind):
    """What a term reads of a block that is run again in the backward."""
    student, teacher, given = gpt2(attention="sdpa"), frozen(llama()), batch()
    term = term_named(kind)
    term.check(student, teacher)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            student.train()
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student.zero_grad()
        value_of(term, student, teacher, given).backward()
        found.append(gradients(student))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert found[0].norm() > 0.01


@pytest.mark.parametrize("layers", ["uniform", "learned"])
def test_a_float64_student(layers):
    """Projectors and shares are float64 too, whatever torch's default is."""
    student, teacher, given = gpt2().double(), frozen(llama()).double(), batch()
    term = HiddenStateTerm(layers)
    term.check(student, teacher)
    assert {one.dtype for one in term.parameters()} == {torch.float64}
    if term.learned is not None:
        torch.nn.init.normal_(term.learned.scores)
    found, truth = value_of(term, student, teacher, given), formula(term, student, teacher, given)
    found.backward()
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)
    exact = torch.autograd.grad(truth, list(term.parameters()))
    for one, expected in zip(term.parameters(), exact, strict=True):
        torch.testing.assert_close(one.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_half_precision_student_has_fp32_projectors():
    term = HiddenStateTerm("learned")
    term.check(gpt2().bfloat16(), frozen(llama()))
    assert {one.dtype for one in term.parameters()} == {torch.float32}


def test_a_weight_that_is_set_later_is_checked():
    term = HiddenStateTerm()
    term.weight = 2
    assert term.weight == 2.0
    for wrong in (-1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="the weight of term 'hidden' must be a finite number >= 0"):
            term.weight = wrong
    assert term.weight == 2.0


def test_a_step_without_tokens_is_no_nan():
    student, teacher, given = gpt2(), frozen(llama()), batch()
    term = HiddenStateTerm()
    term.check(student, teacher)
    labels = torch.full_like(given.labels, -100)
    for items in (None, 0, 0.0, torch.tensor(0)):
        assert value_of(term, student, teacher, Batch(labels, given.inputs, num_items=items)).item() == 0.0
    multi = MultiTokenTerm(2)
    multi.check(student, None)
    assert multi(outputs_of(student, given.inputs), Outputs(None), Batch(labels, given.inputs, 0))["loss"].item() == 0.0


@pytest.mark.parametrize("kind", ["hidden", "attention", {"type": "attention", "relation": "values"}, "multi_token"])
def test_padding_on_the_left_counts_nothing(kind):
    """Rows that are padded on the left give what they give on the right, though each first token has its label."""
    student, teacher = gpt2(), frozen(llama())
    term = term_named(kind)
    term.check(student, teacher)
    ids, count = torch.randint(61, (2, 11)), torch.tensor([[8], [11]])
    found = []
    for left in (False, True):
        places = torch.arange(11) - ((11 - count) * left)
        mask = ((places >= 0) & (places < count)).long()
        positions = places.clamp(0, 10)
        moved = ids.gather(1, positions)
        inputs = {"input_ids": moved, "attention_mask": mask, "position_ids": positions}
        given = Batch(moved.masked_fill(mask == 0, -100), inputs)
        assert int(given.counted.sum()) == 7 + 10
        ours = outputs_of(student, inputs, term.needs)
        value = term(ours, outputs_of(teacher, inputs, term.needs), given)
        found.append(value["loss"] if isinstance(value, dict) else value)
    compare.assert_value(found[1], found[0])
