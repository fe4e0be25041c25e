"""Every mode of teachers in KDTrainer: trained, logged, resumed bit for bit, and the same on two processes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastkd
from fastkd.teachers import EMA, MODES, Cached, Frozen, Mixed, MultiView, Mutual, Online, Routed, Snapshot
from fastkd.teachers.mode import detached
from fastkd.terms import AttentionTerm, Batch, Course, HiddenStateTerm, KDTerm, outputs_of
from fastkd.training.data import collate
from fastkd.training.trainer import KDTrainer
from tests.training.test_trainer import LENGTH, VOCAB, Ragged, logged, teacher, trainer, weights, windows


def gpt2(seed, wide=16, dropout=0.1):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=wide,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config)


class Corpora(Ragged):
    """Rows of two corpora."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"corpus": index % 2}


def with_corpus(examples):
    numbers = torch.tensor([example.pop("corpus") for example in examples])
    return {**collate(examples), "corpus": numbers}


class WithTeacher:
    """Puts a teacher's likeliest tokens into batches, as the collator of a cache does."""

    def __init__(self):
        self.teacher = teacher()

    def __call__(self, examples):
        batch = collate(examples)
        with torch.no_grad():
            logprobs, ids = self.teacher(batch["input_ids"]).logits.log_softmax(-1).topk(4)
        return {**batch, "teacher": fastkd.SparseTargets(ids, logprobs, "ghost", 1.0)}


KD = fastkd.KDLoss(1.0)
#: Mode → what makes it, and what else the trainer is given.
MAKERS = {
    "frozen": (lambda: Frozen(teacher()), {}),
    "cached": (Cached, {"data_collator": WithTeacher()}),
    "online": (lambda: Online(gpt2(1, 24), 1e-3), {}),
    "mutual": (lambda: Mutual(gpt2(1, 24), KD), {}),
    "ema": (lambda: EMA(0.9), {}),
    "snapshot": (lambda: Snapshot(2), {}),
    "multi_view": (MultiView, {}),
    "mixture": (lambda: Mixed([teacher(), gpt2(2, 8).eval().requires_grad_(False)], [2, 1]), {}),
    "routed": (
        lambda: Routed([teacher(), gpt2(2, 8).eval().requires_grad_(False)], "corpus"),
        {"data": Corpora(windows()), "data_collator": with_corpus},
    ),
}
LOGGED = {"online": "teacher_loss", "mutual": "peer_loss"}


def running(path, name, **settings):
    make, more = MAKERS[name]
    found = trainer(path, gpt2(0), kd=KD, teacher=make(), max_steps=4, **more, **settings)
    found.args.optim = "adamw_torch"
    return found


def kept(found):
    """What a mode keeps, flat."""

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for name in sorted(value) for leaf in leaves(value[name])]
        return [torch.as_tensor(value)]

    return leaves(found.teacher.kept())


def test_every_mode_is_here():
    assert MAKERS.keys() == MODES.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_is_uninterrupted(name, tmp_path):
    """Bit for bit, with dropout: the student, what the mode keeps, and every line of the log."""
    whole = running(tmp_path / "whole", name, save_strategy="steps", save_steps=2)
    before = weights(whole.model).clone()
    whole.train()
    assert not torch.equal(weights(whole.model), before)
    rest = running(tmp_path / "rest", name)
    with torch.no_grad():
        for weight in rest.model.parameters():
            weight.add_(0.1)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(rest.model))
    for one, other in zip(kept(whole), kept(rest), strict=True):
        assert torch.equal(one, other)
    for value in ("loss", "soft", "hard", LOGGED.get(name, "loss")):
        assert len(logged(whole, value)) == 4
        assert logged(rest, value) == logged(whole, value)
    whole.teacher.save(tmp_path)


@pytest.mark.parametrize(("name", "value"), LOGGED.items())
def test_what_learns_is_logged_and_has_its_rate(name, value, tmp_path):
    found = running(tmp_path, name)
    found.train()
    for loss, soft, hard, own in zip(*(logged(found, one) for one in ("loss", "soft", "hard", value)), strict=True):
        assert loss == pytest.approx(0.5 * soft + 0.5 * hard + own, rel=1e-5)
    rates = {id(weight): group["lr"] for group in found.optimizer.param_groups for weight in group["params"]}
    expected = found.teacher.learning_rate or 1e-2
    assert {rates[id(weight)] for weight in found.teacher.trained} == {expected}
    assert {rates[id(weight)] for weight in found.model.parameters()} == {1e-2}


def test_epochs_end_where_snapshots_are_taken(tmp_path):
    """8 batches an epoch: the snapshot is of step 8."""
    states = {}

    class Watched(KDTrainer):
        def training_step(self, *args, **kwargs):
            states[self.state.global_step] = weights(self.model).clone()
            return super().training_step(*args, **kwargs)

    found = trainer(tmp_path, gpt2(0), kd=KD, teacher=Snapshot(), max_steps=11, kind=Watched)
    found.train()
    assert torch.equal(weights(found.teacher.model), states[8])


def test_a_peers_loss_changes_as_the_students_does(tmp_path):
    """Each step's is that of a loss of the temperature and weight then."""
    courses = {"temperature": Course(4.0, 1.0, "linear"), "soft_weight": Course(0.0, 0.6, "linear")}
    mode = Mutual(gpt2(1, 24, 0.0), fastkd.KDLoss(4.0, soft_weight=0.0, hard_weight=1.0), **courses)
    expected = []

    class Watched(KDTrainer):
        def distillation_loss(self, model, inputs, teacher, labels, num_items):
            progress, batch = self.state.global_step / 3, Batch(labels, inputs, num_items)
            temperature, soft = (course.at(progress) for course in courses.values())
            kd = KDTerm(fastkd.KDLoss(temperature, soft_weight=soft, hard_weight=1 - soft))
            expected.append(kd(teacher, detached(outputs_of(model, inputs)), batch)["loss"].item())
            return super().distillation_loss(model, inputs, teacher, labels, num_items)

    found = trainer(tmp_path, gpt2(0, dropout=0.0), kd=KD, teacher=mode, kind=Watched)
    found.train()
    assert logged(found, "peer_loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("every", ["epoch", 8])
def test_a_training_without_a_snapshot_is_refused_before_the_first_step(every, tmp_path):
    student = gpt2(0)
    before = weights(student).clone()
    with pytest.raises(ValueError, match=r"8 steps in 1 epoch\(s\), and a snapshot is taken"):
        trainer(tmp_path, student, kd=KD, teacher=Snapshot(every), max_steps=8).train()
    assert torch.equal(weights(student), before)


def test_accumulated_batches_are_one(tmp_path):
    """Of a peer that learns, and of an average that follows once a step."""
    for make in (lambda: Mutual(gpt2(1, 24, 0.0), KD), lambda: EMA(0.5)):
        results = []
        for settings in ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 4}):
            found = trainer(tmp_path, gpt2(0, dropout=0.0), kd=KD, teacher=make(), **settings)
            found.train()
            results.append((weights(found.model), weights(found.teacher.model)))
        for one, four in zip(*results, strict=True):
            torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


def test_a_teacher_may_be_listened_to_later(tmp_path):
    """Its weight rises from 0; without that it takes no part, and is refused."""
    silent = fastkd.KDLoss(soft_weight=0.0, hard_weight=1.0)
    rising = Course(0.0, 0.5, "linear")
    found = trainer(tmp_path, gpt2(0), kd=silent, teacher=EMA(), soft_weight=rising, max_steps=3)
    found.train()
    assert logged(found, "soft_weight")[-1] > 0
    with pytest.raises(ValueError, match="EMA would take no part"):
        trainer(tmp_path, gpt2(0), kd=silent, teacher=EMA())


def test_a_rate_of_its_own_needs_the_trainers_optimizer(tmp_path):
    """Which a second training has already; one that is given has rates of its own."""
    peer = gpt2(1, 24, 0.0)
    found = trainer(tmp_path, gpt2(0), kd=KD, teacher=Mutual(peer, KD, learning_rate=1e-3), max_steps=1)
    before = weights(peer).clone()
    found.train()
    once = weights(peer).clone()
    found.train()
    assert not torch.equal(before, once)
    assert not torch.equal(once, weights(peer))
    student, peer = gpt2(0), gpt2(1, 24, 0.0)
    given = torch.optim.SGD([*student.parameters(), *peer.parameters()], 0.1)
    mode = Mutual(peer, KD, learning_rate=1e-3)
    with pytest.raises(ValueError, match="an optimizer was given"):
        trainer(tmp_path, student, kd=KD, teacher=mode, max_steps=1, optimizers=(given, None)).train()


@pytest.mark.parametrize("name", ["ema", "online", "multi_view"])
def test_bf16_autocast(name, tmp_path):
    """Accelerate replaces the forward of a student, of which a copy must not be the student's."""
    found = running(tmp_path, name, bf16=True)
    seen = set()
    if name == "online":
        found.teacher.model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *given: seen.add(given[-1].dtype))
    found.train()
    assert all(torch.isfinite(torch.tensor(logged(found, "loss"))))
    assert name != "online" or seen == {torch.bfloat16}
    if name == "ema":
        batch = next(iter(found.get_train_dataloader()))
        batch.pop("tokens", None)
        ids = {"input_ids": batch["input_ids"]}
        mean, own = (fastkd.project(model.eval(), **ids) for model in (found.teacher.model, found.model))
        assert mean.weight is not own.weight
        assert not torch.equal(mean.hidden, own.hidden)


@pytest.mark.parametrize("name", ["online", "mutual", "ema", "snapshot", "multi_view"])
def test_features_teach_too(name, tmp_path):
    """Hidden states and relations of attention; what they give the student changes nothing of what learns beside it."""
    makers = {"online": lambda: Online(gpt2(1, 24, 0.0)), "mutual": lambda: Mutual(gpt2(1, 24, 0.0), KD)}
    make, results = makers.get(name, MAKERS[name][0]), []
    for terms in ([], [HiddenStateTerm("last"), AttentionTerm("last", relation="values")]):
        found = trainer(tmp_path, gpt2(0, dropout=0.0), kd=KD, teacher=make(), terms=terms, max_steps=3)
        found.train()
        results.append((weights(found.model), weights(found.teacher.model)))
    assert logged(found, "hidden")[1] > 0
    assert logged(found, "attention")[1] > 0
    assert not torch.equal(results[0][0], results[1][0])
    if name == "online":
        assert torch.equal(results[0][1], results[1][1])


def test_a_padded_vocabulary(tmp_path):
    """Only the columns that are in both count: the loss is as without the padding."""
    losses = []
    for more in (0, 4):
        above = gpt2(1, 24, 0.0)
        above.resize_token_embeddings(VOCAB + more, mean_resizing=False)
        mode = Mutual(above, fastkd.KDLoss(1.0, vocab_size=VOCAB))
        kd = fastkd.KDLoss(1.0, vocab_size=VOCAB)
        found = trainer(tmp_path, gpt2(0, dropout=0.0), kd=kd, teacher=mode, max_steps=2)
        found.train()
        losses.append(logged(found, "loss") + logged(found, "peer_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_wrong_teachers_are_refused_before_the_first_step(tmp_path):
    def refused(mode, match):
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, student, teacher=mode)

    student = gpt2(0)
    refused(Online(student), "the teacher is the student itself")
    refused(Mutual(gpt2(0)), "the peer has the student's weights")
    other = copy.deepcopy(teacher()).train().requires_grad_(True)
    other.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    refused(Online(other), f"the student has a vocabulary of {VOCAB} and the teacher one of {VOCAB + 4}")
    frozen = other.eval().requires_grad_(False)
    refused(Mixed([teacher(), frozen]), f"of {VOCAB} and teacher 1 one of {VOCAB + 4}")
    refused(Routed({"a": teacher(), "b": frozen}), f"of {VOCAB} and teacher 'b' one of {VOCAB + 4}")
    mixed, mse = Mixed([teacher()]), fastkd.KDLoss(1.0, divergence="mse")
    with pytest.raises(ValueError, match=r"Mixed cannot serve this loss: MSE.* compares raw logits"):
        trainer(tmp_path, student, kd=mse, teacher=mixed)
    with pytest.raises(ValueError, match="names the teacher of each row"):
        trainer(tmp_path, student, teacher=Routed([teacher()])).train()


def test_columns_for_the_teacher_are_kept(tmp_path):
    """Trainer takes from examples what is no argument of the student. A collator may bring them too."""
    datasets = pytest.importorskip("datasets")

    def made(data, teacher=None, **settings):
        mode = teacher or MAKERS["routed"][0]()
        return trainer(
            tmp_path, gpt2(0), kd=KD, teacher=mode, data=data, remove_unused_columns=True, max_steps=1, **settings
        )

    rows = [Corpora(windows())[index] for index in range(8)]
    listed = datasets.Dataset.from_list([{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows])
    numbered = listed.add_column("corpus", [row["corpus"] for row in rows])
    for data in (Corpora(windows()), numbered, numbered.to_iterable_dataset()):
        made(data, data_collator=transformers.default_data_collator).train()
    plain = Ragged(windows())
    made(plain, data_collator=lambda examples: {**collate(examples), "corpus": [0] * len(examples)}).train()
    made(plain, Cached(), data_collator=WithTeacher()).train()
    made(Corpora(windows()), Frozen(teacher())).train()


def test_predictions_that_examples_bring_are_read(tmp_path):
    """Beside a frozen teacher too, in whose place they come, whether Trainer takes unused columns or not."""
    generator = torch.Generator().manual_seed(7)
    told = torch.randn(8, LENGTH, VOCAB, generator=generator)
    rows = [
        {**{name: row[name] for name in ("input_ids", "labels")}, "teacher": one}
        for row, one in zip([Ragged(windows())[index] for index in range(8)], told, strict=True)
    ]
    options = {"data": rows, "data_collator": transformers.default_data_collator, "max_steps": 1}
    soft = []
    for mode in (Cached(), Frozen(teacher())):
        for taken in (True, False):
            found = trainer(tmp_path, gpt2(0, dropout=0.0), teacher=mode, remove_unused_columns=taken, **options)
            found.train()
            soft.append(logged(found, "soft"))
    assert soft == soft[:1] * 4
    for row in rows:
        del row["teacher"]
    found = trainer(tmp_path, gpt2(0, dropout=0.0), teacher=teacher(), **options)
    found.train()
    assert logged(found, "soft") != soft[0]


@pytest.mark.parametrize("name", sorted(MODES.keys() - {"frozen", "cached"}))
def test_predictions_that_no_one_would_read_are_refused(name, tmp_path):
    found = running(tmp_path, name)
    batch = next(iter(found.get_train_dataloader()))
    batch.pop("live_tokens", None)
    with pytest.raises(ValueError, match=rf"but {type(found.teacher).__name__} makes its own: take 'teacher' out"):
        found.compute_loss(found.model, {**batch, "teacher": torch.zeros(4, LENGTH, VOCAB)})
    found.compute_loss(found.model, {**batch, "teacher": None})


def test_a_column_called_teacher_may_name_it(tmp_path):
    mode = Routed([teacher(), gpt2(2, 8).eval().requires_grad_(False)], "teacher")
    found = trainer(tmp_path, gpt2(0), kd=KD, teacher=mode)
    batch = {**collate([Ragged(windows())[0]]), "teacher": [1]}
    assert torch.isfinite(found.compute_loss(found.model, batch))
