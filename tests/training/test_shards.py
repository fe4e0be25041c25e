"""`KDTrainer` on packed rows, on shifted labels, on parts of sequences and on several processes: one judge."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental import context_parallel

import fastkd
from fastkd.teachers import Mutual, Online, Routed
from fastkd.terms import AttentionTerm, HiddenStateTerm
from fastkd.training.counting import Counting, labels_of
from fastkd.training.trainer import KDTrainer
from tests.processes import run
from tests.training.test_trainer import VOCAB, Ragged, logged, model, teacher, trainer, windows

DOCUMENTS = (5, 3, 4)


class Gradients(transformers.TrainerCallback):
    """Of each optimizer step, those of everything that is trained."""

    def __init__(self) -> None:
        self.found: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.found.append([weight.grad.clone() for weight in trained if weight.grad is not None])


def test_labels_that_examples_bring_shifted_are_read(tmp_path):
    """Also where Trainer takes from the examples what is no argument of the student."""
    ids, hard = windows(8), []
    rows = [
        {"input_ids": row, "labels": row, "shift_labels": fastkd.next_token_labels(row[None].flip(1))[0]} for row in ids
    ]
    for taken in (True, False):
        options = {"remove_unused_columns": taken, "data_collator": transformers.default_data_collator}
        found = trainer(tmp_path, model(0), teacher=teacher(), data=rows, max_steps=1, **options)
        found.train()
        hard.append(logged(found, "hard"))
    assert hard[0] == hard[1]
    for row in rows:
        del row["shift_labels"]
    found = trainer(tmp_path, model(0), teacher=teacher(), data=rows, max_steps=1, **options)
    found.train()
    assert logged(found, "hard") != hard[0]


def apart(examples):
    """The documents of each row as rows of their own."""
    parts = [(part, part) for example in examples for part in example["input_ids"].split(DOCUMENTS)]
    padded = [functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_value=fill) for fill in (0, -100)]
    ids, labels = (pad(side) for pad, side in zip(padded, zip(*parts, strict=True), strict=True))
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def packed(examples):
    """The same documents in one row each example, whose labels say nothing of where documents begin."""
    ids = torch.stack([example["input_ids"] for example in examples])
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def shifted(examples):
    """Labels at the positions that predict them, and no others."""
    batch = packed(examples)
    labels = fastkd.next_token_labels(batch.pop("labels"), position_ids=batch["position_ids"])
    return {**batch, "shift_labels": labels}


def test_packed_rows_are_their_documents(tmp_path):
    """Two batches a step, whose rows are of three documents; no token is scored against the next document's first."""
    results = {}
    for collator in (apart, packed, shifted):
        student, seen = model(0), Gradients()  # whose seed the projector's start follows too
        found = trainer(
            tmp_path,
            student,
            teacher=teacher(),
            terms=[HiddenStateTerm("last:1", weight=0.5)],
            data_collator=collator,
            eval_dataset=Ragged(windows(6)),
            gradient_accumulation_steps=2,
            callbacks=[seen],
            max_steps=2,
        )
        found.train()
        lines = {name: logged(found, name) for name in ("loss", "soft", "hard", "hidden")}
        results[collator.__name__] = lines, seen.found
        if collator is apart:  # as many rows as examples are what Trainer evaluates
            continue
        batch = apart(list(Ragged(windows(6))))
        logits = student(**{**batch, "labels": None}).logits[:, :-1].flatten(0, 1)
        hard = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item()
        assert found.evaluate()["eval_hard"] == pytest.approx(hard, rel=1e-6)
    lines, gradients = results.pop("apart")
    for other, theirs in results.values():
        for name, values in lines.items():
            assert other[name] == pytest.approx(values, rel=1e-6)
        assert_same(theirs, gradients)


class NoPositions(transformers.BloomForCausalLM):
    """A student that takes no positions, nor whatever it is given."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("kind", [transformers.BloomForCausalLM, NoPositions])
def test_documents_end_for_students_without_positions(tmp_path, kind):
    """Trainer would take the positions of the examples away. Such a student reads a row as one text either way."""
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.3)
    whole = packed([{"input_ids": row} for row in windows(8)])
    ended = {**whole, "labels": whole["labels"].masked_fill(whole["position_ids"] == 0, -100)}
    del ended["position_ids"]
    results = []
    for batch in (whole, ended):
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        torch.manual_seed(0)
        student, above, seen = kind(config), kind(config).eval().requires_grad_(False), Gradients()
        found = trainer(
            tmp_path,
            student,
            teacher=above,
            data=rows,
            eval_dataset=rows,
            data_collator=transformers.default_data_collator,
            remove_unused_columns=True,
            callbacks=[seen],
            max_steps=2,
        )
        found.train()
        results.append((logged(found, "hard"), found.evaluate()["eval_hard"], seen.found))
    (hard, judged, gradients), (expected, judged_apart, theirs) = results
    assert hard == pytest.approx(expected, rel=1e-6)
    assert judged == pytest.approx(judged_apart, rel=1e-6)
    assert_same(gradients, theirs)


def assert_same(found, expected):
    """Gradients of each step are the same, and are some."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            largest = float(other.abs().max())  # sums over tokens may cancel: an element is as right as the largest
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * largest)
        assert max(float(gradient.abs().max()) for gradient in theirs) > 0.01


class Named(Ragged):
    """Rows of different numbers of labels, and the teacher of each."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "teacher_name": torch.tensor(index % 2)}


def mixture(seed: int) -> transformers.PreTrainedModel:
    """A mixture of experts, whose router has a loss of its own."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=2, **sizes)
    config.output_router_logits, config.router_aux_loss_coef, config.initializer_range = True, 0.25, 0.3
    return transformers.MixtralForCausalLM(config)


#: What has a value per step: (student, teacher, terms), made anew for each training.
CASES = {
    "terms": lambda: (mixture(0), teacher(), [HiddenStateTerm("last:1", weight=0.5), AttentionTerm("last:1", "qk")]),
    "online": lambda: (model(0), Online(mixture(1)), []),
    "mutual": lambda: (model(0), Mutual(model(1, 24)), []),
    "routed": lambda: (model(0), Routed([teacher(), model(2).eval().requires_grad_(False)]), []),
}


def trained(path, batches: int, cases: Sequence[str] = tuple(CASES), average: bool = True) -> dict:
    """Two steps of `batches` batches of two rows each, of each case: logs and gradients."""
    found = {}
    for name in cases:
        student, above, beside = CASES[name]()
        seen = Gradients()
        one = trainer(
            path,
            student,
            teacher=above,
            terms=beside,
            data=(Named if name == "routed" else Ragged)(windows()),
            callbacks=[seen],
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=batches,
            average_tokens_across_devices=average,
        )
        one.train()
        unlogged = ("grad_norm", "learning_rate", "tokens_per_second", "epoch", "step")
        lines = [line for line in one.state.log_history if "loss" in line]
        found[name] = [{k: v for k, v in line.items() if k not in unlogged} for line in lines], seen.found
    return found


def in_processes(rank: int, world: int, path: str):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT="29578", ACCELERATE_USE_CPU="true")
    return (
        trained(path, 4 // world),
        trained(path, 4 // world, ["terms"], average=False),
        parts_of_sequences(rank, world, path),
    )


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    return run(2, in_processes, 2, str(tmp_path_factory.mktemp("two")))


def test_two_processes_are_one(in_two, tmp_path):
    """Of four batches of unequal numbers of live tokens, two on each: accumulation, terms, teachers that learn."""
    first, second = in_two
    alone = trained(tmp_path, 4)
    for name, (lines, gradients) in alone.items():
        for _, theirs in (first[0][name], second[0][name]):
            assert_same(theirs, gradients)
        assert first[0][name][0] == [pytest.approx(line, rel=1e-6) for line in lines]


def test_parts_of_a_loss_are_logged_as_the_loss_is(in_two):
    """Also where each process divides by its own tokens, and the losses logged are means over processes."""
    for process in in_two:
        lines, _ = process[1]["terms"]
        whole, _ = process[0]["terms"]
        assert lines[0]["loss"] != pytest.approx(whole[0]["loss"], rel=1e-4)
        for line in (*lines, *whole):
            parts = 0.5 * (line["soft"] + line["hard"]) + 0.5 * line["hidden"] + line["attention"]
            assert line["loss"] == pytest.approx(parts + 0.25 * line["router"], rel=1e-6)


class NoAttention(nn.Module):
    """In the place of attention: what a model then says of a part of a sequence is what it says of it in the whole."""

    def forward(self, hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None


def tokenwise(seed: int, wide: int = 16) -> transformers.PreTrainedModel:
    found = model(seed, wide)
    found.model.layers[0].self_attn = NoAttention()
    return found


def a_step(
    path, batch: dict, prepare=lambda found: None, cached: bool = False
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Loss and hard loss of Trainer's step on one batch, and gradients, of a student and of a term's projector.

    All are to be averaged over processes.
    """
    student, above = tokenwise(0), tokenwise(1, 24).eval().requires_grad_(False)
    beside = [] if cached else [HiddenStateTerm("last:1", weight=0.5)]
    found = trainer(path, student, teacher=None if cached else above, terms=beside)
    if cached:
        logprobs, ids = above(batch["input_ids"]).logits.div(2).log_softmax(-1).topk(8)
        targets = fastkd.SparseTargets(ids, logprobs, "ghost", temperature=2.0)
        batch = {**batch, "teacher": targets}
    prepare(found)
    items = found._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = found.training_step(student, Counting(dict)(batch), items)  # as its DataLoader makes them
    trained = [*student.parameters(), *found.terms.parameters()]
    both = torch.stack((loss, found.terms.take_sums()["hard"] * found.accelerator.num_processes))
    return both, [[weight.grad for weight in trained if weight.grad is not None]]  # a norm before no attention


def in_context_parallel(found: KDTrainer, world: int) -> None:
    """What accelerate makes of `cp_size=world`, but on a CPU, where torch has no attention for it."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    sizes = {"cp_size": world, "tp_size": 1, "sp_size": 1, "cp_enabled": True, "sp_enabled": False}
    found.accelerator.state.parallelism_config = SimpleNamespace(**sizes, cp_backend="torch", sp_backend=None)
    found.accelerator._cp_context = functools.partial(context_parallel, mesh=mesh)


def parts_of_sequences(rank: int, world: int, path: str) -> list:
    """A step of each kind: averages over processes of losses and gradients."""
    whole, everyone, found = packed([{"input_ids": ids} for ids in windows(4)]), dist.group.WORLD, []
    whole["labels"] = whole["labels"].masked_fill(whole["labels"] % 5 == 0, -100)
    for cached in (False, True):
        given = {name: value.contiguous().clone() for name, value in whole.items()}
        found.append(a_step(path, given, lambda one: in_context_parallel(one, world), cached))
    for layout in ("contiguous", "zigzag"):
        chunks = {"contiguous": [rank], "zigzag": [rank, 2 * world - 1 - rank]}[layout]
        parts = {
            name: torch.cat([value.chunk(world * len(chunks), 1)[chunk] for chunk in chunks], 1)
            for name, value in whole.items()
        }
        options = {"position_ids": parts["position_ids"], "group": everyone, "layout": layout}
        parts["shift_labels"] = fastkd.next_token_labels(parts.pop("labels"), **options)
        found.append(a_step(path, parts))
    for losses, (gradients,) in found:
        for values in (losses, *gradients):
            dist.all_reduce(values)
            values /= world
    return found


def test_parts_of_sequences_are_the_whole(in_two, tmp_path):
    """Cut by torch's context_parallel within Trainer's step, and by the user in either layout."""
    batch = packed([{"input_ids": ids} for ids in windows(4)])
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] % 5 == 0, -100)
    live, cache = (a_step(tmp_path, batch, cached=cached) for cached in (False, True))
    labels = fastkd.next_token_labels(batch["labels"], position_ids=batch["position_ids"]).flatten()
    hard = nn.functional.cross_entropy(tokenwise(0)(batch["input_ids"]).logits.flatten(0, 1), labels)
    torch.testing.assert_close(live[0][1], hard, rtol=1e-6, atol=0)
    for process in in_two:
        for (found, theirs), (losses, gradients) in zip(process[2], (live, cache, live, live), strict=True):
            torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
            assert_same(theirs, gradients)


def test_what_could_not_be_right_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="-100 where nothing is learnt, got ignore_index=0"):
        trainer(tmp_path, model(0), teacher=teacher(), kd=fastkd.KDLoss(ignore_index=0))
    above, told = teacher(), torch.zeros(2, 12, VOCAB)
    sharded = trainer(tmp_path, model(0), teacher=above)
    with monkeypatch.context() as patched:  # a teacher may stay whole beside a student in parts
        patched.setattr(accelerate.Accelerator, "is_fsdp2", property(lambda self: True))
        found = sharded.soft_targets(sharded.model, {"input_ids": windows(2), "teacher": told})
        assert torch.equal(found.logits, told)
    above.__class__ = type("Sharded", (FSDPModule, type(above)), {})  # as fully_shard makes it
    with pytest.raises(ValueError, match="but the teacher is in parts on all processes"):
        sharded.soft_targets(sharded.model, {"input_ids": windows(2), "teacher": told})
    batch = shifted([{"input_ids": ids} for ids in windows(4)])
    heads = trainer(tmp_path, model(0), teacher=teacher(), terms=[fastkd.MultiTokenTerm(1)])
    with pytest.raises(ValueError, match="'multi_token' needs labels further ahead than shift_labels"):
        heads.compute_loss(heads.model, batch)
    del batch["shift_labels"]
    with pytest.raises(ValueError, match="neither labels nor shift_labels, but input_ids, position_ids"):
        heads.compute_loss(heads.model, batch)
    with pytest.raises(ValueError, match="neither labels nor shift_labels"):
        heads.prediction_step(heads.model, batch, prediction_loss_only=False)
    monkeypatch.setattr(transformers.Trainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match=r"with cp_size=2 .* not that of Frozen"):
        trainer(tmp_path, model(0), teacher=teacher())
    monkeypatch.setattr(transformers.Trainer, "get_sp_size", lambda self: 2)
    with pytest.raises(ValueError, match="sp_size=2"):
        trainer(tmp_path, model(0), teacher=teacher())


def test_positions_of_another_shape_tell_no_documents_apart():
    """Those of images are three of a token; those of one row may serve all."""
    ids = windows(4)
    assert torch.equal(labels_of({"labels": ids, "position_ids": torch.zeros(3, *ids.shape)}).labels, ids)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    for given in (positions[None], positions.expand_as(ids)):
        found = labels_of({"labels": ids, "position_ids": given}).labels
        assert (found == -100).sum() == len(ids) * len(DOCUMENTS)
        assert torch.equal(found == -100, (positions == 0).expand_as(ids))
