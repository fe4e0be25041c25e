"""A term of the trainer is one class: the two below touch nothing else, and are trained, logged, saved and resumed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import fastkd
from fastkd.terms import Term
from fastkd.training.trainer import KDTrainer, logged_beside
from tests import compare
from tests.training.test_trainer import VOCAB, logged, model, teacher, trainer, weights

WIDE, WIDE_TEACHER = 16, 24


class ZLoss(Term):
    """Mean of log²(Σ exp z) over the tokens: keeps the normalisers near 1."""

    def forward(self, student, teacher, batch):
        logits = student.projection.hidden @ student.projection.weight.T
        log_sum_exp = (logits - fastkd.log_softmax(logits))[..., 0]
        return batch.mean(log_sum_exp.square())


class LastHidden(Term):
    """Mean squared distance of the teacher's last hidden states to the student's, made as wide by a matrix."""

    def __init__(self, name, weight=1.0):
        super().__init__(name, weight)
        torch.manual_seed(7)
        self.projector = nn.Linear(WIDE, WIDE_TEACHER, bias=False)

    def forward(self, student, teacher, batch):
        apart = self.projector(student.projection.hidden) - teacher.projection.hidden
        return batch.mean(apart.square().mean(-1))


def formula(student, above, batch, factor, dtype):
    """(loss, z), from the definitions, with logits in full."""
    logits, theirs = (one.to(dtype)(batch["input_ids"]).logits[:, :-1].flatten(0, 1) for one in (student, above))
    labels = batch["labels"][:, 1:].flatten()
    counted = labels != -100
    kl = (theirs / 2).softmax(-1) * ((theirs / 2).log_softmax(-1) - (logits / 2).log_softmax(-1))
    hard = nn.functional.cross_entropy(logits, labels)
    z = logits.logsumexp(-1)[counted].square().mean()
    return 0.5 * 4 * kl.sum(-1)[counted].mean() + 0.5 * hard + factor * z, z


def gradient(student, loss):
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in student.parameters()])


@pytest.mark.parametrize("factor", [0.3, 0.0])
def test_the_loss_and_its_gradient_are_those_of_the_formula(tmp_path, factor):
    student = model(0)
    exact, eager = copy.deepcopy(student), copy.deepcopy(student)
    found = trainer(tmp_path, student, teacher=teacher(), terms=[ZLoss("z_loss", factor)])
    batch = next(iter(found.get_train_dataloader()))
    loss = found.compute_loss(student, batch)
    truth, z = formula(exact, teacher(), batch, factor, torch.float64)
    near, _ = formula(eager, teacher(), batch, factor, torch.float32)
    compare.assert_value(loss, truth, near)
    compare.assert_gradient(gradient(student, loss), gradient(eager, near), gradient(exact, truth))
    compare.assert_value(found.terms.take_sums()["z_loss"], z)


def test_values_are_logged_by_name(tmp_path):
    """Unweighted, beside the others; a weight of 0 only logs."""
    student, plain = model(0), model(0)
    found = trainer(tmp_path, student, teacher=teacher(), terms=[ZLoss("z_loss", 0.5), ZLoss("watched", 0.0)])
    found.train()
    values = logged(found, "z_loss")
    assert len(values) == 3
    assert logged(found, "watched") == values
    for loss, soft, hard, z in zip(*(logged(found, name) for name in ("loss", "soft", "hard", "z_loss")), strict=True):
        assert loss == pytest.approx(0.5 * soft + 0.5 * hard + 0.5 * z, rel=1e-5)
    trainer(tmp_path, plain, teacher=teacher()).train()
    assert not torch.allclose(weights(student), weights(plain), rtol=1e-3)


def test_accumulation_is_exact(tmp_path):
    """Four batches of 4 are one of 16: of the value, of the student, and of the term's own parameters."""
    runs = {}
    for name, settings in (("one", {"per_device_train_batch_size": 16}), ("four", {"gradient_accumulation_steps": 4})):
        term = LastHidden("hidden", 2.0)
        found = trainer(tmp_path, model(0), teacher=teacher(), terms=[term], max_grad_norm=0.5, **settings)
        found.train()
        runs[name] = weights(found.model), weights(term), torch.tensor(logged(found, "hidden"))
    for one, four in zip(*runs.values(), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


def test_parameters_are_trained_and_clipped_with_the_students(tmp_path):
    """One step of SGD on both, by the norm of both: against a loop of six lines."""
    student, term = model(0), LastHidden("hidden", 3.0)
    twin, projector = copy.deepcopy(student), copy.deepcopy(term.projector)
    found = trainer(tmp_path, student, teacher=teacher(), terms=[term], max_steps=2, max_grad_norm=0.5)
    batches = list(found.get_train_dataloader())
    found.train()
    kd = fastkd.KDLoss(2.0, shift=True)
    for step in range(2):
        batch = batches[step]
        seen, above = (one(batch["input_ids"], output_hidden_states=True) for one in (twin, teacher()))
        counted = batch["labels"][:, 1:] != -100
        apart = projector(seen.hidden_states[-1]) - above.hidden_states[-1]
        hidden = apart.square().mean(-1)[:, :-1][counted].mean()
        (kd(seen.logits, above.logits, batch["labels"]) + 3.0 * hidden).backward()
        trained = [*twin.parameters(), *projector.parameters()]
        norm = nn.utils.clip_grad_norm_(trained, 0.5)
        assert logged(found, "grad_norm")[step] == pytest.approx(norm.item(), rel=1e-4)
        assert logged(found, "hidden")[step] == pytest.approx(hidden.item(), rel=1e-5)
        with torch.no_grad():
            for weight in trained:
                weight -= 1e-2 * weight.grad
                weight.grad = None
    torch.testing.assert_close(weights(student), weights(twin), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(term), weights(projector), rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(term), weights(LastHidden("hidden")))


def test_resumed_is_uninterrupted(tmp_path):
    """Bit for bit, with an optimizer that has a state for the term's parameters."""

    def run(name, **settings):
        term = LastHidden("hidden")
        found = trainer(tmp_path / name, model(0), teacher=teacher(), terms=[term], max_steps=8, **settings)
        found.args.optim = "adamw_torch"
        return found, term

    whole, first = run("whole", save_strategy="steps", save_steps=5)
    whole.train()
    rest, second = run("rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert logged(rest, "hidden") == logged(whole, "hidden")
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(weights(whole.model), weights(rest.model))

    without = trainer(tmp_path / "none", model(0), teacher=teacher(), max_steps=8)
    with pytest.raises(ValueError, match=r"has parameters of the terms \['hidden'\], but the trainer has \[\]"):
        without.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))


class NoGradient(Term):
    def forward(self, student, teacher, batch):
        return batch.mean(fastkd.row_statistics(student.projection).log_sum_exp)


class NoScalar(Term):
    def forward(self, student, teacher, batch):
        return student.projection.hidden


def test_terms_that_could_take_no_part_are_refused(tmp_path):
    class Alone(KDTrainer):
        def distillation_loss(self, model, inputs, teacher, labels, num_items):
            return self.kd(fastkd.project(model, **inputs), teacher.logits, labels, num_items=num_items).loss

    with pytest.raises(ValueError, match=r"Alone\.distillation_loss does not call KDTrainer's"):
        trainer(tmp_path, model(0), teacher=teacher(), kind=Alone, terms=[ZLoss("z")]).train()
    with pytest.raises(ValueError, match=r"'none' has weight 2\.0, but its value has no gradient"):
        trainer(tmp_path, model(0), teacher=teacher(), terms=[NoGradient("none", 2.0)]).train()
    found = trainer(tmp_path, model(0), teacher=teacher(), terms=[NoGradient("none", 0.0)])
    found.train()
    assert len(logged(found, "none")) == 3
    with pytest.raises(TypeError, match=rf"'whole' must return a scalar tensor, got a tensor \(4, 12, {WIDE}\)"):
        trainer(tmp_path, model(0), teacher=teacher(), terms=[NoScalar("whole")]).train()


def test_wrong_terms_are_refused(tmp_path):
    for name in ("loss", "grad_norm", "eval_z", "hard", "soft", "peer_loss", "teacher_loss", ""):
        with pytest.raises(ValueError, match=f"cannot be named {name!r}"):
            ZLoss(name)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of term 'z' must be a finite number"):
            ZLoss("z", weight)
    with pytest.raises(ValueError, match="two terms are named z"):
        trainer(tmp_path, model(0), teacher=teacher(), terms=[ZLoss("z"), ZLoss("z")])
    with pytest.raises(TypeError, match="got Linear"):
        trainer(tmp_path, model(0), teacher=teacher(), terms=[nn.Linear(2, VOCAB)])
    student, term = model(0), LastHidden("hidden")
    term.head = student.lm_head
    with pytest.raises(ValueError, match="holds parameters of the student"):
        trainer(tmp_path, student, teacher=teacher(), terms=[term])


def test_an_optimizer_that_is_given_must_have_the_parameters(tmp_path):
    def run(optimizer, term):
        return trainer(tmp_path, student, teacher=teacher(), terms=[term], optimizers=(optimizer, None)).train()

    student, term = model(0), LastHidden("hidden")
    with pytest.raises(ValueError, match="the optimizer lacks 1 parameters of terms"):
        run(torch.optim.SGD(student.parameters(), 0.1), term)
    before = weights(term).clone()
    run(torch.optim.SGD([*student.parameters(), *term.parameters()], 0.1), term)
    assert not torch.equal(weights(term), before)


def test_a_sharded_student_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.training.beside.FSDPModule", transformers.LlamaForCausalLM)
    with pytest.raises(ValueError, match="cannot be trained beside a sharded student"):
        trainer(tmp_path, model(0), teacher=teacher(), terms=[LastHidden("hidden")])


def test_a_line_of_logs_tells_terms_and_teachers_from_the_rest():
    line = ("loss", "soft", "hard", "ratio", "z", "peer_loss", "teacher_loss", "grad_norm", "eval_hard")
    assert logged_beside(dict.fromkeys(line, 1.0)) == ["z", "peer_loss", "teacher_loss"]
