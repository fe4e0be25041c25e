"""Records give back what was kept of a row, within the errors and in the bytes that `fastkd.cache` states."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import fastkd.cache
from fastkd import reference
from fastkd.cache.records import Dense, KeptTokens, PackedSampled, PackedTopK, Plain, Records
from tests import cases

VOCABULARIES = (1, 2, 255, 256, 257, 32000, 50257, 65536, 65537, 128256, 2**24 + 1)


def sampled(rows: int, vocab: int, k: int, family: str = "far") -> KeptTokens:
    logits, _ = cases.logits(family, rows, min(vocab, 3000))
    found = KeptTokens(*reference.sample(logits, k, 1.0, torch.rand(rows, dtype=torch.float64)))
    return found._replace(ids=torch.where(found.ids > 0, found.ids + vocab - min(vocab, 3000), 0))


def likeliest(rows: int, vocab: int, k: int, family: str = "far") -> KeptTokens:
    logits, _ = cases.logits(family, rows, min(vocab, 3000))
    return KeptTokens(*reference.top_k(logits, k, 1.0))


def uniforms(rows: int) -> np.ndarray:
    return np.random.default_rng(0).random(rows)


def dense_weights(rows: KeptTokens, vocab: int = 3000) -> torch.Tensor:
    """`[N, vocab]` probabilities, whatever the order of the tokens."""
    out = torch.zeros(len(rows.ids), vocab, dtype=torch.float64)
    return out.scatter_add(1, rows.ids, rows.log_weights.double().exp())


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("k", [1, 12, 13])
@pytest.mark.parametrize("kind", [Plain, PackedSampled, PackedTopK])
def test_ids_at_the_bits_they_need(kind: type[Records], k: int, vocab: int) -> None:
    """The largest id too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (50, k), generator=generator).sort(-1).values
    ids[0, -1] = vocab - 1
    log_weights = torch.log_softmax(torch.randn(50, k, generator=generator), -1)
    records = kind(vocab, k)
    packed = records.encode(KeptTokens(ids, log_weights, torch.zeros(50)), uniforms(50))
    assert packed.shape == (50, records.size)
    assert torch.equal(records.decode(packed).ids, ids)
    bits = max(1, (vocab - 1).bit_length())
    rest = {Plain: 8 * k + 4, PackedSampled: -(-k * bits // 8) + k + 2, PackedTopK: -(-k * bits // 8) + 2 * k + 4}
    assert records.size == rest[kind]


def test_bytes_per_token_are_those_of_the_table() -> None:
    table = dict(re.findall(r"\n\| (sampled|topk|dense)\S* .*?\| ([\d,]+) ", fastkd.cache.__doc__ or ""))
    sizes = {
        "sampled": PackedSampled(50257, 12).size,
        "topk": PackedTopK(50257, 64).size,
        "dense": Dense(50257, torch.float16).size,
    }
    assert {name: int(size.replace(",", "")) for name, size in table.items()} == sizes


@pytest.mark.parametrize("make", [sampled, likeliest])
def test_plain_records_are_exact(make) -> None:
    rows = make(40, 3000, 12)
    records = Plain(3000, 12)
    for before, after in zip(rows, records.decode(records.encode(rows, uniforms(40))), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("k", [1, 2, 12, 64, 300])
def test_packed_weights_of_a_sample(family: str, k: int) -> None:
    """Each within a step of 5.1 %, and one that is nearly nothing becomes nothing or 1.8e-6; all of them sum to 1."""
    rows, records = sampled(60, 3000, k, family), PackedSampled(3000, k)
    decoded = records.decode(records.encode(rows, uniforms(60)))
    before, after = dense_weights(rows), dense_weights(decoded)
    there = decoded.log_weights > -torch.inf
    places = torch.where(there, decoded.ids, 3000)
    assert (places.diff(dim=-1)[there[:, 1:]] > 0).all()
    assert (places.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(after.sum(-1), torch.ones(60, dtype=torch.float64), rtol=0, atol=1e-6)
    largest = rows.log_weights.exp().amax(-1, keepdim=True).double()
    others = before < largest * (1 - 1e-6)
    # The step below the grid, and the largest: off by what the others are together, less than one step of theirs.
    assert ((after - before).abs()[others] <= 0.051 * before[others] + 1.9e-6).all()
    assert ((after - before).abs()[~others] <= 0.051 * largest.expand_as(before)[~others] + 4e-6).all()
    if k == 12 and family == "far":
        assert (after - before).abs().max() > 1e-4  # or nothing was rounded
    torch.testing.assert_close(decoded.summary, rows.summary, rtol=5e-4, atol=1e-6)


def test_packed_weights_are_right_in_expectation() -> None:
    """Over a grid of uniforms, for weights between codes, above the largest and below the smallest."""
    many = 20000
    weights = torch.tensor([[0.55, 0.3, 0.1, 0.0499, 9e-5, 8e-6, 1e-6, 3e-9]], dtype=torch.float64)
    weights[0, 0] += 1 - weights.sum()
    rows = KeptTokens(torch.arange(8).repeat(many, 1), weights.log().float().repeat(many, 1), torch.ones(many))
    records = PackedSampled(3000, 8)
    packed = records.encode(rows, (np.arange(many) + 0.5) / many)
    after = dense_weights(records.decode(packed), 8)
    assert (after.std(0) > 0).all()
    error = (after.mean(0) - weights[0]).abs()
    assert (error <= 0.06 * weights[0] / many + 2e-6 / many + 4e-8).all(), error


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_packed_log_probabilities_of_a_top_k(family: str) -> None:
    """Probabilities within 6e-5; the rest is exact."""
    rows, records = likeliest(60, 3000, 64, family), PackedTopK(3000, 64)
    decoded = records.decode(records.encode(rows, uniforms(60)))
    assert ((dense_weights(decoded) - dense_weights(rows)).abs() <= 6e-5).all()
    assert torch.equal(decoded.summary, rows.summary)
    if family == "far":
        assert (decoded.log_weights - rows.log_weights).abs().max() > 1e-6


def test_tokens_that_are_not_there_and_improbable_ones() -> None:
    inf = torch.inf
    rows = KeptTokens(
        torch.tensor([[3, 9, 0], [3, 9, 11]]),
        torch.tensor([[0.0, -50.0, -inf], [0.0, -31.0, -90.0]]),
        torch.tensor([-inf, -100.0]),
    )
    records = PackedTopK(3000, 3)
    decoded = records.decode(records.encode(rows, uniforms(2)))
    assert decoded.log_weights[0, 2] == -inf
    assert decoded.summary[0] == -inf
    torch.testing.assert_close(
        decoded.log_weights[:, 1:], torch.tensor([[-32.0, -inf], [-31.0, -32.0]]), atol=1e-3, rtol=0
    )
    alone = KeptTokens(torch.tensor([[7, 0]]), torch.tensor([[0.0, -inf]]), torch.zeros(1))
    packed = PackedSampled(3000, 2)
    decoded = packed.decode(packed.encode(alone, uniforms(1)))
    assert decoded.ids[0, 0] == 7
    assert decoded.log_weights.tolist() == [[0.0, -inf]]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_dense_records(dtype: torch.dtype, error: float) -> None:
    logprobs = torch.log_softmax(cases.logits("far", 5, 701)[0], -1)
    logprobs[0, 3] = -torch.inf
    records = Dense(701, dtype)
    decoded = records.decode(records.encode(logprobs))
    assert decoded.dtype == dtype
    assert decoded[0, 3] == -torch.inf
    torch.testing.assert_close(decoded.float(), logprobs, rtol=error, atol=1e-7)
    assert not torch.equal(decoded.float(), logprobs)
