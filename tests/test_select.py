"""What a cache keeps of a row: the likeliest tokens, or a sample whose weights are right in expectation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastkd import reference
from fastkd.backend import Backend, select
from fastkd.kernels import cpu
from tests import cases, compare

VOCABULARIES = (1, 2, 17, 63, 64, 65, 1023, 1024, 1025, 5003, 50257)
MEMORY_GUARD = 7.0


def exact_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.double() / temperature, -1)


@pytest.mark.parametrize("k", [1, 12, 64])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_top_k(backend: str, family: str, vocab: int, k: int) -> None:
    logits, _ = cases.logits(family, 3, vocab)
    ids, logprobs, rest = select(logits).top_k(logits, k, 1.5)
    exact = torch.log_softmax(logits.double() / 1.5, -1)
    eager = torch.log_softmax(logits / 1.5, -1)
    expected, places = exact.topk(min(k, vocab), -1)
    kept = ids[:, : min(k, vocab)]
    assert ids.shape == logprobs.shape == (3, k)
    assert (kept.diff(dim=-1) > 0).all()
    assert torch.equal(kept, places.sort(-1).values)
    compare.assert_value(logprobs[:, : min(k, vocab)], exact.gather(-1, kept), eager.gather(-1, kept))
    assert (logprobs[:, vocab:] == -math.inf).all()
    assert (ids[:, vocab:] == 0).all()
    others = exact.scatter(-1, places, -math.inf).logsumexp(-1)
    compare.assert_value(rest, others, eager.scatter(-1, places, -math.inf).logsumexp(-1))
    assert expected.shape == kept.shape


def test_mass_not_kept_is_right_however_small(backend: str) -> None:
    """1 − Σ of the kept would read 0 or 1e-7 here."""
    logits = torch.full((2, 5000), -40.0)
    logits[0, [7, 4000]] = torch.tensor([0.0, -1.0])
    logits[1, 1500] = 5.0
    _, _, rest = select(logits).top_k(logits, 2, 1.0)
    exact = exact_probabilities(logits, 1.0)
    expected = torch.tensor([exact[0].sort().values[:-2].sum().log(), exact[1].sort().values[:-2].sum().log()])
    assert (expected < -27).all()  # 1e-12
    compare.assert_value(rest, expected)


def is_optimal(logits: Tensor, k: int, temperature: float, ids: Tensor, log_weights: Tensor) -> Tensor:
    """Mark the rows whose sample has the heads, the number of draws and the step that the definition asks for."""
    p = exact_probabilities(logits, temperature).sort(-1, descending=True).values
    good = []
    for row, found in zip(p, log_weights.double().exp().sort(-1, descending=True).values, strict=True):
        heads = 0
        while heads < min(k, len(row)) and row[heads] * (k - heads) >= row[heads:].sum():
            heads += 1
        step = row[heads:].sum() / max(k - heads, 1)
        expected = torch.cat((row[:heads], step.repeat(k - heads)))
        good.append(torch.allclose(found, expected, rtol=1e-5, atol=1e-12))
    return torch.tensor(good)


@pytest.mark.parametrize("k", [1, 12, 64])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("family", ["far", "peaked", "flat", "offset"])
def test_sample_is_the_scheme_of_least_variance(backend: str, family: str, vocab: int, k: int) -> None:
    logits, _ = cases.logits(family, 4, vocab)
    uniforms = torch.tensor([0.0, 0.3, 0.7, 1 - 1e-16], dtype=torch.float64)
    ids, log_weights, entropy = select(logits).sample(logits, k, 1.5, uniforms)
    assert ids.shape == log_weights.shape == (4, k)
    assert is_optimal(logits, k, 1.5, ids, log_weights).all()
    for row, weights in zip(ids, log_weights, strict=True):
        kept = row[weights > -math.inf]
        assert (kept.diff() > 0).all()
        assert (weights[: len(kept)] > -math.inf).all()
        assert (row[len(kept) :] == 0).all()
    torch.testing.assert_close(
        log_weights.double().exp().sum(-1), torch.ones(4, dtype=torch.float64), rtol=2e-6, atol=0
    )
    eager = reference.row_statistics(logits, None, 1.5)[1]
    compare.assert_value(entropy, reference.row_statistics(logits.double(), None, 1.5)[1], eager)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_weights_are_right_in_expectation(backend: str, temperature: float) -> None:
    """Over a grid of uniforms the mean weight of a token is its probability: systematic draws integrate exactly.

    With m uniforms, spaced evenly, each token's share of draws is off by at most 1 ÷ m of a step.
    """
    logits, _ = cases.logits("far", 1, 1500)
    many, k = 4000, 12
    uniforms = (torch.arange(many, dtype=torch.float64) + 0.5) / many
    ids, log_weights, _ = select(logits).sample(logits.expand(many, -1), k, temperature, uniforms)
    mean = torch.zeros(1500, dtype=torch.float64)
    mean.index_add_(0, ids.flatten(), log_weights.double().exp().flatten() / many)
    p = exact_probabilities(logits, temperature)[0]
    step = log_weights.double().exp().min().item()
    assert (p < step).any()
    assert (p > step).any()
    assert (mean - p).abs().max().item() < 1.01 * step / many + 1e-7


def test_backends_draw_the_same_tokens() -> None:
    logits, _ = cases.logits("far", 64, 3001)
    uniforms = torch.rand(64, dtype=torch.float64)
    ours, theirs = (backend.sample(logits, 12, 1.0, uniforms)[0] for backend in (cpu, reference))
    assert (ours != theirs).float().mean() < 0.01  # a position may fall on another side of a rounded boundary
    assert (ours != reference.sample(logits, 12, 1.0, (uniforms + 0.5) % 1)[0]).float().mean() > 0.1


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dtypes_strides_and_padded_vocabularies(backend: str, dtype: torch.dtype) -> None:
    """Columns beyond a slice are not read: they would be the likeliest."""
    padded = torch.full((2, 5, 1040), 100.0, dtype=dtype)
    logits = padded[:, ::2, :1001]
    logits.copy_(cases.logits("far", 6, 1001, dtype)[0].view(2, 3, 1001))
    rows = logits.float().reshape(6, 1001)
    uniforms = torch.rand(6, dtype=torch.float64)
    exact = reference.top_k(rows.double(), 12, 1.0)
    ids, logprobs, rest = select(logits).top_k(logits, 12, 1.0)
    compare.assert_value(logprobs.exp(), exact[1].exp())
    compare.assert_value(rest, exact[2])
    assert torch.equal(rows.gather(1, ids), rows.gather(1, exact[0]))  # low precision has ties
    assert is_optimal(rows, 12, 1.0, *select(logits).sample(logits, 12, 1.0, uniforms)[:2]).all()


@pytest.mark.parametrize("vocab", [70, 5000])
def test_ties(backend: str, vocab: int) -> None:
    logits = torch.zeros(2, vocab)
    logits[1, ::2] = 1
    for function in (lambda: select(logits).top_k(logits, 12, 1.0), lambda: sampled(logits)):
        ids, log_weights, _ = function()
        assert (ids.diff(dim=-1) > 0).all()
        assert log_weights.isfinite().all()
    assert (select(logits).top_k(logits, 12, 1.0)[0][1] % 2 == 0).all()
    torch.testing.assert_close(sampled(logits)[1][0].exp(), torch.full((12,), 1 / 12))


def sampled(logits: Tensor, k: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return select(logits).sample(logits, k, 1.0, torch.full((len(logits),), 0.4, dtype=torch.float64))


def test_masked_and_broken_rows(backend: str) -> None:
    logits, _ = cases.logits("far", 4, 2100)
    logits[0] = -math.inf
    logits[0, [5, 2000]] = torch.tensor([1.0, 2.0])
    logits[1, 77] = math.nan
    logits[2] = -math.inf
    logits[3, 9] = math.inf
    for ids, values, summary in (select(logits).top_k(logits, 3, 1.0), sampled(logits, 3)):
        assert ids[0].tolist() == [5, 2000, 0]
        torch.testing.assert_close(values[0].exp(), torch.tensor([1 / (1 + math.e), math.e / (1 + math.e), 0]))
        for broken in (1, 2, 3):
            assert values[broken].isnan().all()
            assert summary[broken].isnan()
            assert (ids[broken] == 0).all()
    assert select(logits).top_k(logits, 3, 1.0)[2][0] == -math.inf


def test_probabilities_that_underflow(backend: str) -> None:
    """Tokens whose probability is 0 in fp32 have a log-probability; a sample gives them no more weight than that."""
    logits = torch.full((1, 1300), -300.0)
    logits[0, 1200] = 0.0
    ids, log_weights, _ = sampled(logits)
    assert log_weights[ids == 1200].tolist() == [0.0]
    assert (log_weights[ids != 1200] < -87).all()
    assert select(logits).top_k(logits, 2, 1.0)[1].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 700])
def test_many_rows_and_none(rows: int) -> None:
    """Threads share nothing: each row is what it is alone, twice the same bits."""
    logits, uniforms = torch.randn(rows, 1100), torch.rand(rows, dtype=torch.float64)
    whole = [cpu.sample(logits, 12, 1.0, uniforms) for _ in range(2)]
    torch.set_num_threads(1)
    whole.append(cpu.sample(logits, 12, 1.0, uniforms))
    for other in whole[1:]:
        assert all(torch.equal(a, b) for a, b in zip(whole[0], other, strict=True))
    assert whole[0][0].shape == (rows, 12)


def test_every_misalignment_of_a_row(backend: str) -> None:
    kernel: Backend = select(torch.ones(1))
    for offset in range(17):
        memory = torch.full((2000,), MEMORY_GUARD)
        memory[offset : offset + 1100] = torch.linspace(-3, 3, 1100)
        row = memory[offset : offset + 1100].view(1, 1100)
        assert kernel.top_k(row, 3, 1.0)[0].tolist() == [[1097, 1098, 1099]]
