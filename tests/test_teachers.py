"""Modes of teachers that are models: values and gradients are the formula's, forwards counted, resuming exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import fastkd
from fastkd import teachers
from fastkd.teachers import EMA, MODES, Frozen, Mutual, Online, Snapshot, TeacherMode
from fastkd.terms import Batch, KDTerm, outputs_of
from tests import compare
from tests.teachers import (
    VOCAB,
    Loop,
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
    transformers,
    weights,
)

KD = KDTerm(fastkd.KDLoss(2.0))


@pytest.fixture(autouse=True)
def _one_thread(_restore_globals):
    torch.set_num_threads(1)


def gradients(*models):
    return torch.cat([weight.grad.flatten() for model in models for weight in model.parameters()])


def predictions(model, step=0):
    found, batch = labelled(step)
    return rows_of(model(**found).logits, batch.labels)


def taught(student, above, temperature=2.0, soft=0.5, hard=0.5):
    """The loss of KDLoss, of a model and what teaches it."""
    below, labels = predictions(student)
    return soft * kl(above, below, temperature) + hard * functional.cross_entropy(below, labels)


def test_the_table_has_every_mode():
    classes = {one for one in vars(teachers).values() if isinstance(one, type) and issubclass(one, TeacherMode)}
    assert set(MODES.values()) == classes - {TeacherMode}
    for mode in MODES.values():
        assert mode.outputs is not TeacherMode.outputs


def online_formula(student, teacher):
    above, labels = predictions(teacher)
    return taught(student, above.detach()) + functional.cross_entropy(above, labels)


def mutual_formula(student, peer, temperature=1.0, soft=1.0, hard=1.0):
    ours, theirs = (predictions(model)[0].detach() for model in (student, peer))
    return taught(student, theirs) + taught(peer, ours, temperature, soft, hard)


@pytest.mark.parametrize(
    ("make", "formula", "name"),
    [
        (Online, online_formula, "teacher_loss"),
        (Mutual, mutual_formula, "peer_loss"),
        (
            lambda peer: Mutual(peer, fastkd.KDLoss(3.0, soft_weight=0.2, hard_weight=0.7)),
            lambda student, peer: mutual_formula(student, peer, 3.0, 0.2, 0.7),
            "peer_loss",
        ),
    ],
)
def test_value_and_gradients_are_the_formulas(make, formula, name):
    student, other = gpt2(0), gpt2(1, 24)
    exact, eager = ([copy.deepcopy(student), copy.deepcopy(other)] for _ in range(2))
    truth = formula(*(model.double() for model in exact))
    truth.backward()
    near = formula(*eager)
    near.backward()
    loss, added = loss_of(make(other), student, 0, KD)
    assert list(added) == [name]
    loss.backward()
    compare.assert_value(loss, truth, near)
    for one, two, three in zip((student, other), eager, exact, strict=True):
        compare.assert_gradient(gradients(one), gradients(two), gradients(three))


@pytest.mark.parametrize("make", [Online, Mutual])
def test_each_model_runs_once_a_step(make):
    student, other = gpt2(0), gpt2(1, 24)
    calls = counted(student), counted(other)
    Loop(student, make(other)).take(3)
    assert [len(one) for one in calls] == [3, 3]


@pytest.mark.parametrize("make", [Online, Mutual])
def test_no_gradient_of_the_student_reaches_the_other(make):
    """Nor does one of the other reach the student, neither from predictions nor from features."""
    student, other = gpt2(0), gpt2(1, 24)
    mode = make(other)
    found, batch = labelled(0)
    above = mode.outputs(student, found, {}, ("hidden_states",))
    assert len(above.hidden_states) == 3
    seen = [above.projection.hidden, above.projection.weight, *above.hidden_states]
    assert not any(one.requires_grad for one in seen)
    sum(mode.loss(outputs_of(student, found), batch).values()).backward()
    assert all(weight.grad is None for weight in student.parameters())
    assert gradients(other).abs().max() > 1e-3


def test_a_router_is_trained_too():
    """Of a mixture of experts: its own loss, as transformers has it."""
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.3,
        output_router_logits=True,
        router_aux_loss_coef=0.7,
    )
    teacher, (found, batch) = transformers.MixtralForCausalLM(config), labelled(0)
    mode, student = Online(teacher), gpt2(0)
    mode.outputs(student, found)
    loss = mode.loss(outputs_of(student, found), batch)["teacher_loss"]
    logits, labels = predictions(teacher)
    expected = functional.cross_entropy(logits, labels) + 0.7 * teacher(**found).aux_loss
    torch.testing.assert_close(loss, expected)


def test_parts_of_accumulated_batches_add_up():
    other, (found, batch) = gpt2(1, 24), labelled(0)
    mode, student = Mutual(other), gpt2(0)
    mode.outputs(student, found)
    whole = mode.loss(outputs_of(student, found), batch)["peer_loss"]
    count, parts = (batch.labels[:, 1:] != -100).sum(), []
    for rows in (slice(0, 1), slice(1, None)):
        some = {name: one[rows] for name, one in found.items()}
        mode.outputs(student, some)
        parts.append(mode.loss(outputs_of(student, some), Batch(batch.labels[rows], some, count))["peer_loss"])
    torch.testing.assert_close(sum(parts), whole)


def test_what_learns_is_in_the_students_mode():
    student, teacher = gpt2(0), gpt2(1, 24).eval()
    mode = Online(teacher)
    mode.outputs(student, inputs(0))
    assert teacher.training
    mode.outputs(student.eval(), inputs(0))
    assert not teacher.training


def test_a_frozen_part_of_a_teacher_stays():
    teacher = gpt2(1, 24)
    teacher.transformer.h[0].requires_grad_(False)
    before = weights(teacher.transformer.h[0]), weights(teacher.transformer.h[1])
    mode = Online(teacher)
    assert len(mode.trained) == sum(weight.requires_grad for weight in teacher.parameters())
    Loop(gpt2(0), mode).take(1)
    assert torch.equal(weights(teacher.transformer.h[0]), before[0])
    assert not torch.equal(weights(teacher.transformer.h[1]), before[1])


@pytest.mark.parametrize(("make", "folder"), [(Online, "teacher"), (Mutual, "peer"), (EMA, "ema")])
def test_what_is_left_is_saved(make, folder, tmp_path):
    student = gpt2(0)
    mode = make() if make is EMA else make(gpt2(1))
    Loop(student, mode).take(1)
    mode.save(tmp_path)
    assert torch.equal(weights(type(student).from_pretrained(tmp_path / folder)), weights(mode.model))


MAKERS = {
    "frozen": lambda: Frozen(frozen(1)),
    "online": lambda: Online(gpt2(1, 24, dropout=0.1), 1e-3),
    "mutual": lambda: Mutual(gpt2(1, 24, dropout=0.1)),
    "ema": lambda: EMA(0.9),
    "ema_bf16": lambda: EMA(0.9, dtype=torch.bfloat16),
    "snapshot": lambda: Snapshot(2),
    "snapshot_epoch": Snapshot,
}


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_is_uninterrupted(name, tmp_path):
    """With dropout in the student: the random numbers are the same too."""
    assert_resumed_is_uninterrupted(lambda: (gpt2(0, dropout=0.1), MAKERS[name]()), tmp_path)


@pytest.mark.parametrize("name", ["ema", "ema_bf16", "snapshot"])
def test_a_checkpoint_before_the_first_batch(name, tmp_path):
    loop = Loop(gpt2(0), MAKERS[name]())
    fresh = Loop(gpt2(0), MAKERS[name]()).resume(loop.saved(tmp_path / "start.pt"))
    assert torch.equal(weights(loop.take(2).student), weights(fresh.take(2).student))
    again = Loop(gpt2(3), MAKERS[name]()).resume(loop.saved(tmp_path / "two.pt"))
    again.saved(tmp_path / "again.pt")  # before a batch has made its copy
    last = Loop(gpt2(3), MAKERS[name]()).resume(tmp_path / "again.pt")
    assert torch.equal(weights(loop.take(1).student), weights(last.take(1).student))


def test_the_average_is_the_formulas():
    """Against float64, with the decay as it warms up; what is tied stays tied."""
    student, mode = gpt2(0), EMA(0.25)
    average, loop = double(student), Loop(student, mode)
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 0.25)):
        assert mode.decay_of(step) == pytest.approx(decay)
        loop.take(1)
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
                mine.mul_(decay).add_(theirs.double(), alpha=1 - decay)
        torch.testing.assert_close(weights(mode.model).double(), weights(average), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(weights(mode.model), weights(student), atol=1e-4)
    assert mode.model.lm_head.weight is mode.model.transformer.wte.weight
    assert not mode.model.training
    assert not any(weight.requires_grad for weight in mode.model.parameters())
    assert EMA(0.99, warmup=False).decay_of(0) == 0.99
    assert EMA().decay_of(10**6) == 0.999


@pytest.mark.parametrize("mode", [EMA(0.9, warmup=False), Snapshot(1)])
def test_what_follows_teaches_as_the_formula_says(mode):
    """Its predictions in the second step, and the student's gradient from them."""
    student = gpt2(0)
    start = copy.deepcopy(student)
    Loop(student, mode).take(1)
    above = copy.deepcopy(student)
    if isinstance(mode, EMA):
        with torch.no_grad():
            for mine, first in zip(above.parameters(), start.parameters(), strict=True):
                mine.copy_(0.9 * first + 0.1 * mine)
    exact, eager = copy.deepcopy(student).double(), copy.deepcopy(student)
    with torch.no_grad():
        truths = predictions(double(above))[0], predictions(above)[0]
    truth, near = taught(exact, truths[0]), taught(eager, truths[1])
    truth.backward()
    near.backward()
    loss, _ = loss_of(mode, student, 0, KD)
    loss.backward()
    compare.assert_value(loss, truth, near)
    compare.assert_gradient(gradients(student), gradients(eager), gradients(exact))


def test_buffers_are_copied():
    for mode in (EMA(), Snapshot(1)):
        student = gpt2(0)
        student.register_buffer("seen", torch.zeros(3))
        loop = Loop(student, mode).take(1)
        student.seen.add_(2.5)
        loop.take(1)
        assert torch.equal(mode.model.seen, student.seen)
        assert mode.model.seen is not student.seen


def test_an_average_in_16_bits_is_kept_in_32(tmp_path):
    """And saved so. Steps of a thousandth are below a rounding of bfloat16."""
    student, mode = gpt2(0), EMA(0.999, warmup=False, dtype=torch.bfloat16)
    wide = EMA(0.999, warmup=False)
    student.register_buffer("frequencies", torch.tensor([1 / 3]))
    for one in (mode, wide):
        one.outputs(student, inputs(0))
    loop = Loop(student, Frozen(frozen(1)))
    for step in range(1, 4):
        loop.take(1)
        mode.stepped(student, step)
        wide.stepped(student, step)
    run = list(mode.model.parameters())
    assert {weight.dtype for weight in run} == {torch.bfloat16}
    assert mode.model.frequencies.dtype == torch.float32  # rounded frequencies would be others
    mode.save(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    assert torch.equal(weights(saved), weights(wide.model))
    for rounded, weight in zip(run, wide.model.parameters(), strict=True):
        assert torch.equal(rounded, weight.bfloat16())
    assert mode.outputs(student, inputs(0)).projection.hidden.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="kept in another dtype"):
        wide.restore(mode.kept())


def test_a_16_bit_student_has_an_average_in_32():
    student, mode, name = gpt2(0).bfloat16(), EMA(0.999, warmup=False), "transformer.h.0.attn.c_attn.weight"
    mode.outputs(student, inputs(0))
    weight = student.get_parameter(name)
    before = weight.detach().float()
    with torch.no_grad():
        weight.add_(0.25)
    for step in range(1, 9):
        mode.stepped(student, step)
    expected = 0.999**8 * before + (1 - 0.999**8) * weight.detach().float()
    assert (expected - before).abs().max() < 2**-8  # each step is below a rounding of the larger weights
    torch.testing.assert_close(mode.kept()["average"][name], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mode.model.get_parameter(name), mode.kept()["average"][name].bfloat16())


def test_a_wider_average_than_the_student():
    student, mode = gpt2(0).bfloat16(), EMA(0.9, dtype=torch.float32)
    mode.outputs(student, inputs(0))
    mode.stepped(student, 1)
    assert {weight.dtype for weight in mode.model.parameters()} == {torch.float32}
    assert mode.kept()["average"] == {}


def test_an_average_on_a_device_of_its_own():
    """The same, with what is sent there and back."""
    student, mode, plain = gpt2(0), EMA(0.9, device="cpu"), EMA(0.9)
    found = mode.outputs(student, inputs(0), {}, ("hidden_states",))
    expected = plain.outputs(student, inputs(0), {}, ("hidden_states",))
    assert torch.equal(found.projection.logits(), expected.projection.logits())
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, expected.hidden_states, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_average_on_the_cpu_teaches_on_a_gpu():
    student = gpt2(0).cuda()
    found = {name: one.cuda() for name, one in inputs(0).items()}
    for mode in (EMA(0.9, device="cpu"), EMA(0.9)):
        logits = mode.outputs(student, found).projection
        assert logits.device.type == logits.weight.device.type == "cuda"
        mode.stepped(student, 1)
        assert next(mode.model.parameters()).device.type == ("cpu" if mode.device else "cuda")


@pytest.mark.parametrize(("every", "due"), [(2, {2, 4}), ("epoch", {3})])
def test_snapshots_are_taken_when_they_are_due(every, due):
    student, mode = gpt2(0), Snapshot(every)
    expected = weights(student).clone()  # its start
    loop = Loop(student, Frozen(frozen(1)))
    mode.outputs(student, inputs(0))
    for step in range(1, 6):
        loop.take(1)
        mode.stepped(student, step, epoch_ended=step == 3)
        expected = weights(student).clone() if step in due else expected
        assert torch.equal(weights(mode.model), expected)


@pytest.mark.parametrize("make", [EMA, lambda: Snapshot(1)])
def test_a_second_student_is_refused(make):
    first, second, mode = gpt2(0), gpt2(3), make()
    mode.check(second)
    Loop(first, mode).take(1)
    mode.check(first)
    with pytest.raises(ValueError, match="follows another student, whose copy would teach"):
        mode.check(second)


def test_trainings_without_a_snapshot_are_refused():
    for every, steps, epochs in (("epoch", 8, 1), (8, 8, 4)):
        with pytest.raises(ValueError, match="own start would teach it to the end"):
            Snapshot(every).begin(steps, epochs)
        Snapshot(every).begin(steps + 1, epochs + 1)


def test_what_cannot_learn_is_refused():
    for make, name in ((Online, "teacher"), (Mutual, "peer")):
        with pytest.raises(ValueError, match=f"the {name} learns too, but none of its parameters"):
            make(frozen(1))
        with pytest.raises(ValueError, match=r"learning_rate must be a finite number > 0, got 0\.0"):
            make(gpt2(1), learning_rate=0.0)
        student = gpt2(0)
        with pytest.raises(ValueError, match=f"the {name} is the student itself"):
            make(student).check(student)
        with pytest.raises(RuntimeError, match="loss\\(\\) is of the batch"):
            make(gpt2(1)).loss(None, None)
    with pytest.raises(ValueError, match="the peer has the student's weights"):
        Mutual(gpt2(0)).check(gpt2(0))
    with pytest.raises(ValueError, match="soft_weight=0"):
        Mutual(gpt2(1), fastkd.KDLoss(soft_weight=0.0, hard_weight=1.0))
    shared = gpt2(1)
    shared.transformer.wte.weight = student.transformer.wte.weight
    with pytest.raises(ValueError, match="or shares parameters that it trains"):
        Online(shared).check(student)


@pytest.mark.parametrize("make", [lambda: Frozen(frozen(1, vocab=64)), lambda: Online(gpt2(1, vocab=64))])
def test_other_vocabularies_are_refused(make):
    with pytest.raises(ValueError, match=f"a vocabulary of {VOCAB} and the teacher one of 64"):
        make().check(gpt2(0))
    make().check(gpt2(0), (), VOCAB)  # one is padded
    with pytest.raises(ValueError, match=f"vocab_size=61 must be in both, .* of {VOCAB} and the teacher one of 64"):
        make().check(gpt2(0), (), 61)


def test_wrong_numbers_are_refused():
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be"):
            EMA(decay)
    with pytest.raises(TypeError, match=r"a floating torch\.dtype, got torch\.int32"):
        EMA(dtype=torch.int32)
    for every in (0, -1, "step"):
        with pytest.raises(ValueError, match="every must be"):
            Snapshot(every)
    with pytest.raises(TypeError, match="every must be an int"):
        Snapshot(1.5)
    student = gpt2(0)
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.to("meta"))
    for mode in (EMA(), Snapshot()):
        with pytest.raises(ValueError, match="sharded or offloaded"):
            mode.check(student)
