"""Several teachers: their probabilities averaged, or each with rows of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import fastkd
from fastkd.teachers import Mixed, Routed
from fastkd.terms import Batch, KDTerm, Outputs, outputs_of
from tests import compare
from tests.teachers import (
    ROWS,
    VOCAB,
    assert_resumed_is_uninterrupted,
    counted,
    double,
    frozen,
    gpt2,
    inputs,
    kl,
    labelled,
    loss_of,
    rows_of,
)

KD = KDTerm(fastkd.KDLoss(2.0))
NAMES = ["english", "code", "english", "poems"]


@pytest.fixture(autouse=True)
def _one_thread(_restore_globals):
    torch.set_num_threads(1)


def three():
    return {"english": frozen(1), "code": frozen(2, 16), "poems": frozen(3, 8)}


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def assert_is(loss, student, formula):
    """The loss and its gradient, against a formula of the student and of what makes models more exact."""
    exact, eager = copy.deepcopy(student).double(), copy.deepcopy(student)
    truth, near = formula(exact, double), formula(eager, copy.deepcopy)
    for one in (truth, near, loss):
        one.backward()
    compare.assert_value(loss, truth, near)
    compare.assert_gradient(gradient(student), gradient(eager), gradient(exact))


def routed_formula(student, above, names):
    """Each row's teacher, in the order of the rows."""
    found, batch = labelled(0)
    with torch.no_grad():
        logits = torch.cat(
            [
                above(three()[name])(**{key: one[row : row + 1] for key, one in found.items()}).logits
                for row, name in enumerate(names)
            ]
        )
    theirs, _ = rows_of(logits, batch.labels)
    ours, labels = rows_of(student(**found).logits, batch.labels)
    return 0.5 * kl(theirs, ours, 2.0) + 0.5 * functional.cross_entropy(ours, labels)


@pytest.mark.parametrize("names", [NAMES, ["code"] * ROWS, ["poems", "poems", "code", "english"]])
def test_routed_value_and_gradient_are_the_formulas(names):
    student = gpt2(0)
    loss, _ = loss_of(Routed(three()), student, 0, KD, {"teacher_name": names})
    assert_is(loss, student, lambda model, above: routed_formula(model, above, names))


def test_a_teacher_runs_on_its_rows_alone():
    models, seen = three(), []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _m, _a, given, name=name: seen.append((name, given["input_ids"], given["position_ids"].shape[0])),
            with_kwargs=True,
        )
    found = {**inputs(0), "position_ids": torch.arange(10)[None]}  # of one row, for all
    parts = Routed(models).outputs(gpt2(0), found, {"teacher_name": ["poems", "code", "poems", "poems"]}).logits.parts
    assert [(name, rows) for name, _, rows in seen] == [("code", 1), ("poems", 1)]
    assert torch.equal(seen[0][1], found["input_ids"][1:2])
    assert torch.equal(seen[1][1], found["input_ids"][[0, 2, 3]])
    assert [rows.tolist() for rows, _ in parts] == [[1], [0, 2, 3]]
    assert [tuple(logits.shape) for _, logits in parts] == [(1, 10, VOCAB), (3, 10, VOCAB)]


@pytest.mark.parametrize("column", [[0, 1, 0, 2], torch.tensor([0, 1, 0, 2])])
@pytest.mark.parametrize("models", [three(), list(three().values())])
def test_indices_name_teachers_too(column, models):
    student = gpt2(0)
    loss, _ = loss_of(Routed(models, "corpus"), student, 0, KD, {"corpus": column})
    expected, _ = loss_of(Routed(three()), student, 0, KD, {"teacher_name": NAMES})
    assert torch.equal(loss, expected)


def test_names_that_are_numbers_go_before_indices():
    student, models = gpt2(0), list(three().values())
    loss, _ = loss_of(Routed(dict(zip((1, 0, 7), models, strict=True))), student, 0, KD, {"teacher_name": [1, 0, 1, 7]})
    expected, _ = loss_of(Routed(three()), student, 0, KD, {"teacher_name": NAMES})
    assert torch.equal(loss, expected)


def test_parts_of_a_step_add_up():
    """Two batches of one step, with the number of its tokens."""
    student, mode = gpt2(0), Routed(three())
    found, batch = labelled(0)
    whole, _ = loss_of(mode, student, 0, KD, {"teacher_name": NAMES})
    count, parts = (batch.labels[:, 1:] != -100).sum(), []
    for rows in (slice(0, 1), slice(1, None)):
        some = {name: one[rows] for name, one in found.items()}
        above = mode.outputs(student, some, {"teacher_name": NAMES[rows]})
        parts.append(KD(outputs_of(student, some), above, Batch(batch.labels[rows], some, count)))
    torch.testing.assert_close(sum(part["loss"] for part in parts), whole)
    assert sum(part["soft"] + part["hard"] for part in parts) == pytest.approx(2 * whole.item(), rel=1e-5)


def test_a_batch_without_labels_that_count_is_0():
    student, mode = gpt2(0), Routed(three())
    found = inputs(0)
    labels = torch.full_like(found["input_ids"], -100)
    parts = KD(outputs_of(student, found), mode.outputs(student, found, {"teacher_name": NAMES}), Batch(labels, found))
    assert parts["loss"] == 0


def test_positions_that_count_only_in_the_soft_loss_need_a_number():
    kd = KDTerm(fastkd.KDLoss(2.0, mask_soft=False))
    student, mode = gpt2(0), Routed(three())
    found, batch = labelled(0)
    above, seen = mode.outputs(student, found, {"teacher_name": NAMES}), outputs_of(student, found)
    with pytest.raises(ValueError, match="mask_soft=False need num_items"):
        kd(seen, above, batch)
    same = Outputs(torch.cat([above.logits.parts[i][1].logits() for i in (0, 1, 2)])[[0, 2, 1, 3]])
    numbered = Batch(batch.labels, found, 7)
    torch.testing.assert_close(kd(seen, above, numbered)["loss"], kd(seen, same, numbered)["loss"])


@pytest.mark.parametrize("shares", [None, [3.0, 1.0, 0.5], [0.0, 2.0, 1.0]])
def test_mixed_value_and_gradient_are_the_formulas(shares):
    student, models = gpt2(0), list(three().values())
    calls = [counted(model) for model in models]
    loss, _ = loss_of(Mixed(models, shares), student, 0, KD)
    numbers = torch.tensor(shares or [1.0] * 3, dtype=torch.float64)

    def formula(model, above):
        found, batch = labelled(0)
        ours, labels = rows_of(model(**found).logits, batch.labels)
        p = 0.0
        with torch.no_grad():
            for weight, one in zip((numbers / numbers.sum()).tolist(), models, strict=True):
                theirs, _ = rows_of(above(one)(**found).logits, batch.labels)
                p = p + weight * (theirs / 2).softmax(-1)
        return 0.5 * kl(2 * p.log(), ours, 2.0) + 0.5 * functional.cross_entropy(ours, labels)

    assert [len(one) for one in calls] == [int(share > 0) for share in numbers]
    assert_is(loss, student, formula)


@pytest.mark.parametrize("make", [Mixed, Routed])
def test_padded_heads(make):
    """Columns that no token has are left out, of teachers and student: the loss is as of heads without them."""
    kd, names = KDTerm(fastkd.KDLoss(2.0, vocab_size=VOCAB)), {"teacher_name": [0, 1, 0, 1]}
    student, models = gpt2(0), [frozen(1), frozen(2, 16)]
    expected, _ = loss_of(make(models), student, 0, KD, names)
    for model, wide in ((models[1], VOCAB + 4), (student, VOCAB + 9)):
        model.resize_token_embeddings(wide, mean_resizing=False)
    mode = make([models[0], models[1].requires_grad_(False)])
    mode.check(student, (), VOCAB)
    loss, _ = loss_of(mode, student, 0, kd, names)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (lambda: Routed(three()), lambda step: {"teacher_name": NAMES[step % 4 :] + NAMES[: step % 4]}),
        (lambda: Mixed(three(), [2, 1, 1]), lambda step: None),
    ],
)
def test_resumed_is_uninterrupted(make, columns, tmp_path):
    assert_resumed_is_uninterrupted(lambda: (gpt2(0, dropout=0.1), make()), tmp_path, columns)


@pytest.mark.parametrize("make", [Mixed, Routed])
def test_wrong_teachers_are_refused(make):
    with pytest.raises(ValueError, match="there are no teachers"):
        make([])
    with pytest.raises(ValueError, match="teacher 1 must be frozen and in eval mode"):
        make([frozen(1), gpt2(2)])
    with pytest.raises(ValueError, match=f"a vocabulary of {VOCAB} and teacher 'other' one of 64"):
        make({"one": frozen(1), "other": frozen(2, vocab=64)}).check(gpt2(0))
    make({"one": frozen(1), "other": frozen(2, vocab=64)}).check(gpt2(0), (), VOCAB)
    student = frozen(1)
    with pytest.raises(ValueError, match="teacher 1 is the student itself"):
        make([frozen(2), student]).check(student)
    with pytest.raises(ValueError, match="need the teacher's hidden_states, but there are 2 teachers"):
        make([frozen(1), frozen(2)]).check(gpt2(0), ("hidden_states",))


def test_wrong_weights_are_refused():
    models = [frozen(1), frozen(2)]
    with pytest.raises(ValueError, match="there are 1 weights for 2 teachers"):
        Mixed(models, [1.0])
    with pytest.raises(ValueError, match=r"weights\[1\] must be a finite number >= 0, got -1"):
        Mixed(models, [1.0, -1])
    with pytest.raises(ValueError, match="all weights are 0"):
        Mixed(models, [0, 0])


def test_wrong_columns_are_refused():
    mode, student = Routed(three()), gpt2(0)
    for column, message in (
        (None, r"the batch has no 'teacher_name', which names the teacher of each row: there are \['english', "),
        (NAMES[:2], "'teacher_name' has 2 teachers for a batch of 4 rows"),
        (["english", "french", "code", "code"], r"names the teacher 'french', which is not there: there are \['eng"),
        (torch.tensor([0, 1, 2, 3]), "names the teacher 3, which is not there"),
        (torch.tensor([0, 1, 2, -1]), "names the teacher -1, which is not there"),
        ([["code"]] * 4, "names the teacher .*, which is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            mode.outputs(student, inputs(0), {"teacher_name": column})
