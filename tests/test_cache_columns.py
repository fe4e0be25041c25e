"""Rows are found by all of a sequence that reaches the teacher, and by none of its padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastkd
from fastkd.cache import CacheError, Collator, write
from fastkd.cache import open as open_cache
from tests import cached
from tests.cached import HIDDEN, VOCAB

TOKENS = 12
EXACT: dict[str, Any] = {"format": "topk", "k": 20, "packed": False}


def seeing(batch: Mapping[str, Any]) -> fastkd.Projection:
    """A teacher to whom pixels and positions matter."""
    embedding, head = cached.parameters()
    ids = batch["input_ids"]
    hidden = embedding[ids]
    if batch.get("pixel_values") is not None:
        hidden = hidden + batch["pixel_values"].float().mean((1, 2))[:, None, :HIDDEN]
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    return fastkd.Projection(hidden + 0.3 * positions[..., None], head)


def rows_of(batch: Mapping[str, Any]) -> Tensor:
    """The 20 likeliest tokens of each position, exactly."""
    return seeing(batch).logits().log_softmax(-1).topk(20).values.sort(-1).values


def assert_rows(targets: Any, batch: Mapping[str, Any]) -> None:
    torch.testing.assert_close(targets.logprobs.sort(-1).values, rows_of(batch), rtol=1e-5, atol=1e-5)


def test_two_images_with_one_text_are_two_sequences(tmp_path: Path) -> None:
    ids = cached.sequences(1, TOKENS).expand(2, -1)
    images = torch.randn(2, 3, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "pixel_values": images}
    assert (rows_of(batch)[0] - rows_of(batch)[1]).abs().max() > 0.5
    cache = write(seeing, [batch], tmp_path, **EXACT)
    assert cache.sequences == 2
    assert cache.columns == ("pixel_values",)
    examples = [{"input_ids": ids[0], "pixel_values": image} for image in images]
    assert_rows(cache.targets(examples), batch)
    assert examples[1] in cache
    assert ids[0] not in cache
    with pytest.raises(CacheError, match=r"all token ids of a sequence and pixel_values.*This one has nothing beside"):
        cache.targets([ids[0]])


def test_packed_positions_and_the_same_ids_whole_are_two_sequences(tmp_path: Path) -> None:
    ids = cached.sequences(1, TOKENS)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])}
    whole = {"input_ids": ids}
    cache = write(seeing, [packed, whole], tmp_path, **EXACT)
    assert cache.sequences == 2
    assert cache.columns == ("position_ids",)
    assert_rows(cache.targets([{"input_ids": ids[0], "position_ids": packed["position_ids"][0]}]), packed)
    assert_rows(cache.targets([ids[0]]), whole)


def test_positions_that_count_are_no_column(tmp_path: Path) -> None:
    """What models do without any: the same row, given or not, and however padded."""
    ids = cached.sequences(2, TOKENS)
    counted = torch.arange(TOKENS).expand_as(ids)
    cache = write(seeing, [{"input_ids": ids, "position_ids": counted}], tmp_path, **EXACT)
    assert cache.columns == ()
    left = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (3, 0)),
        "position_ids": torch.nn.functional.pad(counted, (3, 0), value=1),
    }

    def never(_batch: Mapping[str, Any]) -> Tensor:
        raise AssertionError("all rows are there")

    assert write(never, [left, {"input_ids": ids}], tmp_path, **EXACT).sequences == 2
    assert {"input_ids": ids[0].tolist(), "position_ids": list(range(TOKENS))} in cache


def test_packed_examples_are_not_served_rows_of_the_whole(tmp_path: Path) -> None:
    ids = cached.sequences(1, TOKENS)
    cache = write(seeing, [ids], tmp_path, **EXACT)
    with pytest.raises(CacheError, match="This one has position_ids beside them"):
        Collator(cache)([{"input_ids": ids[0], "position_ids": [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]}])


def test_every_value_of_a_column_counts(tmp_path: Path) -> None:
    """One pixel, one type, another dtype of the same values."""
    ids = cached.sequences(1, TOKENS)
    image = torch.zeros(1, 2, 3, HIDDEN)
    other = image.clone()
    other[0, -1, -1, -1] = 1e-3
    types = torch.zeros_like(ids)
    batches = [
        {"input_ids": ids},
        {"input_ids": ids, "pixel_values": image},
        {"input_ids": ids, "pixel_values": other},
        {"input_ids": ids, "pixel_values": image.flatten(1, 2)[:, None]},
        {"input_ids": ids, "token_type_ids": types},
        {"input_ids": ids, "token_type_ids": types + 1},
        {"input_ids": ids, "pixel_values": image, "token_type_ids": types},
    ]
    cache = write(seeing, batches, tmp_path, **EXACT)
    assert cache.sequences == len(batches)
    assert cache.columns == ("pixel_values", "token_type_ids")
    same = [
        {"input_ids": ids, "pixel_values": image.bfloat16()},
        {"input_ids": ids, "token_type_ids": types.int(), "labels": ids, "attention_mask": torch.ones_like(ids)},
    ]
    assert write(seeing, same, tmp_path, **EXACT).sequences == len(batches)


def test_columns_survive_a_resumed_write(tmp_path: Path) -> None:
    ids = cached.sequences(2, TOKENS)
    images = torch.randn(2, 1, 1, HIDDEN)
    batches = [{"input_ids": ids[:1]}, {"input_ids": ids[1:], "pixel_values": images[1:]}]
    write(seeing, batches[:1], tmp_path, **EXACT)
    cache = write(seeing, batches, tmp_path, **EXACT)
    assert open_cache(tmp_path).columns == ("pixel_values",)
    assert_rows(cache.targets([{"input_ids": ids[1], "pixel_values": images[1]}]), batches[1])


def test_the_collator_hands_on_what_the_teacher_saw(tmp_path: Path) -> None:
    """To find the rows, and to the student: through worker processes, padded and cut."""
    ids = cached.sequences(4, TOKENS)
    images = torch.randn(4, 2, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).flip(0).expand(4, -1)
    cache = write(seeing, [{"input_ids": ids, "pixel_values": images, "position_ids": positions}], tmp_path, **EXACT)
    examples = [
        {"input_ids": ids[n].tolist(), "pixel_values": images[n].tolist(), "position_ids": positions[n], "text": "…"}
        for n in range(4)
    ]
    (batch,) = DataLoader(examples, 4, collate_fn=Collator(cache, max_length=7), num_workers=1)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "pixel_values", "position_ids", "teacher"]
    torch.testing.assert_close(batch["pixel_values"], images)
    assert torch.equal(batch["position_ids"], positions[:, :7])
    assert_rows(batch["teacher"], {name: batch[name] for name in ("input_ids", "pixel_values", "position_ids")})
    del examples[2]["position_ids"]
    with pytest.raises(CacheError, match=r"sequence 2, .* This one has pixel_values beside them"):
        Collator(cache)(examples)


NOT_UNDERSTOOD: dict[str, tuple[dict[str, Any], str]] = {
    "patches of all images": (
        {"pixel_values": torch.ones(7, 4)},
        r"'pixel_values' \(7, 4\) beside input_ids \(2, 12\)",
    ),
    "a list of texts": ({"text": ["a", "b"]}, "'text' is list, by which no sequence can be found"),
    "a number": ({"logits_to_keep": torch.tensor(3)}, r"'logits_to_keep' \(\)"),
    "an object": ({"past_key_values": object()}, "'past_key_values' is object"),
    "short positions": ({"position_ids": torch.ones(2, 5)}, r"position_ids \(2, 5\) must have an entry for each"),
    "a mask of packed sequences": ({"attention_mask": torch.full((2, TOKENS), 2)}, "must hold 0 .* and 1"),
    "an unknown column of padded tokens": (
        {"segments": torch.ones(2, TOKENS), "attention_mask": (torch.arange(TOKENS) < 9).int().expand(2, -1)},
        r"'segments' \(2, 12\) may have an entry per token",
    ),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused(tmp_path: Path, name: str) -> None:
    columns, message = NOT_UNDERSTOOD[name]
    with pytest.raises(ValueError, match=message):
        write(seeing, [{"input_ids": cached.sequences(2, TOKENS), **columns}], tmp_path, vocab_size=VOCAB, **EXACT)
    assert not list(tmp_path.glob("*.safetensors"))


def test_one_text_padded_differently_is_one_row_and_the_right_one(tmp_path: Path) -> None:
    """Of a model with learned positions, which without care numbers a text from where its padding ends."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(97, (3, TOKENS))
    with torch.no_grad():
        alone = model(ids).logits.log_softmax(-1)
    for name, (left, right) in {"left": (5, 0), "right": (0, 4), "both": (2, 3)}.items():
        batch = {
            "input_ids": torch.nn.functional.pad(ids, (left, right), value=7),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (left, right)),
        }
        cache = write(model, [batch], tmp_path / name, format="topk", k=97, packed=False)
        assert cache.tokens == ids.numel()
        torch.testing.assert_close(cache.targets(list(ids)).logprobs, alone, rtol=1e-4, atol=1e-4)
        assert write(model, [ids], tmp_path / name, format="topk", k=97, packed=False).tokens == ids.numel()
