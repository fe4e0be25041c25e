"""Tiny models for the modes of teachers, a loop for all of them, and a forward that counts."""

from __future__ import annotations

import copy

import pytest
import torch

import fastkd
from fastkd.terms import Batch, KDTerm, outputs_of

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, ROWS = 60, 10, 4


def gpt2(seed, wide=16, *, vocab=VOCAB, dropout=0.0):
    """A float32 GPT-2 of two layers, in training mode; its output head is tied to its embedding."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_positions=LENGTH,
        n_embd=wide,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config).train()


def frozen(seed, wide=24, **settings):
    return gpt2(seed, wide, **settings).eval().requires_grad_(False)


def inputs(step, rows=ROWS):
    ids = torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids)
    mask[0, LENGTH - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labelled(step, rows=ROWS):
    """The batch of a step and its labels, of which each row has another number."""
    found = inputs(step, rows)
    labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    for row in range(rows):
        labels[row, : 1 + row] = -100
    return found, Batch(labels, found)


def counted(model):
    """How often a model's forward is called: a list that grows."""
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def weights(*models):
    return torch.cat([weight.detach().flatten() for model in models for weight in model.parameters()])


def loss_of(mode, student, step, kd, taken=None, rows=ROWS):
    """(the whole loss of a step, what the mode adds to it)."""
    found, batch = labelled(step, rows)
    above = mode.outputs(student, found, taken or {})
    seen = outputs_of(student, found)
    added = mode.loss(seen, batch)
    return kd(seen, above, batch)["loss"] + sum(added.values()), added


class Loop:
    """A training of one's own: student, mode, optimizer, and what a checkpoint of them holds."""

    def __init__(self, student, mode, learning_rate=1e-2):
        self.student, self.mode, self.step = student, mode, 0
        self.kd = KDTerm(fastkd.KDLoss(2.0))
        self.optimizer = torch.optim.AdamW([*student.parameters(), *mode.trained], learning_rate)
        mode.check(student)

    def take(self, steps, columns=lambda step: None):
        for _ in range(steps):
            loss, _ = loss_of(self.mode, self.student, self.step, self.kd, columns(self.step))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.mode.stepped(self.student, self.step, epoch_ended=self.step % 2 == 0)
        return self

    def saved(self, file):
        state = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save({**state, "mode": self.mode.kept(), "random": torch.get_rng_state()}, file)
        return file

    def resume(self, file):
        state = torch.load(file, weights_only=True)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mode.restore(state["mode"])
        self.step = state["step"]
        torch.set_rng_state(state["random"])
        return self


def assert_resumed_is_uninterrupted(make, tmp_path, columns=lambda step: None):
    """`make()` gives (student, mode), the same each time. Bit for bit, of both, after 5 steps, begun again after 3."""
    whole = Loop(*make())
    torch.manual_seed(5)
    whole.take(3, columns)
    file = whole.saved(tmp_path / "state.pt")
    whole.take(2, columns)
    rest = Loop(*make())
    with torch.no_grad():
        for weight in rest.student.parameters():
            weight.add_(0.1)  # what is resumed does not hang on the start
    rest.resume(file).take(2, columns)
    assert torch.equal(weights(whole.student), weights(rest.student))
    torch.save(whole.mode.kept(), tmp_path / "whole.pt")
    torch.save(rest.mode.kept(), tmp_path / "rest.pt")
    for one, other in zip(*(_leaves(torch.load(tmp_path / f"{name}.pt")) for name in ("whole", "rest")), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return whole, rest


def _leaves(kept):
    if isinstance(kept, dict):
        return [leaf for name in sorted(kept) for leaf in _leaves(kept[name])]
    return [kept]


def double(model):
    return copy.deepcopy(model).double()


def rows_of(logits, labels):
    """(logits, labels) of the positions that predict something that counts: `[n, V]`, `[n]`."""
    after = labels[:, 1:].flatten()
    counts = after != -100
    return logits[:, :-1].flatten(0, 1)[counts], after[counts]


def kl(above, below, temperature):
    """Mean KL(above ‖ below) of rows of logits, times T²."""
    p, q = (one / temperature for one in (above, below))
    rows = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    return temperature**2 * rows.mean()
