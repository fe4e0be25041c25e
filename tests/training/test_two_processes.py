"""Trainings on two processes are those on one, to the weights: plain, sharded, with terms, with teachers that learn.

What is logged of each batch, and gradients where there are several a step: `test_shards`.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed.fsdp as fsdp

from fastkd.teachers import EMA, Online
from fastkd.terms import AttentionTerm, HiddenStateTerm
from fastkd.training.data import collate
from tests.features import frozen, llama
from tests.features import gpt2 as deep_gpt2
from tests.processes import run
from tests.training.test_teacher_modes import KD, gpt2
from tests.training.test_terms import LastHidden
from tests.training.test_trainer import Ragged, logged, model, teacher, trainer, weights, windows

TOKENS = 60  # labels of the first eight rows
BATCH = 16  # of all processes
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def replicated(path, rank: int, world: int):
    """Three steps and a validation."""
    found = trainer(
        path, model(0), teacher=teacher(), per_device_train_batch_size=BATCH // world, eval_dataset=Ragged(windows(7))
    )
    found.train()
    lines = {name: logged(found, name) for name in ("loss", "soft", "hard")}
    return weights(found.model), lines, found.evaluate()["eval_hard"]


def sharded(path, rank: int, world: int):
    """Gradients of a student whose layer has a unit of its own, and of one whose root is the only one."""
    rows = 8 // world
    mine = collate([Ragged(windows())[index] for index in range(rows * rank, rows * (rank + 1))])
    gradients = []
    for units in (True, False):
        student = model(0)
        if world > 1:
            if units:
                fsdp.fully_shard(student.model.layers[0])
            fsdp.fully_shard(student)
        trainer(path, student, teacher=teacher()).compute_loss(student, mine, num_items_in_batch=TOKENS).backward()
        found = [weight.grad if world == 1 else weight.grad.full_tensor() for weight in student.parameters()]
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    return gradients


def beside_a_term(path, rank: int, world: int):
    term = LastHidden("hidden", 2.0)
    with torch.no_grad():
        term.projector.weight.add_(rank)  # the first process' counts
    settings = {"per_device_train_batch_size": BATCH // world, "max_grad_norm": 0.5}
    found = trainer(path, model(0), teacher=teacher(), terms=[term], **settings)
    found.train()
    return weights(found.model), weights(term), logged(found, "hidden")


def below_teachers_that_learn(path, rank: int, world: int):
    results = []
    for name in ("online", "ema"):
        torch.manual_seed(rank)  # the first process' start counts
        student = gpt2(rank, dropout=0.0)
        mode = Online(gpt2(1 + rank, 24, 0.0), 1e-3) if name == "online" else EMA(0.5)
        settings = {"per_device_train_batch_size": BATCH // world, "max_grad_norm": 0.5}
        found = trainer(path, student, kd=KD, teacher=mode, **settings)
        found.train()
        results.append((weights(found.model), weights(mode.model), logged(found, "loss")))
    return results


def of_some_blocks(path, rank: int, world: int):
    """Of terms that read one block of each model, and never the last one."""
    torch.manual_seed(3)
    student, above = deep_gpt2(16, 3, attention="sdpa"), frozen(llama(24, 3, attention="sdpa"))
    terms = [HiddenStateTerm([[0, 1]], weight=0.5), AttentionTerm([[1, 0]], "qk", weight=0.2)]
    torch.manual_seed(4)
    settings = {"per_device_train_batch_size": BATCH // world, "max_grad_norm": 0.5}
    settings |= CHECKPOINTED if world > 1 else {}
    found = trainer(path, student, teacher=above, terms=terms, **settings)
    found.train()
    return weights(found.model), weights(terms[0]), logged(found, "hidden"), logged(found, "attention")


TRAININGS = (replicated, sharded, beside_a_term, below_teachers_that_learn, of_some_blocks)


def in_processes(rank: int, world: int, path: str):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT="29577", ACCELERATE_USE_CPU="true")
    return {training: training(path, rank, world) for training in TRAININGS}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """What each process has of each training: a group of processes for all, since each imports transformers."""
    return run(2, in_processes, 2, str(tmp_path_factory.mktemp("two")))


def test_replicated(in_two, tmp_path):
    student, lines, hard = replicated(tmp_path, 0, 1)
    for process in in_two:
        found, _, measured = process[replicated]
        assert_close(found, student)
        assert measured == pytest.approx(hard, rel=1e-5)
    for name, values in in_two[0][replicated][1].items():
        assert values == pytest.approx(lines[name], rel=1e-5)


def test_sharded(in_two, tmp_path):
    batch = collate([Ragged(windows())[index] for index in range(8)])
    assert (batch["labels"][:, 1:] != -100).sum() == TOKENS
    expected, _ = sharded(tmp_path, 0, 1)
    for found in in_two[0][sharded]:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 0.01


def test_beside_a_term(in_two, tmp_path):
    student, projector, logs = beside_a_term(tmp_path, 0, 1)
    for process in in_two:
        assert_close(process[beside_a_term][:2], (student, projector))
    assert in_two[0][beside_a_term][2] == pytest.approx(logs, rel=1e-5)


def test_below_teachers_that_learn(in_two, tmp_path):
    """A teacher trained beside the student, and an average of its weights; one norm of all gradients is cut."""
    for index, (student, above, losses) in enumerate(below_teachers_that_learn(tmp_path, 0, 1)):
        for process in in_two:
            assert_close(process[below_teachers_that_learn][index][:2], (student, above))
        assert in_two[0][below_teachers_that_learn][index][2] == pytest.approx(losses, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_blocks_that_no_term_reads(in_two, tmp_path):
    """They are left out of what the student returns, in DDP and under checkpointing, which computes them again, too."""
    student, projector, hidden, attention = of_some_blocks(tmp_path, 0, 1)
    assert min(hidden + attention) > 0
    for process in in_two:
        assert_close(process[of_some_blocks][:2], (student, projector))
    assert in_two[0][of_some_blocks][2:] == (pytest.approx(hidden, rel=1e-5), pytest.approx(attention, rel=1e-5))
