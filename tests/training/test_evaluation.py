"""Every measure against its definition, in float64 and with all logits at once."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers

from fastkd.processes import Processes
from fastkd.training.commands.inspect_teacher import temperature_table
from fastkd.training.evaluation import BINS, diagnosis, flops, measure, predict, retention, unigram_loss
from tests.processes import run as in_processes

VOCAB, LENGTH = 311, 16  # several chunks of rows


def models(vocab_size=VOCAB):
    torch.manual_seed(0)
    for wide in (16, 24):
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=wide,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.6,
        )
        yield transformers.LlamaForCausalLM(config).eval()


def windows(count=37):
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def log_probabilities(model, vocab_size=VOCAB):
    return model(windows()).logits[:, :-1, :vocab_size].double().log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("padded", [False, True])
def test_measures_are_their_definitions(padded):
    """Also where both heads have more rows than there are tokens, of which nothing may be seen."""
    student, teacher = models(VOCAB + 9 if padded else VOCAB)
    counted = VOCAB if padded else None
    ours, theirs = (predict(model, windows(), 5, counted) for model in (student, teacher))
    found = measure(ours, windows(), theirs)
    log_q, log_p, labels = log_probabilities(student), log_probabilities(teacher), windows()[:, 1:].flatten()
    confidence, guesses = log_q.exp().max(-1)
    right = (guesses == labels).double()
    bins = np.digitize(confidence.numpy(), np.linspace(0, 1, BINS + 1)[1:-1])
    gaps = [abs((confidence - right)[torch.from_numpy(bins == place)].sum().item()) for place in range(BINS)]
    five = [
        set(row.tolist()) & set(other.tolist()) for row, other in zip(log_q.topk(5)[1], log_p.topk(5)[1], strict=True)
    ]
    expected = {
        "loss": -log_q.gather(1, labels[:, None]).mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top1_agreement": (guesses == log_p.argmax(-1)).double().mean().item(),
        "top5_agreement": sum(map(len, five)) / (5 * len(five)),
        "probability_correlation": np.corrcoef(log_q.exp().flatten(), log_p.exp().flatten())[0, 1],
        "calibration_error": sum(gaps) / len(labels),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    assert sum(share for share, _, _ in found.calibration) == pytest.approx(1)
    assert 0.01 < expected["calibration_error"] < 0.9
    by_window = {"loss": -log_q.gather(1, labels[:, None])[:, 0], "kl": (log_p.exp() * (log_p - log_q)).sum(-1)}
    assert found.sums.tokens.tolist() == [LENGTH - 1] * len(windows())
    for name, values in by_window.items():
        sums = getattr(found.sums, name)
        assert sums.tolist() == pytest.approx(values.view(len(windows()), -1).sum(1).tolist(), rel=1e-4)
        assert getattr(found, name) == pytest.approx((sums.sum() / found.sums.tokens.sum()).item(), rel=1e-12)
    record = found.record()
    assert (record["windows"], record["tokens"]) == (len(windows()), len(labels))
    assert json.loads(json.dumps(record)) == record
    itself = measure(theirs, windows(), theirs)
    again = measure(theirs, windows(), predict(teacher, windows(), 5, counted))
    for name in ("kl", "top1_agreement", "top5_agreement", "probability_correlation"):
        assert getattr(itself, name) == pytest.approx(getattr(again, name), abs=1e-6)


def measured(processes, count):
    """What two models are found to be over `count` windows in batches of 3, and how often each was run."""
    found, ran = [], []
    for model in models():
        calls = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append(predict(model, windows(count), 3, processes=processes))
        ran.append(len(calls))
    ours, theirs = found
    measures = [measure(ours, windows(count), theirs), measure(theirs, windows(count), theirs)]
    return [(vars(one), one.sums) for one in measures], ran


def shared(rank):
    """Of this process alone, and of both together, over 13 batches and over one."""
    together = Processes(dist.group.WORLD)
    return [(measured(Processes(), count), measured(together, count)) for count in (37, 2)]


def test_processes_share_the_windows_and_find_what_one_does():
    """To the last bit, each with half of the batches; a process without a batch runs a single token for the head."""
    found = in_processes(2, shared)
    for (expected, whole), by_rank in zip((pair[0] for pair in found[0]), zip(*found, strict=True), strict=True):
        batches = [whole[0] - whole[0] // 2, max(whole[0] // 2, 1)]
        for (_, (mine, ran)), count in zip(by_rank, batches, strict=True):
            assert ran == [count, count]
            for (values, sums), (wanted, wanted_sums) in zip(mine, expected, strict=True):
                assert {**values, "sums": 0} == {**wanted, "sums": 0}
                for name in ("tokens", "loss", "kl"):
                    assert torch.equal(getattr(sums, name), getattr(wanted_sums, name))
    assert found[0][0][0][1] == [13, 13]


def test_without_a_teacher_nothing_is_compared():
    student, _ = models()
    found = measure(predict(student, windows(), 8), windows())
    assert found.kl is found.top1_agreement is found.top5_agreement is found.probability_correlation is None
    assert found.loss > 0


def test_unigrams_and_retention():
    train, held_out = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[2, 0, 1, 2]])
    expected = -(math.log(4 / 8) + math.log(2 / 8) + math.log(1 / 8)) / 3  # of 4 ids, one is added to each count
    assert unigram_loss(train, held_out, 4) == pytest.approx(expected)
    assert retention(3.0, 2.0, 6.0) == 75
    assert retention(2.0, 2.0, 6.0) == 100
    assert retention(3.0, 6.0, 6.0) is None


def test_flops_of_a_known_distillation():
    """70B teaches 8B over 20B tokens: 3.76e21, which is 3.9 % of pretraining the 8B on 2T tokens."""
    found = flops(20e9, 70e9, 8e9)
    assert found == pytest.approx(3.76e21)
    assert found / flops(2e12, 0, 8e9) == pytest.approx(0.039, abs=5e-4)
    assert flops(60e9, 70e9, 8e9, teacher_tokens=20e9) == pytest.approx(2 * 70e9 * 20e9 + 6 * 8e9 * 60e9)


def test_diagnosis_says_what_to_try():
    student, teacher = models()
    ours, theirs = (predict(model, windows(), 8) for model in (student, teacher))
    bad, good = measure(ours, windows(), theirs), measure(theirs, windows(), theirs)
    assert [line.endswith(": good") for line in diagnosis(good)] == [True] * 3
    assert all(line.met for line in copy.deepcopy(diagnosis(good)))
    lines = diagnosis(bad)
    assert not any(line.met for line in lines)
    assert "temperature is too high" in lines[0]
    assert "capacity" in lines[1]
    assert "soft_weight" in lines[2]
    assert len(diagnosis(bad, good)) == 3 + (good.loss < bad.loss)


def test_temperature_table():
    """Of the logits that explain temperature everywhere, with the right numbers."""
    rows = temperature_table(torch.tensor([5.0, 3.0, 1.0, 0.5, -1.0]), [0.5, 1.0, 10.0])
    assert rows[2] == ["1", "0.5049", "0.7284", "0.8567", "0.1159", "0.0157", "0.0095", "0.0021"]
    entropies = [float(row[1]) for row in rows[1:]]
    assert entropies == sorted(entropies)
    assert entropies[-1] < math.log(5)
