"""Writing a cache and reading it back: every format, by content, in any order, from any process."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import fastkd
from fastkd import SparseTargets, reference
from fastkd.cache import CacheError, Collator, write
from fastkd.cache import open as open_cache
from tests import cached, cases, compare
from tests.cached import VOCAB

FORMATS = ("sampled", "topk", "dense")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache of each format, packed, of the same 40 sequences in several shards."""
    batches = cached.sequences(40).split(8)
    return {
        name: write(cached.teacher, batches, tmp_path_factory.mktemp("cache") / name, format=name, shard_tokens=200)
        for name in FORMATS
    }


def test_exact_rows_of_a_plain_top_k(tmp_path: Path) -> None:
    ids = cached.sequences(5)
    cache = write(cached.teacher, [ids], tmp_path, format="topk", k=20, temperature=1.5, packed=False)
    for sequence in ids:
        targets = cache.rows(sequence)
        kept, logprobs, rest = reference.top_k(cached.logits(sequence).double(), 20, 1.5)
        assert (targets.kind, targets.temperature, targets.entropy) == ("ghost", 1.5, None)
        assert torch.equal(targets.ids, kept)
        compare.assert_value(targets.logprobs, logprobs)
        compare.assert_value(targets.rest, rest)


@pytest.mark.parametrize("packed", [True, False])
def test_sampled_rows_estimate_the_teacher(tmp_path: Path, packed: bool) -> None:
    """Over 2,000 rows of one distribution the mean weight of every token is its probability, within 5 standard errors.

    Sequences have random numbers of their own: another seed gives another sample.
    """
    ids = cached.sequences(1000, length=2)
    logits = cases.logits("far", 1, VOCAB)[0][0]
    p = logits.double().softmax(-1)

    def constant(batch):
        return logits.expand(*batch["input_ids"].shape, VOCAB)

    cache = write(constant, ids.split(100), tmp_path / "a", k=8, packed=packed)
    targets = cache.targets(list(ids))
    assert (targets.kind, targets.rest) == ("sampled", None)
    torch.testing.assert_close(targets.entropy.double(), -(p * p.log()).sum().expand(1000, 2), rtol=1e-3, atol=1e-6)
    weights = torch.zeros(2000, VOCAB, dtype=torch.float64)
    weights.scatter_add_(1, targets.ids.view(2000, 8), targets.logprobs.view(2000, 8).double().exp())
    assert (weights.std(0) > 0).sum() > VOCAB / 2
    error = weights.std(0) / 2000**0.5
    assert ((weights.mean(0) - p).abs() <= 5 * error + 1e-4).all()
    other = write(constant, [ids[:2]], tmp_path / "b", k=8, packed=packed, seed=1).rows(ids[0])
    assert not torch.equal(other.ids, targets.ids[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_rows_are_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    ids = cached.sequences(3)
    cache = write(cached.teacher, [ids], tmp_path, format="dense", dtype=dtype, vocab_size=300)
    rows = cache.targets(list(ids))
    assert (rows.shape, rows.dtype) == ((3, 16, 300), dtype)
    expected = torch.stack([torch.log_softmax(cached.logits(sequence)[:, :300], -1) for sequence in ids])
    torch.testing.assert_close(rows.float(), expected, rtol=4e-3, atol=1e-3)
    cache.check(temperature=3.0, vocab_size=300)


@pytest.mark.parametrize("format", FORMATS)
def test_order_batches_and_padding_change_nothing(tmp_path: Path, caches, format: str) -> None:
    """The same rows from another order and batch size, padded on either side, and from a teacher that gives logits."""
    ids = cached.sequences(40).flip(0)
    batches = []
    for some, left in zip(ids.split(7), [0, 3, 0, 5, 1, 2], strict=True):
        padded = torch.nn.functional.pad(some, (0, left), value=5)
        batches.append({"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < 16).expand_as(padded)})
    other = write(lambda batch: cached.teacher(batch).logits(), batches, tmp_path, format=format)
    assert other.tokens == caches[format].tokens == 640
    for sequence in ids:
        ours, theirs = other.rows(sequence), caches[format].rows(sequence)
        if format == "dense":
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-3, atol=1e-3)
        else:
            assert (ours.ids == theirs.ids).float().mean() > 0.99
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0.06, atol=1e-3)


def test_left_padding(tmp_path: Path) -> None:
    """Rows are those of the tokens that are real, wherever they stand."""
    ids = cached.sequences(2, length=6)
    embedding, head = cached.parameters()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    cache = write(
        lambda batch: fastkd.Projection(embedding[batch["input_ids"]], head), [batch], tmp_path, format="topk", k=5
    )
    assert cache.tokens == 10
    assert ids[0] not in cache
    expected = reference.top_k(embedding[ids[0, 2:]] @ head.T, 5, 1.0)
    assert torch.equal(cache.rows(ids[0, 2:]).ids, expected[0])


def test_duplicates_are_stored_once(tmp_path: Path) -> None:
    ids = cached.sequences(4)
    calls = []

    def counting(batch):
        calls.append(len(batch["input_ids"]))
        return cached.teacher(batch)

    batches = [ids[:2], ids[[0, 0, 1]], ids[[0, 2, 2, 1, 3]], ids]
    cache = write(counting, batches, tmp_path, format="topk", packed=False, vocab_size=VOCAB)
    assert (cache.sequences, cache.tokens, calls) == (4, 64, [2, 5])
    for sequence in ids:  # those that were known beside new ones have left no rows among theirs
        assert torch.equal(cache.rows(sequence).ids, reference.top_k(cached.logits(sequence), 64, 1.0)[0])


def test_a_transformers_teacher(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=97, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(97, (4, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = write(model, [batch], tmp_path, format="topk", k=97, packed=False, teacher_name="tiny")
    assert model.training
    with torch.no_grad():
        expected = torch.log_softmax(model.eval()(ids).logits, -1)
    torch.testing.assert_close(cache.targets(list(ids)).logprobs, expected, rtol=1e-5, atol=1e-5)
    assert cache.settings.teacher == "tiny"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("format", FORMATS)
def test_batches_of_unequal_lengths(tmp_path: Path, format: str) -> None:
    whole = cached.sequences(3, length=20)
    sequences = [whole[0, :5], whole[1], whole[2, :9]]
    cache = write(cached.teacher, [sequence[None] for sequence in sequences], tmp_path, format=format)
    targets = cache.targets([sequences[2], sequences[0].tolist(), sequences[1].numpy()], max_length=12)
    lengths = [9, 5, 12]
    for number, sequence in enumerate((sequences[2], sequences[0], sequences[1])):
        alone, length = cache.rows(sequence), lengths[number]
        if format == "dense":
            assert targets.shape == (3, 12, VOCAB)
            assert torch.equal(targets[number, :length], alone[:length])
            assert (targets[number, length:] == 0).all()
            continue
        for part in ("ids", "logprobs", "rest" if format == "topk" else "entropy"):
            assert torch.equal(getattr(targets, part)[number, :length], getattr(alone, part)[:length])
        assert (targets.logprobs[number, length:] == -torch.inf).all()


def test_a_sequence_that_is_not_there(caches) -> None:
    cache, ids = caches["sampled"], cached.sequences(41)
    assert ids[3] in cache
    for absent in (ids[40] + 1, ids[3, :15]):
        assert absent not in cache
        with pytest.raises(CacheError, match=rf"sequence 1, {len(absent)} tokens \[{int(absent[0])}, .* is not in"):
            cache.targets([ids[3], absent])


def test_check(tmp_path: Path) -> None:
    class Tokenizer:
        def __init__(self, *words: str) -> None:
            self.get_vocab = lambda: {word: number for number, word in enumerate(words)}

    cache = write(cached.teacher, [cached.sequences(1)], tmp_path, temperature=2.0, tokenizer=Tokenizer("a", "b"))
    cache.check(tokenizer=Tokenizer("a", "b"), vocab_size=VOCAB, temperature=2)
    with pytest.raises(CacheError, match="another tokenizer"):
        cache.check(tokenizer=Tokenizer("b", "a"))
    with pytest.raises(CacheError, match=r"temperature 2.0, the training at 1"):
        cache.check(temperature=1.0)
    with pytest.raises(CacheError, match=r"vocabulary of 301, the training one of 304"):
        cache.check(vocab_size=304)
    nameless = write(cached.teacher, [cached.sequences(1)], tmp_path / "b")
    with pytest.raises(CacheError, match="does not say which tokenizer"):
        nameless.check(tokenizer=Tokenizer("a"))


BAD_ARGUMENTS = [
    ({"format": "logits"}, "'sampled', 'topk' or 'dense', got 'logits'"),
    ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
    ({"k": 0}, "k must be an int ≥ 1, got 0"),
    ({"format": "dense", "k": 3}, "keeps all tokens at temperature 1"),
    ({"format": "dense", "temperature": 2.0}, "keeps all tokens at temperature 1"),
    ({"format": "dense", "dtype": torch.float32}, r"float16 or torch.bfloat16, got torch.float32"),
    ({"vocab_size": 400}, r"\(8, 16, 301\).*vocab_size=400"),
    ({"vocab_size": 0}, "vocab_size must be in"),
    ({"shard_tokens": -1}, "shard_tokens must be > 0, got -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_wrong_arguments(tmp_path: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        write(cached.teacher, [cached.sequences(8)], tmp_path, **changes)
    assert not list(tmp_path.glob("*.safetensors"))


BAD_BATCHES = [
    ([], "batches is empty"),
    ([{"labels": torch.ones(1)}], r"must have input_ids, got \['labels'\]"),
    ([torch.ones(3, dtype=torch.int64)], r"integers \[batch, tokens\], got torch.int64 \(3,\)"),
    ([{"input_ids": cached.sequences(2), "attention_mask": torch.ones(2, 3)}], r"attention_mask \(2, 3\)"),
]


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES, ids=[message for _, message in BAD_BATCHES])
def test_wrong_batches(tmp_path: Path, batches, message) -> None:
    with pytest.raises(ValueError, match=message):
        write(lambda batch: torch.zeros(2, 16, VOCAB), batches, tmp_path)


def test_a_teacher_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Projection or logits, got str"):
        write(lambda batch: "no", [cached.sequences(1)], tmp_path)
    with pytest.raises(CacheError, match="NaN"):
        write(lambda batch: torch.full((1, 16, 9), torch.nan), [cached.sequences(1)], tmp_path / "b")
    with pytest.raises(CacheError, match="NaN"):
        write(lambda batch: torch.full((1, 16, 9), torch.nan), [cached.sequences(1)], tmp_path / "c", format="dense")
    with pytest.raises(CacheError, match=r"logits \(1, 15, 9\) for input_ids \(1, 16\)"):
        write(lambda batch: torch.zeros(1, 15, 9), [cached.sequences(1)], tmp_path / "d")


def examples(count: int = 40) -> list[dict[str, object]]:
    return [{"input_ids": ids.tolist()} for ids in cached.sequences(count)]


def test_collator(caches) -> None:
    cache, ids = caches["topk"], cached.sequences(40)
    padded = {
        "input_ids": torch.cat((torch.tensor([9, 9]), ids[1])),
        "attention_mask": [0, 0] + 16 * [1],
        "labels": [-100] * 10 + list(range(8)),
    }
    batch = Collator(cache, pad_token_id=3, max_length=12)([{"input_ids": ids[0]}, padded])
    assert torch.equal(batch["input_ids"], ids[:2, :12])
    assert batch["labels"].tolist() == [ids[0, :12].tolist(), [-100] * 8 + [0, 1, 2, 3]]
    assert (batch["attention_mask"] == 1).all()
    assert torch.equal(batch["teacher"].ids, cache.targets(list(ids[:2])).ids[:, :12])
    with pytest.raises(ValueError, match=r"must be \[tokens\] each, got \(16,\), \(3,\)"):
        Collator(cache)([{"input_ids": ids[0], "labels": [1, 2, 3]}])
    with pytest.raises(ValueError, match="max_length must be ≥ 1 or None, got 0"):
        Collator(cache, max_length=0)


def test_collator_pads_at_the_end(tmp_path: Path) -> None:
    ids = cached.sequences(2)
    cache = write(cached.teacher, [ids[:1], ids[1:, :4]], tmp_path)
    batch = Collator(cache, pad_token_id=3)([{"input_ids": ids[1, :4]}, {"input_ids": ids[0]}])
    assert batch["input_ids"][0].tolist() == ids[1, :4].tolist() + [3] * 12
    assert batch["labels"][0].tolist() == ids[1, :4].tolist() + [-100] * 12
    assert batch["attention_mask"].sum(-1).tolist() == [4, 16]
    assert (batch["teacher"].logprobs[0, 4:] == -torch.inf).all()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_shuffle_and_pin(caches, method: str) -> None:
    cache = caches["sampled"]
    loader = DataLoader(
        examples(),
        batch_size=8,
        shuffle=True,
        collate_fn=Collator(cache),
        num_workers=2,
        multiprocessing_context=method,
        pin_memory=torch.cuda.is_available(),
    )
    seen = 0
    for batch in loader:
        teacher = batch["teacher"]
        assert isinstance(teacher, SparseTargets)
        for ids, kept, logprobs in zip(batch["input_ids"], teacher.ids, teacher.logprobs, strict=True):
            assert torch.equal(kept, cache.rows(ids).ids)
            assert torch.equal(logprobs, cache.rows(ids).logprobs)
            seen += 1
    assert seen == 40


def test_a_pickled_cache_is_its_directory(caches) -> None:
    for cache in caches.values():
        pickled = pickle.dumps(cache)
        assert len(pickled) < 300
        assert repr(pickle.loads(pickled)) == repr(cache)


def test_manifest_says_what_is_in_it(tmp_path: Path) -> None:
    cache = write(cached.teacher, cached.sequences(10).split(4), tmp_path, teacher_name="t", teacher_revision="r")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    expected = {"fastkd_cache": 2, "format": "sampled", "packing": "packed", "k": 12, "temperature": 1.0}
    expected |= {"vocab_size": VOCAB, "seed": 0, "teacher": "t", "revision": "r", "tokenizer": None}
    expected |= {"complete": True, "sequences": 10, "tokens": 160}
    expected |= {"weights": None, "columns": []}
    assert {name: manifest[name] for name in expected} == expected
    assert cache.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert str(cache.sequences) in repr(open_cache(tmp_path))
    assert "incomplete" not in repr(cache)


def test_cache_is_an_attribute_of_the_package() -> None:
    assert fastkd.cache.open is open_cache
    with pytest.raises(AttributeError, match="no attribute 'cashe'"):
        _ = fastkd.cashe
