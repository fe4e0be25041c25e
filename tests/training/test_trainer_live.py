"""`KDTrainer` tells its loss how many tokens of a batch count, where it is sure of it, and tells nobody else."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastkd
from fastkd.training.data import Windows, collate
from fastkd.training.trainer import KDTrainer
from tests.training.test_trainer import Ragged, model, teacher, trainer, windows


@pytest.fixture
def told(monkeypatch):
    """What losses are told, and how many tokens count."""
    found, forward = [], fastkd.KDLoss.forward

    def record(self, student, teacher, labels, **options):
        found.append((options.get("live"), int((labels[:, 1:] != -100).sum())))
        return forward(self, student, teacher, labels, **options)

    monkeypatch.setattr(fastkd.KDLoss, "forward", record)
    return found


def as_lists(examples):
    """A collator of the user's own, whose batches are no dicts."""
    return transformers.BatchEncoding(collate(examples))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 2},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"data_collator": as_lists},
        {"split_batches": True},
    ],
    ids=["one batch", "accumulated", "in a worker", "own collator", "split"],
)
def test_the_loss_is_told_how_many_tokens_count(tmp_path, told, settings):
    """Counted by the collator; on the CPU a wrong number raises."""
    if settings.pop("split_batches", False):
        settings["accelerator_config"] = {"split_batches": True}
    found = trainer(
        tmp_path, model(0), kd=fastkd.KDLoss(2.0), teacher=teacher(), eval_dataset=Windows(windows(8)), **settings
    )
    found.train()
    assert len(told) >= 3
    assert all(live == counted for live, counted in told)
    assert len({live for live, _ in told}) > 1
    found.evaluate()
    collator = settings.get("data_collator", collate)
    assert found.data_collator is collator


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from (Ragged(windows())[index] for index in range(32))


@pytest.mark.parametrize(
    "settings",
    [
        {"data": Streamed()},
        {"accelerator_config": {"dispatch_batches": True}, "data": Streamed()},
        {"mask_soft": False},
    ],
    ids=["streamed", "dispatched", "all count"],
)
def test_batches_that_are_cut_apart_later_are_not_counted(tmp_path, told, settings):
    kd = fastkd.KDLoss(2.0, mask_soft=settings.pop("mask_soft", True))
    trainer(tmp_path, model(0), kd=kd, teacher=teacher(), **settings).train()
    assert [live for live, _ in told] == [None] * 3


def test_an_override_that_masks_more_is_not_told_a_wrong_number(tmp_path, told):
    class Masking(KDTrainer):
        def distillation_loss(self, model, inputs, teacher, labels, num_items):
            masked = torch.where(torch.arange(labels.shape[1]) < 6, -100, labels)
            return super().distillation_loss(model, inputs, teacher, masked, num_items)

    trainer(tmp_path, model(0), teacher=teacher(), kind=Masking).train()
    assert [live for live, _ in told] == [None] * 3


def test_a_loss_of_the_users_own_is_told_nothing(tmp_path):
    """It may count fewer tokens, and need not know the argument."""

    class Weighing(fastkd.KDLoss):
        def forward(self, student, teacher, labels=None, *, weights=None, num_items=None):
            weights = (torch.arange(labels.shape[1]) >= 6).float().expand(labels.shape)
            return super().forward(student, teacher, labels, weights=weights, num_items=num_items)

    trainer(tmp_path, model(0), kd=Weighing(2.0), teacher=teacher()).train()


def test_models_are_not_given_the_number(tmp_path):
    """In an override that runs the model itself."""

    class Plain(KDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(set(inputs))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    seen = []
    found = trainer(tmp_path, model(0), teacher=teacher(), kind=Plain)
    found.train()
    assert seen
    assert all("live_tokens" not in names for names in seen)
    assert found._live is None
